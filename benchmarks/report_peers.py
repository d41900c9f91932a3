"""The report's part on peers: table, pictures by length, host time, longest sequence."""

from pathlib import Path, PurePosixPath

from benchmarks.measure import MIB
from benchmarks.peers import OUT_OF_MEMORY, PEERS
from benchmarks.pictures import pyplot, save_figure
from benchmarks.shapes import PEER_SHAPES

Result = dict  # one benchmark's extra_info

EXPLANATION = (
    "Peers in {dtype}: `eager` is the original algorithm with scores laid out (B, H, T, S), `compiled` the same under "
    "torch.compile; `sdpa + BD mask` gives the shifted position term to PyTorch's fused attention as its mask; `flex` "
    "reads it in FlexAttention's score_mod. The last two compute something else: attention without positions, which is "
    "the floor, and with rotary embedding. Each was checked against float64 before it was timed. In brackets: how many "
    "times faster ours is, the median of the paired ratios."
)
QUANTITIES = {
    "time": ("milliseconds", lambda x, side: x["seconds"][side] * 1e3),
    "memory": ("peak extra MiB", lambda x, side: x["peak_bytes"][side] / MIB),
}


def sections(results: list[Result], figure: str | None) -> list[str]:
    """The Markdown of everything here that the results contain; pictures stand beside the figure."""
    parts = []
    if peers := by_case(results):
        parts += [EXPLANATION.format(dtype=peers[0]["dtype"]), table(peers), *left_out(peers)]
        if figure and by_length(peers):
            for quantity in QUANTITIES:
                path = picture_path(PurePosixPath(figure), quantity)
                parts.append(f"![{quantity.capitalize()} against length, ours and peers]({path})")
    if host := [x for x in results if "host_time" in x]:
        parts.append(host_table(host))
    parts += [longest_sentence(x) for x in results if "longest" in x]
    return parts


def by_case(results: list[Result]) -> list[Result]:
    """The results with peers, in the order of PEER_SHAPES, forward first, backward alone last."""
    passes = ["forward", "forward + backward", "backward"]
    peers = [x for x in results if "peers" in x]
    return sorted(peers, key=lambda x: (list(PEER_SHAPES).index(x["peers"]), passes.index(x["pass"])))


def by_length(results: list[Result]) -> list[Result]:
    return [x for x in by_case(results) if x["peers"].startswith("length_")]


def table(results: list[Result]) -> str:
    """A Markdown table: milliseconds of every side, how many times faster ours is, memory and useful TFLOP/s."""
    names, memory = list(PEERS), ["ours", "eager", "sdpa + BD mask", "flash, no position"]
    heads = ["B, H x D, T + M", "pass", "ours ms", *names, *(f"{side} MiB" for side in memory), "ours TFLOP/s"]
    lines = [f"| {' | '.join(heads)} |", f"|---|---|{'--:|' * (len(heads) - 2)}"]
    for x in results:
        direction = "" if x["sizes"]["is_causal"] else ", bidirectional"
        cells = ["{B}, {H} x {D}, {T} + {M}".format(**x["sizes"]) + direction, x["pass"]]
        cells += [f"{x['seconds']['ours'] * 1e3:.3g}", *(_time(x, name) for name in names)]
        cells += [f"{x['peak_bytes'][side] / MIB:.3g}" if side in x["peak_bytes"] else "" for side in memory]
        lines.append(f"| {' | '.join(cells)} | {x['tflop_per_second']['ours']:.3g} |")
    return "\n".join(lines)


def left_out(results: list[Result]) -> list[str]:
    """A list of the peers that were not measured, with the reason and where."""
    cases: dict[tuple[str, str], list[str]] = {}
    for x in results:
        for name, reason in x["unavailable"].items():
            if reason != OUT_OF_MEMORY:  # the table says so
                cases.setdefault((name, reason), []).append(f"{x['peers']} {x['pass']}")
    lines = [
        f"- `{name}`, {len(where)} of {len(results)} rows ({where[0]}{', ...' if len(where) > 1 else ''}): {reason}"
        for (name, reason), where in cases.items()
    ]
    return ["Not measured:\n\n" + "\n".join(lines)] if lines else []


def host_table(results: list[Result]) -> str:
    """A Markdown table of the host's time for one call, beside PyTorch's attention and the eager reference."""
    where = "Python, dispatch and a small call" if results[0]["machine"]["kind"] == "cpu" else "host only"
    lines = [
        f"| host time of one call ({where}) | B, H x D, T | ours us | sdpa us | eager us | ours / sdpa |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for x in sorted(results, key=lambda x: x["host_time"], reverse=True):
        cells = [x["host_time"], "{B}, {H} x {D}, {T}".format(**x["sizes"])]
        seconds, ratio = x["seconds"], x["ratio"]
        cells += [f"{seconds[side] * 1e6:.3g}" if side in seconds else "-" for side in ("ours", "sdpa", "eager")]
        lines.append(f"| {' | '.join(cells)} | {1 / ratio['sdpa']:.2f}x |" if ratio else f"| {' | '.join(cells)} | - |")
    return "\n".join(lines)


def longest_sentence(x: Result) -> str:
    """How long a sequence each side can train on."""
    found = [
        f"{side} {y['T']} ({y['seconds']:.2g} s; a longer one is stopped by {y['stopped_by']})"
        for side, y in x["longest"].items()
    ]
    sizes = "{H} heads x {D}, batch {B}".format(**x["sizes"])
    return f"Longest sequence for one forward + backward, {x['direction']}, {sizes}, {x['dtype']}: {'; '.join(found)}."


def picture_path(figure: PurePosixPath | Path, quantity: str) -> PurePosixPath | Path:
    return figure.with_name(f"{figure.stem}-{quantity}{figure.suffix}")


def draw_all(results: list[Result], figure: Path) -> None:
    """Saves a picture for each quantity beside the figure, if there are results by length."""
    if chosen := by_length(results):
        for quantity in QUANTITIES:
            draw(chosen, quantity, picture_path(figure, quantity))


def draw(results: list[Result], quantity: str, path: Path) -> None:
    """A quantity against the length T = M, every side a line; a panel for each pass and head size."""
    label, value = QUANTITIES[quantity]
    passes = [name for name in ("forward", "forward + backward") if any(x["pass"] == name for x in results)]
    head_sizes = sorted({x["sizes"]["D"] for x in results})
    size = (5 * len(passes), 3.6 * len(head_sizes))
    figure, axes = pyplot().subplots(len(head_sizes), len(passes), figsize=size, sharey=True, squeeze=False)
    for D, row in zip(head_sizes, axes, strict=True):
        for which, panel in zip(passes, row, strict=True):
            shown = [x for x in results if (x["sizes"]["D"], x["pass"]) == (D, which)]
            for n, side in enumerate(["ours", *PEERS]):
                points = [(x["sizes"]["T"], value(x, side)) for x in shown if side in x["seconds"]]
                style = "o-" if side == "ours" or PEERS[side].is_relative else "o:"
                panel.plot(
                    *zip(*points, strict=True) if points else ([], []), style, color=f"C{n}", label=side, markersize=3
                )
            lengths = [x["sizes"]["T"] for x in shown]
            panel.loglog()
            panel.set(title=f"{which}, head size {D}", xlabel="T = M", xticks=lengths, xticklabels=lengths)
            panel.minorticks_off()
    for row in axes:
        row[0].set_ylabel(label)
    axes[0][-1].legend(fontsize=7)
    save_figure(figure, path)


def _time(x: Result, name: str) -> str:
    if name in x["seconds"]:
        return f"{x['seconds'][name] * 1e3:.3g} ({x['ratio'][name]:.2f}x)"
    return OUT_OF_MEMORY if x["unavailable"].get(name) == OUT_OF_MEMORY else "-"
