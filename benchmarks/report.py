"""Turns saved benchmark results into the README's table and figure, and into a small file to keep.

    pytest benchmarks/ --benchmark-only --benchmark-json=raw.json
    python -m benchmarks.report raw.json --save benchmarks/results/cpu/2026-01-31.json \\
        --readme README.md --figure benchmarks/figures/cpu.svg

Several files are parts of one run. The README's text between `<!-- benchmark:NAME begin -->` and
`<!-- benchmark:NAME end -->` is replaced, NAME being cpu or gpu. The pictures of time and memory by length stand beside
the figure, as cpu-time.svg and cpu-memory.svg.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from benchmarks import report_families, report_models, report_peers
from benchmarks.machine import headline
from benchmarks.measure import MIB
from benchmarks.pictures import pyplot, save_figure
from benchmarks.shapes import SHAPES

Result = dict  # one benchmark's extra_info; the test_*.py here say what is in it

KEPT_STATISTICS = ("min", "median", "max", "iqr", "rounds")


def load(paths: list[Path]) -> list[dict]:
    """The benchmarks of a run saved in parts, without the times of every round.

    Raises:
        ValueError: smoke results, which mean nothing, or parts from different machines or commits.
    """
    kept, machines = {}, set()
    for path in paths:
        for benchmark in json.loads(path.read_text())["benchmarks"]:
            if benchmark["extra_info"]["smoke"]:
                raise ValueError(f"{path}: a smoke run, its times mean nothing")
            machines.add(headline(benchmark["extra_info"]["machine"]))
            stats = {key: benchmark["stats"][key] for key in KEPT_STATISTICS}
            kept[benchmark["name"]] = {
                "name": benchmark["name"],
                "stats": stats,
                "extra_info": benchmark["extra_info"],
            }
    if not kept:
        raise ValueError(f"no benchmarks in {', '.join(map(str, paths))}")
    if len(machines) > 1:
        raise ValueError(f"results of different runs: {'; '.join(sorted(machines))}")
    return list(kept.values())


def by_shape(results: list[Result]) -> list[Result]:
    """The attention results among all, in the order of SHAPES, forward first."""
    attention = [x for x in results if "shape" in x]
    return sorted(attention, key=lambda x: (list(SHAPES).index(x["shape"]), x["pass"]))


def table(results: list[Result]) -> str:
    """A Markdown table of the attention results: times, speed-ups, peak extra memory, useful TFLOP/s."""
    lines = [
        "| shape | B, H x D, T + M | pass | ours ms | original ms | batch-major ms | speed-up over original | "
        "over batch-major | ours MiB | original MiB | ours TFLOP/s |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for x in results:
        milliseconds = {name: f"{seconds * 1e3:.3g}" for name, seconds in x["seconds"].items()}
        milliseconds |= dict.fromkeys(x["out_of_memory"], "out of memory")
        ratio = {name: f"{value:.2f}x" for name, value in x["ratio"].items()}
        mebibytes = {name: f"{size / MIB:.3g}" for name, size in x["peak_bytes"].items()}
        cells = [x["shape"], "{B}, {H} x {D}, {T} + {M}".format(**x["sizes"]), x["pass"]]
        cells += [milliseconds[name] for name in ("ours", "original", "batch-major")]
        cells += [ratio.get(name, "") for name in ("original", "batch-major")]
        cells += [mebibytes.get(name, "") for name in ("ours", "original")]
        lines.append(f"| {' | '.join(cells)} | {x['tflop_per_second']['ours']:.3g} |")
    return "\n".join(lines)


def hidden_keys_table(results: list[Result]) -> str:
    """A Markdown table of what a window and key lengths save."""
    lines = ["| hidden keys | B, H x D, T | pass | ms | with all keys ms | speed-up |", "|---|---|---|--:|--:|--:|"]
    for x in results:
        milliseconds = [f"{x['seconds'][side] * 1e3:.3g}" for side in ("ours", "all keys")]
        cells = [x["hidden_keys"], "{B}, {H} x {D}, {T}".format(**x["sizes"]), x["pass"], *milliseconds]
        lines.append(f"| {' | '.join(cells)} | {x['ratio']['all keys']:.2f}x |")
    return "\n".join(lines)


def bfloat16_table(results: list[Result]) -> str:
    """A Markdown table of bfloat16 on a CPU against float32, and against the original in bfloat16."""
    lines = [
        "| in bfloat16 | B, H x D, T + M | pass | ms | in float32 ms | original ms | speed-up over float32 | "
        "over original |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for x in results:
        cells = [x["bfloat16"], "{B}, {H} x {D}, {T} + {M}".format(**x["sizes"]), x["pass"]]
        cells += [f"{x['seconds'][side] * 1e3:.3g}" for side in ("ours", "float32", "original")]
        cells += [f"{x['ratio'][side]:.2f}x" for side in ("float32", "original")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(results: list[Result], figure: str | None = None) -> str:
    """The generated part of the README: what was measured on what, table, figure, training."""
    attention = by_shape(results)
    parts = [f"Measured on {headline(results[0]['machine'])}."]
    if attention:
        dtype = attention[0]["dtype"]
        parts[0] += (
            f" Causal attention in {dtype}. `original` is the original algorithm in eager PyTorch, `batch-major` the "
            "same with scores laid out (B, H, T, S); all are timed in turn, and a speed-up is the median of the paired "
            "ratios. MiB is the peak of a call beyond what was allocated before it."
        )
        parts.append(table(attention))
        if figure:
            parts.append(f"![Speed-up and peak extra memory by shape]({figure})")
    if hidden := [x for x in results if "hidden_keys" in x]:
        parts.append(hidden_keys_table(hidden))
    if half := [x for x in results if "bfloat16" in x]:
        parts.append(bfloat16_table(half))
    parts += report_peers.sections(results, figure)
    parts += report_models.sections(results)
    parts += report_families.sections(results)
    return "\n\n".join(parts)


def draw(results: list[Result], path: Path) -> None:
    """Saves the picture: speed-up by shape and pass, and peak extra memory as a share of the original's."""
    plt = pyplot()
    compared = [x for x in by_shape(results) if "original" in x["ratio"]]
    shapes = list(dict.fromkeys(x["shape"] for x in compared))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.45 * len(shapes) + 1.5), sharey=True)
    for offset, name in ((-0.2, "forward"), (0.2, "forward + backward")):
        chosen = [x for x in compared if x["pass"] == name]
        rows = [shapes.index(x["shape"]) + offset for x in chosen]
        speedup = [x["ratio"]["original"] for x in chosen]
        memory = [x["peak_bytes"]["ours"] / x["peak_bytes"]["original"] for x in chosen]
        for axes, values, form in ((left, speedup, "%.1fx"), (right, memory, "%.2f")):
            axes.bar_label(axes.barh(rows, values, height=0.38, label=name), fmt=form, fontsize=8, padding=2)
            axes.axvline(1, color="gray", linewidth=0.8)
            axes.margins(x=0.15)
    left.set(title="times faster than the original", yticks=range(len(shapes)), yticklabels=shapes)
    left.invert_yaxis()
    right.set(title="peak extra memory / the original's")
    right.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


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
        if by_shape(results):
            draw(results, options.figure)
        report_peers.draw_all(results, options.figure)
    folder = options.readme.parent if options.readme else Path()
    text = markdown(results, options.figure and Path(os.path.relpath(options.figure, folder)).as_posix())
    if options.readme:
        replace_section(options.readme, results[0]["machine"]["kind"], text)
    else:
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
