"""Runs of the example: killed, stopped, damaged, in parts and processes, evaluated, drawn, and refused."""

import math
import os
import signal
import subprocess
import time
from pathlib import Path

import lm.checkpoint
import lm.log
import pytest
import torch

from tests.example_tools import SLOW_PROGRAM, TEXT, TINY, program, start
from txl_kernels.models import MemTransformerLM

DROPOUT = [*TINY, "--dropout", "0.2", "--dropatt", "0.1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """A run that nothing interrupted, with dropout."""
    run = tmp_path_factory.mktemp("straight")
    assert program("train", run, "--data", text, *DROPOUT) == 0
    return run


def curve(run):
    """Everything in the log but the speed."""
    return [{k: v for k, v in event.items() if k != "tokens_per_second"} for event in lm.log.read(run / "log.jsonl")]


def losses(run):
    return torch.tensor([event.get("loss", event.get("valid_loss", event.get("test_loss"))) for event in curve(run)])


def last_model(run):
    return lm.checkpoint.newest(run)["model"]


def saved_step(run):
    return max((int(path.stem.removeprefix("step-")) for path in lm.checkpoint.step_paths(run)), default=0)


def assert_same_run(run, other):
    assert curve(run) == curve(other)
    for name, x in last_model(run).items():
        assert torch.equal(x, last_model(other)[name]), name


def wait_for(condition, process, seconds=60):
    """Polls quickly; a process that ends or takes forever is a failure."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


# Killed, stopped, damaged


def test_a_run(straight):
    """The log has what was asked for, at the steps asked for, and the model learns."""
    events = curve(straight)
    assert [event["step"] for event in events if "loss" in event] == [5, 10, 15, 20, 24]
    assert [event["step"] for event in events if "valid_loss" in event] == [8, 16, 24]
    assert [event["step"] for event in events if "test_loss" in event] == [24]
    assert events[-1]["test_bpc"] == pytest.approx(events[-1]["test_loss"] / math.log(2))
    assert events[-1]["test_loss"] < 0.8 * math.log(256)
    assert sorted(path.name for path in straight.iterdir()) == [
        *("best.pt", "log.jsonl", "step-00000018.pt", "step-00000024.pt")
    ]


def test_kill_and_resume_bit_by_bit(text, straight, tmp_path):
    """kill -9, wherever that hits after a checkpoint; --resume alone knows the rest."""
    process = start("train", tmp_path, "--data", text, *DROPOUT, file=SLOW_PROGRAM)
    wait_for(lambda: saved_step(tmp_path) >= 12, process)
    process.kill()
    process.wait()
    (tmp_path / "step-00000099.pt.unfinished").write_bytes(b"half a checkp")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 23, "loss": 1e9}\n{"step": 24, "lo')
    assert 12 <= saved_step(tmp_path) < 24
    assert program("train", tmp_path, "--resume", "--device", "cpu") == 0
    assert_same_run(tmp_path, straight)
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(text, straight, tmp_path, number):
    process = start("train", tmp_path, "--data", text, *DROPOUT, "--save-every", "1000", file=SLOW_PROGRAM)
    wait_for(lambda: lm.log.read(tmp_path / "log.jsonl"), process)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    (path,) = lm.checkpoint.step_paths(tmp_path)
    assert 5 <= lm.checkpoint.load(path)["step"] < 24
    assert program("train", tmp_path, "--resume", "--save-every", "6", "--device", "cpu") == 0
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path, monkeypatch, failing):
    """What fails between the first byte and the move leaves the one before as it was."""
    path = tmp_path / "step-00000001.pt"
    lm.checkpoint.save({"configuration": 1}, path)

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(OSError, match="disk full"):
            lm.checkpoint.save({"configuration": 2}, path)
    assert lm.checkpoint.load(path) == {"configuration": 1}
    lm.checkpoint.remove_old(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def cut_off(part):
    return lambda whole: whole[: int(part * len(whole))]


def with_a_flipped_bit(whole):
    """In a tensor, where only a checksum tells."""
    place = len(whole) // 2
    return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


DAMAGES = {"empty": cut_off(0), "header": cut_off(1e-3), "half": cut_off(0.5), "end": cut_off(0.999)}


@pytest.mark.parametrize("damage", [*DAMAGES.values(), with_a_flipped_bit], ids=[*DAMAGES, "flipped bit"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_works(text, straight, tmp_path, capsys, damage):
    for path in straight.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    newest = lm.checkpoint.step_paths(tmp_path)[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    assert program("train", tmp_path, "--resume", "--device", "cpu") == 2
    message = capsys.readouterr().err
    assert "step-00000024.pt: expected a checkpoint, got a file that is cut off or damaged (" in message
    assert "()" not in message
    assert "remove it to continue from step-00000018.pt" in message
    newest.unlink()
    assert program("train", tmp_path, "--resume", "--device", "cpu") == 0
    assert_same_run(tmp_path, straight)


class Hostile:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    torch.save({"configuration": Hostile()}, tmp_path / "best.pt")
    assert program("evaluate", tmp_path) == 2
    output = capsys.readouterr()
    assert "expected a checkpoint" in output.err
    assert "this ran" not in output.out


def test_a_finished_run_only_tests_again(straight, tmp_path, capsys):
    before = curve(straight)
    assert program("train", straight, "--resume", "--device", "cpu") == 0
    assert curve(straight) == before


# Parts of the batch, processes


@pytest.fixture(scope="module")
def one_process(text, tmp_path_factory):
    """A run without dropout, in one process and one part."""
    run = tmp_path_factory.mktemp("one")
    assert program("train", run, "--data", text, *TINY, "--dropout", "0", "--log-every", "1") == 0
    return run


def assert_close_runs(run, other):
    """Sums in another order, and no more: what Adam makes of it after 24 steps."""
    assert [event["step"] for event in curve(run)] == [event["step"] for event in curve(other)]
    torch.testing.assert_close(losses(run), losses(other), rtol=1e-4, atol=0)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_are_the_whole_batch(text, one_process, tmp_path, parts):
    options = ["--dropout", "0", "--log-every", "1", "--accumulate", parts]
    assert program("train", tmp_path, "--data", text, *TINY, *options) == 0
    assert_close_runs(tmp_path, one_process)


TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_two_processes_are_one(text, one_process, tmp_path):
    """torchrun with gloo; a signal to one process stops both; one process ends what two began."""
    options = ["--dropout", "0", "--log-every", "1", "--accumulate", "2"]
    process = start(
        *("train", tmp_path, "--data", text, *TINY, *options),
        **{"launcher": TWO, "file": SLOW_PROGRAM, "stderr": subprocess.DEVNULL},
    )
    wait_for(lambda: saved_step(tmp_path) >= 6, process)
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[1]
    os.kill(int(child), signal.SIGTERM)
    assert process.wait(120)
    state = lm.checkpoint.newest(tmp_path)
    assert state["step"] < 24
    first, second = state["generators"]
    assert not torch.equal(first, second)  # what the ranks drop differs
    assert start("train", tmp_path, "--resume", launcher=TWO).wait(120) == 0
    assert_close_runs(tmp_path, one_process)
    lm.checkpoint.step_path(tmp_path, 24).unlink()
    assert program("train", tmp_path, "--resume", "--accumulate", "1", "--device", "cpu") == 0
    assert_close_runs(tmp_path, one_process)


# Options


def test_compiled(text, one_process, tmp_path, monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(MemTransformerLM, "compile", lambda model: torch.nn.Module.compile(model, backend=backend))
    torch.compiler.reset()
    options = ["--dropout", "0", "--log-every", "1", "--compile"]
    assert program("train", tmp_path, "--data", text, *TINY, *options) == 0
    assert graphs
    assert_close_runs(tmp_path, one_process)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(text, tmp_path, one_process, amp):
    assert program("train", tmp_path, "--data", text, *TINY, "--dropout", "0", "--log-every", "1", "--amp", amp) == 0
    assert not torch.equal(losses(tmp_path), losses(one_process))
    torch.testing.assert_close(losses(tmp_path), losses(one_process), rtol=0.02, atol=0)
    assert ("scale" in lm.checkpoint.newest(tmp_path)["scaler"]) == (amp == "fp16")


def test_weight_decay_may_change_on_the_way(straight, tmp_path):
    for path in straight.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lm.checkpoint.step_paths(tmp_path)[-1].unlink()
    assert program("train", tmp_path, "--resume", "--weight-decay", "0.5", "--device", "cpu") == 0
    groups = lm.checkpoint.newest(tmp_path)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]


def test_precision_may_change_on_the_way(one_process, tmp_path):
    for path in one_process.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for amp in ("fp16", "bf16"):  # from nothing to fp16, from there to bf16
        lm.checkpoint.step_paths(tmp_path)[-1].unlink()
        assert program("train", tmp_path, "--resume", "--amp", amp, "--save-every", "1", "--device", "cpu") == 0
        assert curve(tmp_path)[-1]["step"] == 24


@pytest.mark.parametrize("options", [["--attn-type", "1"], ["--attn-type", "2"], ["--attn-type", "3", "--d-head", "6"]])
def test_other_attention(text, tmp_path, options):
    assert program("train", tmp_path, "--data", text, *TINY, *options) == 0
    assert losses(tmp_path)[-1] < 0.8 * math.log(256)


def test_a_loss_that_is_not_finite_ends_the_run(text, tmp_path, capsys):
    assert program("train", tmp_path, "--data", text, *TINY, "--lr", "1e30", "--clip", "1e30") == 2
    assert "loss: not finite by step" in capsys.readouterr().err
    for path in lm.checkpoint.step_paths(tmp_path):
        assert all(x.isfinite().all() for x in lm.checkpoint.load(path)["model"].values())


# What is made of a run


def test_evaluate_repeats_the_test_of_the_run(straight, capsys):
    assert program("evaluate", straight, "--device", "cpu") == 0
    line = capsys.readouterr().out
    assert line.startswith(f"test: {curve(straight)[-1]['test_bpc']:.4f} bpc, ")
    assert program("evaluate", straight / "step-00000018.pt", "--split", "valid", "--eval-mem-len", "3") == 0
    assert capsys.readouterr().out.startswith("valid: ")


def test_the_best_model_of_a_run_is_read(tmp_path):
    """By validation; before the first one, or where it was removed, the newest."""
    for name in ("step-00000006.pt", "step-00000012.pt", "best.pt"):
        (tmp_path / name).touch()
    assert lm.checkpoint.model_path(tmp_path) == tmp_path / "best.pt"
    (tmp_path / "best.pt").unlink()
    assert lm.checkpoint.model_path(tmp_path) == tmp_path / "step-00000012.pt"


def test_curves_are_drawn(straight, one_process, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert program("plot", straight, one_process, tmp_path / "a.svg") == 0
    assert program("plot", straight, one_process, tmp_path / "b.svg") == 0
    picture = (tmp_path / "a.svg").read_bytes()
    assert picture == (tmp_path / "b.svg").read_bytes()
    assert picture.count(b"<path") > 10
    assert program("plot", tmp_path, tmp_path / "c.svg") == 2
    assert "no log.jsonl here" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert program("plot", straight, tmp_path / "c.svg") == 2
    assert "plot: needs matplotlib" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--batch", "5", "--accumulate", "2"],
            r"--batch: expected a multiple of 2 (processes times --accumulate), got 5",
        ),
        (["--batch", "9000"], "text: expected at least 2 tokens for each of 9000 streams"),
        (["--eval-batch", "900"], "text: expected at least 2 tokens for each of 900 streams"),
        (["--eval-mem-len", "0"], "--eval-mem-len: expected >= 1, got 0"),
        (["--warmup", "24"], "--warmup: expected 0 to steps - 1 = 23, got 24"),
        (["--dropout", "1"], "--dropout: expected 0 <= p < 1, got 1.0"),
        (["--lr", "1e-3", "--min-lr", "1"], "--lr: expected >= min_lr >= 0, here 1.0, got 0.001"),
        (["--n-layer", "0"], "n_layer: expected an int >= 1, got 0"),
        (["--steps", "0"], "--steps: expected >= 1, got 0"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--vocabulary", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(text, tmp_path, capsys, options, message):
    run = tmp_path / "run"
    assert program("train", run, "--data", text, *TINY, *options) == 2
    assert message in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train", "run", "--cutoffs", "9,x"], "--cutoffs: expected integers like 20000,40000, got 9,x"),
        (["train", "run", "--min-count", "0"], "--min-count: expected an integer >= 1, got 0"),
        (["generate", "run", "--tokens", "all"], "--tokens: expected an integer >= 1, got all"),
    ],
)
def test_what_is_no_number_is_named(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        program(*options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected a new folder, got one with a run; --resume goes on with it"),
        (["--resume", "--batch", "8"], "--batch: the run was started with 4, got 8; to change it, start a new run"),
        (["--resume", "--configuration", "wt103-base"], "the run was started with 2, got 16"),
        (["--resume", "--data", "OTHER"], "--data: expected the text that the run was started with, got another"),
        (["--resume", "--units", "words"], "--units: expected bytes as the vocabulary, got words"),
        (
            ["--resume", "--min-count", "2", "--units", "words"],
            "--data: expected the text that the run was started with",
        ),
    ],
)
def test_what_a_run_can_not_change_is_named(straight, text, tmp_path, capsys, options, message):
    (tmp_path / "other").write_text(TEXT.upper())
    before = {path: path.read_bytes() for path in straight.iterdir()}
    options = [tmp_path / "other" if option == "OTHER" else option for option in options]
    assert program("train", straight, *options) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in straight.iterdir()} == before


def test_missing_runs_are_named(tmp_path, capsys):
    assert program("evaluate", tmp_path) == 2
    assert "no checkpoint (best.pt, step-*.pt) here" in capsys.readouterr().err
    assert program("generate", tmp_path / "none") == 2
    assert "none: not there" in capsys.readouterr().err
    torch.save({"model": {}}, tmp_path / "best.pt")
    assert program("evaluate", tmp_path) == 2
    assert "expected a checkpoint of this program" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program("train")
