"""What a run says: a line of JSON for every event in log.jsonl, progress on stderr, and the curve as a picture."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

NAME = "log.jsonl"


def measure(loss: float, units: str) -> tuple[str, float]:
    """A loss in nats as the field gives it: bits per character or byte (bpc), or perplexity of words (ppl)."""
    return ("ppl", math.exp(min(loss, 700.0))) if units == "words" else ("bpc", loss / math.log(2))


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a log, NaN where a value was not finite; a last line that a kill cut off is left out."""
    lines = path.read_text().split("\n") if path.exists() else []
    events = (json.loads(line) for line in lines[:-1])
    return [{name: math.nan if value is None else value for name, value in event.items()} for event in events]


def _line(event: dict[str, Any]) -> str:
    """An event as JSON, which has no NaN and no infinity: there stands null."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in event.items()}) + "\n"


class Log:
    """Appends events to a file and shows them.

    Args:
        path: The file; None: none.
        steps: Of the whole run.
        after: Step of the checkpoint that the run goes on from; what the log has of later ones goes, as the test does.
        stream: Where to show, on a terminal progress in one line; None: nowhere.
    """

    def __init__(self, path: Path | None, steps: int, after: int = 0, stream: TextIO | None = None) -> None:
        self._steps, self._stream = steps, stream
        self._line, self._file = "", None
        if path is not None:
            events = [event for event in read(path) if event["step"] <= after and "test_loss" not in event]
            unfinished = path.with_name(path.name + ".unfinished")
            unfinished.write_text("".join(map(_line, events)))
            unfinished.replace(path)
            self._file = path.open("a")

    def progress(self, step: int, seconds_left: float, **values: float) -> None:
        """Training got here: loss, speed and so on."""
        self._write(step, values)
        done = step / self._steps
        bar = f"[{'#' * int(20 * done):20}] "
        left = timedelta(seconds=int(seconds_left))
        self._show(f"{step}/{self._steps} {bar}{_words(values)}, {left} left", stays=False)

    def event(self, step: int, **values: float) -> None:
        """Something that happened once, a validation say."""
        self._write(step, values)
        self._show(f"{step}/{self._steps} {_words(values)}")

    def say(self, message: str) -> None:
        """Shows a message."""
        self._show(message)

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(_line({"step": step} | values))
            self._file.flush()

    def _show(self, line: str, stays: bool = True) -> None:
        if self._stream is None:
            return
        try:
            if self._stream.isatty():
                if not stays:  # a longer one would not return to its beginning
                    line = line[: shutil.get_terminal_size().columns - 1]
                print(f"\r{line:{len(self._line)}}", end="\n" if stays else "", file=self._stream, flush=True)
                self._line = "" if stays else line
            else:
                print(line, file=self._stream, flush=True)
        except OSError:  # nobody reads any more, which is no reason to end a run
            self._stream = None


def _words(values: dict[str, float]) -> str:
    """Values for people, without losses in nats that stand there as bpc or perplexity."""
    names = {"tokens_per_second": "tokens/s"}
    told = {key: value for key, value in values.items() if not key.endswith("loss") or len(values) == 1}
    return ", ".join(f"{value:,.5g} {names.get(name, name.replace('_', ' '))}" for name, value in told.items())


def draw_curves(runs: Sequence[Path], picture: Path) -> None:
    """Draws training and validation of runs against the step, .svg or .png; the same log gives the same bytes.

    Raises:
        FileNotFoundError: A run has no log.
        ModuleNotFoundError: matplotlib is missing.
        ValueError: A log holds no validation.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plot: needs matplotlib (pip install matplotlib)") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "txl_kernels"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for n, run in enumerate(runs):
        events = read(run / NAME)
        if not events:
            raise FileNotFoundError(f"{run}: no {NAME} here")
        name = next((name for name in ("bpc", "ppl") if name in events[0]), "loss")
        for key, style in ((name, "-"), (f"valid_{name}", "o-")):
            points = [(event["step"], event[key]) for event in events if key in event]
            if points:
                label = f"{run.name}: {'validation' if key != name else 'training'}"
                line = {"alpha": 0.5, "linewidth": 1} if key == name else {"markersize": 3}
                axes.plot(*zip(*points, strict=True), style, color=f"C{n}", label=label, **line)
        axes.set_ylabel(name)
    axes.set_xlabel("step")
    if name == "ppl":
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)
    pyplot.close(figure)
