"""From the first step, or a checkpoint, to the result on the test text."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import checkpoint
from .evaluation import evaluate
from .log import Log, measure
from .training import Training


def train(training: Training, run: Path, log: Log) -> int | None:
    """Trains to the last step, then tests the best model; logs, validates and saves on the way.

    Validation and checkpoints follow the step that they are due at, so a run that goes on from a checkpoint does
    what it would have done.

    Args:
        training: New or restored.
        run: Folder of the checkpoints, shared by all machines.
        log: Of the first rank; the others' shows nothing.

    Returns:
        The signal (SIGTERM or SIGINT) that ended the run before, after a checkpoint; None at the end.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    c, ranks, units = training.configuration, training.ranks, training.corpus.vocabulary.units
    pace = _Pace()
    with _stop_requests() as received:
        while training.step < c.steps:
            pace.add(training.advance())
            step, last = training.step, training.step == c.steps
            if last or step % c.log_every == 0:
                loss = training.take_loss()
                name, value = measure(loss, units)
                values = {name: value, "loss": loss, "lr": training.learning_rate, "tokens_per_second": pace.rate()}
                log.progress(step, pace.seconds(c.steps - step), **values)
            if last or step % c.valid_every == 0:
                validate(training, run, log)
                pace.pause()
            stop = ranks.any(bool(received))
            if last or stop or step % c.save_every == 0:
                save(training, run)
                pace.pause()
            if stop:
                return next(iter(received), signal.SIGTERM)
    test(training, run, log)
    return None


def validate(training: Training, run: Path, log: Log) -> None:
    """Logs the loss on the validation text, and keeps the model if it is the best so far."""
    loss, _ = evaluate(training.model, training.corpus.splits["valid"], training.configuration, training.ranks)
    name, value = measure(loss, training.corpus.vocabulary.units)
    log.event(training.step, **{f"valid_{name}": value, "valid_loss": loss})
    if loss < training.best:
        training.best = loss
        if training.ranks.first:
            checkpoint.save(training.described_model(), run / "best.pt")


def test(training: Training, run: Path, log: Log) -> None:
    """Logs the loss of the best model on the test text."""
    training.ranks.wait()  # until best.pt is there
    training.model.load_state_dict(checkpoint.load(checkpoint.model_path(run))["model"])
    loss, _ = evaluate(training.model, training.corpus.splits["test"], training.configuration, training.ranks)
    name, value = measure(loss, training.corpus.vocabulary.units)
    log.event(training.step, **{f"test_{name}": value, "test_loss": loss})


def save(training: Training, run: Path) -> None:
    """Writes a checkpoint, then removes old ones."""
    state = training.state()
    if state is not None:
        checkpoint.save(state, checkpoint.step_path(run, training.step))
        checkpoint.remove_old(run)


class _Pace:
    """Tokens a second of training alone."""

    def __init__(self) -> None:
        self.pause()

    def pause(self) -> None:
        """Starts anew, after something that was not training."""
        self._start, self._tokens, self._steps = time.perf_counter(), 0, 0

    def add(self, tokens: int) -> None:
        self._tokens, self._steps = self._tokens + tokens, self._steps + 1

    def rate(self) -> float:
        return self._tokens / (time.perf_counter() - self._start)

    def seconds(self, steps: int) -> float:
        """What more steps will take."""
        return steps * (time.perf_counter() - self._start) / self._steps


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are put into instead of ending the process."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
