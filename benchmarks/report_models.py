"""The part of the report about whole models: layers with a kept memory, evaluation, training."""

Result = dict  # one benchmark's extra_info; the test_*.py here say what is in it

SIZES = "n_layer {n_layer}, d_model {d_model}, {n_head} heads x {d_head}, d_inner {d_inner}"


def kept_projections_table(results: list[Result]) -> str:
    """A Markdown table of the attention layer with a kept memory against one that is projected again."""
    lines = [
        "| layer with its memory's projections kept | B, H x D, T + M | ms | projected again ms | original ms | "
        "speed-up over projected again | over original |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for x in results:
        cells = [x["kept_projections"], "{B}, {H} x {D}, {T} + {M}".format(**x["sizes"])]
        cells += [f"{x['seconds'][side] * 1e3:.3g}" for side in ("ours", "projected again", "original")]
        cells += [f"{x['ratio'][side]:.2f}x" for side in ("projected again", "original")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def evaluation_speed_table(results: list[Result]) -> str:
    """A Markdown table of the time of a token in evaluation, against a model that recomputes its window for it."""
    sizes = results[0]["sizes"]
    lines = [
        f"Evaluation in {results[0]['dtype']}, both models {SIZES.format(**sizes)}, batch {sizes['batch']}, ours "
        f"{sizes['T']} tokens at a time. The vanilla model runs over the whole window for every token; published is "
        "the speed-up of Dai et al. 2019, table 9, with their model on a GPU.",
        "",
        "| attention length | ms a token | with the memory projected again | vanilla | speed-up | published |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for x in sorted(results, key=lambda x: x["attention_length"]):
        tokens = {"ours": x["sizes"]["T"], "projected again": x["sizes"]["T"], "vanilla": 1}
        cells = [x["attention_length"], *(f"{x['seconds'][side] / n * 1e3:.3g}" for side, n in tokens.items())]
        lines.append(f"| {' | '.join(map(str, cells))} | {x['ratio']['vanilla']:.0f}x | {x['published']}x |")
    return "\n".join(lines)


def training_speed_table(results: list[Result]) -> str:
    """A Markdown table of training steps of the original's models."""
    lines = [
        f"Training steps in {results[0]['dtype']}, forward to optimizer, with a vocabulary of {results[0]['n_token']} "
        "and no dropout, so that layers are what is timed.",
        "",
        "| training step | model | T = M, batch | tokens/s | original layer's tokens/s | speed-up |",
        "|---|---|---|--:|--:|--:|",
    ]
    for x in results:
        sizes = x["sizes"]
        cells = [x["trained"], SIZES.format(**sizes), f"{sizes['T']}, {sizes['batch']}"]
        cells += [f"{x['tokens_per_second'][side]:.0f}" for side in ("ours", "original")]
        lines.append(f"| {' | '.join(cells)} | {x['ratio']['original']:.2f}x |")
    return "\n".join(lines)


def memory_table(x: Result) -> str:
    """A Markdown table of the loss by length of memory in evaluation."""
    lengths = list(x["memory_helps"]["trained with memory"])
    lines = [
        f"Memory helps: nats a token of a text that repeats itself every {x['period']} tokens, in segments of "
        f"{x['segment']}, by the length of the memory in evaluation; training had {x['memory']} or none, and distances "
        f"are clamped at {x['clamp_len']}, the farthest that training had.",
        "",
        f"| | {' | '.join(map(str, lengths))} |",
        f"|---|{'--:|' * len(lengths)}",
    ]
    for name, losses in x["memory_helps"].items():
        cells = [f"{losses[length]:.2f}" if length in losses else "" for length in lengths]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_sentence(x: Result) -> str:
    """What the language model's training gave."""
    sizes = "{n_layer} layers, d_model {d_model}, {n_head} heads x {d_head}, T = M = {segment}, batch {batch}"
    speed, loss = x["tokens_per_second"], x["last_loss"]
    return (
        f"Training a language model ({sizes.format(**x['config'])}) for {x['config']['steps']} steps on {x['text']} "
        f"in {x['dtype']}: "
        f"{speed['ours']:.0f} tokens/s, with the original's layer {speed['original']:.0f} "
        f"({x['ratio']['original']:.2f}x). The first losses differ by at most {x['first_losses_difference']:.0e}, "
        f"relative; the last ones are {loss['ours']:.4f} and {loss['original']:.4f} nats a byte on average, "
        f"the unigram entropy is {x['unigram_entropy']:.2f}."
    )


def sections(results: list[Result]) -> list[str]:
    """What there is of these, in order."""
    tables = {
        "kept_projections": kept_projections_table,
        "attention_length": evaluation_speed_table,
        "trained": training_speed_table,
    }
    found = {key: [x for x in results if key in x] for key in tables}
    parts = [tables[key](some) for key, some in found.items() if some]
    parts += [memory_table(x) for x in results if "memory_helps" in x]
    return parts + [training_sentence(x) for x in results if "text" in x]
