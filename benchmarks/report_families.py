"""The report's part on models of others, before and after `txl_kernels.patch`."""

from benchmarks.measure import MIB

Result = dict  # one benchmark's extra_info; the test_*.py here say what is in it


def families_table(results: list[Result]) -> str:
    """A Markdown table: a row for each model and length, with its forward and its training step."""
    text = (
        f"Models of others, their own code against the same model after `txl_kernels.patch`, in {results[0]['dtype']}: "
        "small models at lengths that people use, the whole forward without gradient and the whole training step "
        "without an optimizer. MiB is the peak of a call beyond what was allocated before it."
    )
    return f"{text}\n\n{_steps_table('model', 'family', results)}"


def attention_modules_table(results: list[Result]) -> str:
    """A Markdown table: a row for each family's attention and length, with its forward and its training step."""
    text = (
        f"Attention modules alone, with their projections, as their encoders call them, in {results[0]['dtype']}: "
        "forward without gradient, and training step, which is forward and backward to inputs and parameters. Gemma's "
        "attention and the Longformer are linear in their own code, too."
    )
    return f"{text}\n\n{_steps_table('attention of', 'attention_of', results)}"


def _steps_table(title: str, key: str, results: list[Result]) -> str:
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for x in results:
        rows.setdefault((x[key], x["length"]), {})[x["step"]] = x
    lines = [
        f"| {title} | shape | forward, own ms | patched ms | speed-up | own MiB | patched MiB | training step, "
        "own ms | patched ms | speed-up | own MiB | patched MiB |",
        f"|---|---|{'--:|' * 10}",
    ]
    for names, steps in rows.items():
        cells = list(names)
        for step in ("forward", "training step"):
            if step not in steps:
                cells += [""] * 5
                continue
            x = steps[step]
            cells += [f"{x['seconds'][side] * 1e3:.3g}" for side in ("own", "ours")]
            cells += [f"{x['ratio']['own']:.2f}x"]
            cells += [f"{x['peak_bytes'][side] / MIB:.3g}" for side in ("own", "ours")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def longest_audio_sentence(x: Result) -> str:
    """How much audio fits before and after."""
    memory = "the GPU's memory" if x["memory"] is None else f"{x['memory'] / MIB:.0f} MiB"
    sides = [
        f"{side}: {y['minutes']:.1f} minutes ({y['seconds']:.2g} s; what stops a longer one is {y['stopped_by']})"
        for side, y in x["longest_audio"].items()
    ]
    return (
        f"Longest audio in one forward of a Parakeet encoder layer (4 heads x 64) within {memory}: {', '.join(sides)}."
    )


def sections(results: list[Result]) -> list[str]:
    """What there is to say of families; nothing if none ran."""
    families = [x for x in results if "family" in x]
    parts = [families_table(families)] if families else []
    if modules := [x for x in results if "attention_of" in x]:
        parts.append(attention_modules_table(modules))
    return parts + [longest_audio_sentence(x) for x in results if "longest_audio" in x]
