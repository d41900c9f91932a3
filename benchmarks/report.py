"""Turns saved benchmark results into the README's table and figure, and into a small file to keep.

    pytest benchmarks/ --benchmark-only --benchmark-json=raw.json
    python -m benchmarks.report raw.json --save benchmarks/results/cpu/2026-01-31.json \\
        --readme README.md --figure benchmarks/figures/cpu.svg

Several files are parts of one run. The README's text between `<!-- benchmark:NAME begin -->` and
`<!-- benchmark:NAME end -->` is replaced, NAME being cpu or gpu.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.machine import headline
from benchmarks.shapes import SHAPES

Result = dict  # one benchmark's extra_info; test_attention.py and test_language_model.py say what is in it

MIB = 1 << 20
KEPT_STATISTICS = ("min", "median", "max", "iqr", "rounds")


def load(paths: list[Path]) -> list[dict]:
    """The benchmarks of a run saved in parts, without the times of every round.

    Raises:
        ValueError: smoke results, which mean nothing, or parts from different machines or commits.
    """
    kept = {}
    for path in paths:
        for benchmark in json.loads(path.read_text())["benchmarks"]:
            if benchmark["extra_info"]["smoke"]:
                raise ValueError(f"{path}: a smoke run, its times mean nothing")
            stats = {key: benchmark["stats"][key] for key in KEPT_STATISTICS}
            kept[benchmark["name"]] = {
                "name": benchmark["name"],
                "stats": stats,
                "extra_info": benchmark["extra_info"],
            }
    if not kept:
        raise ValueError(f"no benchmarks in {', '.join(map(str, paths))}")
    machines = {headline(benchmark["extra_info"]["machine"]) for benchmark in kept.values()}
    if len(machines) > 1:
        raise ValueError(f"results of different runs: {'; '.join(sorted(machines))}")
    return list(kept.values())


def by_shape(results: list[Result]) -> list[Result]:
    """The attention results among all, in the order of SHAPES, forward first."""
    attention = [x for x in results if "shape" in x]
    return sorted(attention, key=lambda x: (list(SHAPES).index(x["shape"]), x["pass"]))


def table(results: list[Result]) -> str:
    """A Markdown table of the attention results: time, speed-up, peak extra memory, useful TFLOP/s."""
    lines = [
        "| shape | B, H x D, T + M | pass | eager ms | ours ms | speed-up | eager MiB | ours MiB | TFLOP/s |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for x in results:
        sizes = "{B}, {H} x {D}, {T} + {M}".format(**x["sizes"])
        cells = [x["shape"], sizes, x["pass"]]
        if x["ratio"] is None:
            cells += [x["reference"], f"{x['seconds'] * 1e3:.3g}", "", ""]
        else:
            cells += [
                f"{x['reference_seconds'] * 1e3:.3g}",
                f"{x['seconds'] * 1e3:.3g}",
                f"{x['ratio']:.2f}x",
            ]
            cells += [f"{x['reference_peak_bytes'] / MIB:.3g}"]
        cells += [f"{x['peak_bytes'] / MIB:.3g}", f"{x['tflop_per_second']:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def training_sentence(x: Result) -> str:
    """What the language model's training gave."""
    sizes = "{n_layer} layers, d_model {d_model}, {n_head} heads x {d_head}, T = M = {segment}, batch {batch}"
    return (
        f"Training a language model ({sizes.format(**x['config'])}) for {x['config']['steps']} steps on {x['text']}: "
        f"{x['tokens_per_second']:.0f} tokens/s, with the original's layer "
        f"{x['reference_tokens_per_second']:.0f} ({x['ratio']:.2f}x). The first losses differ by at most "
        f"{x['first_losses_difference']:.0e}, relative; the last ones are {x['last_loss']:.4f} and "
        f"{x['reference_last_loss']:.4f} nats a byte on average, the unigram entropy is "
        f"{x['unigram_entropy']:.2f}."
    )


def markdown(results: list[Result], figure: str | None = None) -> str:
    """The generated part of the README: what was measured on what, table, figure, training."""
    attention = by_shape(results)
    parts = [f"Measured on {headline(results[0]['machine'])}."]
    if attention:
        dtype = attention[0]["dtype"]
        parts[0] += f" {dtype}, causal; speed-up is the median of paired ratios."
        parts.append(table(attention))
        if figure:
            parts.append(f"![Speed-up and peak extra memory by shape]({figure})")
    parts += [training_sentence(x) for x in results if "text" in x]
    return "\n\n".join(parts)


def draw(results: list[Result], path: Path) -> None:
    """Saves the picture: speed-up by shape and pass, and peak extra memory as a share of the reference's."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "txl_kernels"  # the same results give the same file
    import matplotlib.pyplot as plt

    compared = [x for x in by_shape(results) if x["ratio"] is not None]
    shapes = list(dict.fromkeys(x["shape"] for x in compared))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.45 * len(shapes) + 1.5), sharey=True)
    for offset, name in ((-0.2, "forward"), (0.2, "forward + backward")):
        chosen = [x for x in compared if x["pass"] == name]
        rows = [shapes.index(x["shape"]) + offset for x in chosen]
        memory = [x["peak_bytes"] / x["reference_peak_bytes"] for x in chosen]
        for axes, values, form in ((left, [x["ratio"] for x in chosen], "%.1fx"), (right, memory, "%.2f")):
            axes.bar_label(axes.barh(rows, values, height=0.38, label=name), fmt=form, fontsize=8, padding=2)
            axes.axvline(1, color="gray", linewidth=0.8)
            axes.margins(x=0.15)
    left.set(title="times faster than eager", yticks=range(len(shapes)), yticklabels=shapes)
    left.invert_yaxis()
    right.set(title="peak extra memory / eager's")
    right.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def replace_section(readme: Path, name: str, text: str) -> None:
    """Replaces what stands between the two marker comments of a name.

    Raises:
        ValueError: the README does not have the pair of markers exactly once.
    """
    begin, end = (f"<!-- benchmark:{name} {edge} -->" for edge in ("begin", "end"))
    old = readme.read_text()
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{readme}: needs {begin} and then {end}, once each")
    pattern = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
    readme.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", old))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON of pytest-benchmark, or saved by --save")
    parser.add_argument("--save", type=Path, help="keep the results here, without every round's time")
    parser.add_argument("--readme", type=Path, help="replace the section of this device in this file")
    parser.add_argument("--figure", type=Path, help="draw speed-up and memory here (.svg or .png)")
    options = parser.parse_args(arguments)

    benchmarks = load(options.results)
    results = [benchmark["extra_info"] for benchmark in benchmarks]
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps({"benchmarks": benchmarks}, indent=1) + "\n")
    if options.figure:
        draw(results, options.figure)
    text = markdown(results, options.figure and options.figure.as_posix())
    if options.readme:
        replace_section(options.readme, results[0]["machine"]["kind"], text)
    else:
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
