"""A Transformer-XL language model (Dai et al. 2019, arXiv 1901.02860), from text to text.

python examples/language_model.py train RUN [--data TEXT]      trains, validates, saves to the folder RUN
python examples/language_model.py evaluate RUN                 loss on the test text
python examples/language_model.py generate RUN --prompt TEXT   more text
python examples/language_model.py plot RUN curve.svg           the curve
python examples/language_model.py export RUN FOLDER            the model as txl_kernels.models.load reads it

Each takes --help. Several GPUs or machines: torchrun --nproc-per-node 8 examples/language_model.py train RUN ...
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lm import checkpoint, log, loop
from lm.configurations import AMP, CONFIGURATIONS, FIELDS, Configuration
from lm.corpus import Corpus, load_corpus, read_text, read_vocabulary
from lm.evaluation import evaluate, evaluating
from lm.generation import generate
from lm.ranks import Ranks, started
from lm.training import Training
from lm.vocabulary import UNITS, Vocabulary

from txl_kernels.models import MemTransformerLM, save


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status: 2 after an error of the caller, 128 + n after signal n."""
    options = vars(_parser().parse_args(arguments))
    try:
        return options.pop("command")(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _train(options: dict[str, Any]) -> int:
    run: Path = options["run"]
    with started(options["device"]) as ranks:
        state = checkpoint.newest(run) if options["resume"] and checkpoint.step_paths(run) else None
        if state is None and (run / log.NAME).exists() and not options["resume"]:
            raise ValueError(f"{run}: expected a new folder, got one with a run; --resume goes on with it")
        configuration = _configuration(options, state)
        corpus = _corpus(options, state)
        training = Training(configuration, corpus, ranks, options["compile"])
        if state is not None:
            training.restore(state)
        if ranks.any(ranks.sum(torch.tensor(training.step)) != training.step * ranks.size):
            raise ValueError(f"{run}: expected the same checkpoint on every machine; is it on a shared disk?")
        run.mkdir(parents=True, exist_ok=True)
        progress = log.Log(
            run / log.NAME if ranks.first else None,
            configuration.steps,
            training.step,
            sys.stderr if ranks.first else None,
        )
        progress.say(_summary(training, resumed=state is not None))
        del state  # which is as large as model and optimizer
        number = loop.train(training, run, progress)
        if number is not None:
            progress.say(f"{signal.Signals(number).name}: saved after step {training.step}; --resume goes on")
        return 0 if number is None else 128 + number


def _configuration(options: dict[str, Any], state: dict[str, Any] | None) -> Configuration:
    """The named configuration, or that of the checkpoint, with the options given."""
    given = {name: options[name] for name in FIELDS if name in options}
    if state is None:
        return replace(CONFIGURATIONS[options["configuration"] or "small"], **given)
    if options["configuration"]:
        given = vars(CONFIGURATIONS[options["configuration"]]) | given
    return Configuration(**state["configuration"]).resumed_with(given)


def _corpus(options: dict[str, Any], saved: dict[str, Any] | None) -> Corpus:
    """The text that the options name, or that of the checkpoint, by default in the vocabulary of the checkpoint."""
    path, file, min_count = options["data"], options.get("vocabulary"), options.get("min_count")
    if saved is not None and path is None and saved["source"] is not None:
        path = Path(saved["source"])
    vocabulary = read_vocabulary(file) if file else None
    if saved is not None and file is None and min_count is None:
        vocabulary = Vocabulary(**saved["vocabulary"])
    return load_corpus(path, options.get("units"), vocabulary, min_count or 1)


def _summary(training: Training, resumed: bool) -> str:
    size = sum(parameter.numel() for parameter in training.model.parameters())
    corpus, ranks = training.corpus, training.ranks
    splits = ", ".join(f"{len(stream):,} {split}" for split, stream in corpus.splits.items())
    return (
        f"{corpus.source or 'the documentation of CPython'}: {splits}; {len(corpus.vocabulary):,} different "
        f"{corpus.vocabulary.units}\n{size:,} parameters on {ranks.size} x {ranks.device}"
        + (f", after step {training.step}" if resumed else "")
    )


def _evaluate(options: dict[str, Any]) -> int:
    with started(options["device"]) as ranks:
        model, configuration, saved = _load_model(options, ranks)
        corpus = _corpus(options, saved)
        start = time.perf_counter()
        loss, tokens = evaluate(model, corpus.splits[options["split"]], configuration, ranks)
        speed = tokens / (time.perf_counter() - start)
        name, value = log.measure(loss, corpus.vocabulary.units)
        if ranks.first:
            print(f"{options['split']}: {value:.4f} {name}, {loss:.4f} nats, {tokens:,} tokens, {speed:,.0f} tokens/s")
    return 0


def _generate(options: dict[str, Any]) -> int:
    with started(options["device"]) as ranks:
        model, configuration, saved = _load_model(options, ranks)
        vocabulary = Vocabulary(**saved["vocabulary"])
        file = options["prompt_file"]
        prompt = options["prompt"] if file is None else sys.stdin.read() if str(file) == "-" else read_text(file)
        start = vocabulary.encode(prompt)
        filters = {name: options[name] for name in ("temperature", "top_k", "top_p", "seed")}
        with evaluating(model, configuration):
            tokens = itertools.islice(generate(model, start, **filters), options["tokens"])
            try:
                for text in vocabulary.decode(itertools.chain(start.tolist() if prompt else [], tokens)):
                    print(text, end="", flush=True)
                print(flush=True)
            except BrokenPipeError:  # the reader of the text has had enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _load_model(options: dict[str, Any], ranks: Ranks) -> tuple[MemTransformerLM, Configuration, dict[str, Any]]:
    saved = checkpoint.load(checkpoint.model_path(options["run"]))
    given = {name: options[name] for name in FIELDS if name in options}
    configuration = replace(Configuration(**saved["configuration"]), **given)
    model = configuration.build(len(saved["vocabulary"]["symbols"]))
    model.load_state_dict(saved["model"])
    return model.to(ranks.device), configuration, saved


def _plot(options: dict[str, Any]) -> int:
    log.draw_curves(options["runs"], options["picture"])
    return 0


def _export(options: dict[str, Any]) -> int:
    with started("cpu") as ranks:
        model, _, saved = _load_model(options, ranks)
    save(model, options["folder"])
    (options["folder"] / "vocabulary.json").write_text(json.dumps(saved["vocabulary"]) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model", description="Trains a model on a text.")
    train.set_defaults(command=_train)
    train.add_argument("run", type=Path, metavar="RUN", help="folder of checkpoints and log")
    _add_text(train)
    train.add_argument(
        "--configuration",
        choices=CONFIGURATIONS,
        metavar="NAME",
        help=f"sizes and schedule: {', '.join(CONFIGURATIONS)}; default: small",
    )
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of RUN, if it has one")
    _add_device(train)
    train.add_argument("--compile", action="store_true", help="train through torch.compile")
    _add_fields(train, "model", "training", "evaluation")

    evaluation = commands.add_parser("evaluate", help="loss of a text", description="Loss of a text under a model.")
    evaluation.set_defaults(command=_evaluate)
    _add_model(evaluation)
    evaluation.add_argument("--data", type=Path, metavar="TEXT", help="as train takes it; default: that of RUN")
    evaluation.add_argument("--split", choices=("train", "valid", "test"), default="test", help="default: test")
    _add_fields(evaluation, "evaluation", "amp")

    generation = commands.add_parser("generate", help="write text", description="Text that a model writes.")
    generation.set_defaults(command=_generate)
    _add_model(generation)
    prompt = generation.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="what to go on from; default: a new line")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with it, - for standard input")
    generation.add_argument("--tokens", type=_count, metavar="N", default=500, help="how many to write; default: 500")
    generation.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token; default: 1")
    generation.add_argument("--top-k", type=int, default=0, help="of the k likeliest tokens only; default: of all")
    generation.add_argument("--top-p", type=float, default=1.0, help="of the likeliest that reach p together only")
    generation.add_argument("--seed", type=int, default=0, help="the same seed gives the same text; default: 0")
    _add_fields(generation, "evaluation")

    plot = commands.add_parser("plot", help="draw curves", description="Draws the curves of runs (needs matplotlib).")
    plot.set_defaults(command=_plot)
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder that train wrote")
    plot.add_argument("picture", type=Path, metavar="PICTURE", help=".svg or .png")

    export = commands.add_parser(
        "export",
        help="model for txl_kernels.models.load",
        description="Writes model.safetensors and config.json, which txl_kernels.models.load reads, and the symbols of "
        "the tokens as vocabulary.json (needs safetensors).",
    )
    export.set_defaults(command=_export)
    export.add_argument("run", type=Path, metavar="RUN", help="folder that train wrote, or a checkpoint in it")
    export.add_argument("folder", type=Path, metavar="FOLDER", help="where to; made if need be")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that train wrote, or a checkpoint in it")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU for each process if there is one")


def _add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "--data",
        type=Path,
        metavar="TEXT",
        help="a file or a folder, also of enwik8, text8 or WikiText-103; default: the documentation of CPython",
    )
    group.add_argument("--units", choices=UNITS, help="what a token is; default: what TEXT is known for, or bytes")
    group.add_argument("--vocabulary", type=Path, metavar="FILE", help="the words, one a line; implies words")
    group.add_argument("--min-count", type=_count, metavar="N", help="rarer words of the training text become <unk>")


def _add_fields(parser: argparse.ArgumentParser, *groups: str) -> None:
    """Options for the fields of `Configuration` that are in a group, or have its name; absent where not given."""
    for name in groups:
        group = parser.add_argument_group(name if name not in FIELDS else "precision")
        for field in FIELDS.values():
            if name in (field.name, field.metadata["group"]):
                option, kind = f"--{field.name.replace('_', '-')}", _KINDS[str(field.type)]
                group.add_argument(option, default=argparse.SUPPRESS, help=field.metadata["help"], **kind)


def _cutoffs(text: str) -> tuple[int, ...]:
    cutoffs = [cutoff for cutoff in text.split(",") if cutoff]
    if not all(map(str.isdecimal, cutoffs)):
        raise argparse.ArgumentTypeError(f"expected integers like 20000,40000, got {text}")
    return tuple(map(int, cutoffs))


_KINDS: dict[str, dict[str, Any]] = {
    "int": {"type": int, "metavar": "N"},
    "float": {"type": float, "metavar": "X"},
    "bool": {"action": argparse.BooleanOptionalAction},
    "str": {"choices": AMP},
    "tuple[int, ...]": {"type": _cutoffs, "metavar": "N,N,..."},
}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return int(text)


if __name__ == "__main__":
    status = main()
    if "LOCAL_RANK" in os.environ:
        # All is written and closed. The threads of a gloo group, ended along with the interpreter, abort now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)
