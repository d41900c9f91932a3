"""The example's training step, schedule, configurations, evaluation and progress, against plain definitions."""

import copy
import json
import math

import pytest
import torch
from lm.configurations import CONFIGURATIONS
from lm.corpus import load_corpus
from lm.evaluation import evaluate
from lm.log import Log, draw_curves, read
from lm.ranks import Ranks
from lm.training import Training, scheduled_rate

from tests.example_tools import TEXT

CPU = Ranks(torch.device("cpu"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(TEXT[:4000])
    return load_corpus(path)


# The step


def test_schedule():
    c = CONFIGURATIONS["small"].resumed_with({"steps": 110, "warmup": 10, "lr": 2.0, "min_lr": 1.0})
    assert [scheduled_rate(step, c) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert [scheduled_rate(step, c) for step in (10, 60, 110)] == pytest.approx([2.0, 1.5, 1.0])
    assert scheduled_rate(35, c) == pytest.approx(1.5 + math.sqrt(0.125))
    rates = [scheduled_rate(step, c) for step in range(10, 110)]
    assert rates == sorted(rates, reverse=True)


def test_a_step_is_what_the_original_does(corpus):
    """Adam on the clipped gradient of the mean loss, with the memory of the segment before, empty at the start."""
    options = {"n_layer": 2, "d_model": 12, "tgt_len": 8, "mem_len": 9, "batch": 4, "dropout": 0.0, "clip": 0.01}
    training = Training(_tiny(**options), corpus, CPU)
    model = _tiny(**options).build(256)
    model.load_state_dict(training.model.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    stream, mems = corpus.splits["train"].long(), []
    length = len(stream) // 4
    columns = stream[: 4 * length].view(4, length).t()
    segments = -(-(length - 1) // 8)
    for step in range(segments + 3):
        mems = mems if step % segments else []
        start = 8 * (step % segments)
        target = columns[start + 1 : start + 9]
        loss, *mems = model(columns[start : start + len(target)], target, *mems)
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.param_groups[0]["lr"] = scheduled_rate(step, training.configuration)
        optimizer.step()
        assert training.advance() == 4 * len(target)
        assert training.take_loss() == pytest.approx(loss.mean().item(), rel=1e-5)
    for got, wanted in zip(training.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def _tiny(**options):
    c = CONFIGURATIONS["small"]
    return type(c)(**(vars(c) | {"n_head": 2, "d_head": 5, "d_inner": 17, "steps": 5000} | options))


def test_weight_decay_spares_biases(corpus):
    training = Training(_tiny(batch=4, weight_decay=0.5), corpus, CPU)
    decayed, spared = (group["params"] for group in training._optimizer.param_groups)
    names = {id(x): name for name, x in training.model.named_parameters()}
    assert {id(x) for x in decayed + spared} == set(names)
    assert all("bias" in names[id(x)] or "norm" in names[id(x)] for x in spared)
    assert not any("bias" in names[id(x)] or "norm" in names[id(x)] for x in decayed)


def test_a_state_is_the_whole_of_a_run(corpus):
    """In the middle of a text and of an interval of the log, with dropout: the same losses, best included."""
    one, other = (Training(_tiny(batch=4, tgt_len=8, accumulate=2), corpus, CPU) for _ in range(2))
    for _ in range(5):
        one.advance()
    one.best = 1.5
    state = copy.deepcopy(one.state())
    wanted = [one.advance() and one.take_loss() for _ in range(3)]
    other.restore(state)
    assert (other.step, other.best) == (5, 1.5)
    assert [other.advance() and other.take_loss() for _ in range(3)] == wanted


def test_a_step_to_nowhere_is_not_saved(corpus):
    """Its own loss was finite: such a checkpoint would take the place of one that a lower --lr can go on from."""
    training = Training(_tiny(batch=4, tgt_len=8), corpus, CPU)
    training.advance()
    training.model.layers[0].dec_attn.o_net.weight.data[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="parameters: not finite after step 1; lower --lr"):
        training.state()


# Configurations


@pytest.mark.parametrize(
    ("name", "n_token", "millions"),
    [
        ("enwik8-base", 204, 41),
        ("enwik8-large", 204, 277),
        ("text8-base", 27, 41),
        ("text8-large", 27, 277),
        ("wt103-base", 267_735, 151),
    ],
)
def test_the_originals_configurations_have_the_published_size(name, n_token, millions):
    """Dai et al. 2019, tables 1 to 3; the size of its large models of words is not that of its PyTorch code."""
    with torch.device("meta"):
        model = CONFIGURATIONS[name].build(n_token)
    assert sum(x.numel() for x in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


# Evaluation and progress


@pytest.mark.parametrize("options", [{}, {"attn_type": 1}, {"attn_type": 2}, {"eval_same_length": False}])
def test_evaluation_by_forward(corpus, options):
    """Token by token in each stream, with forward and its memory: the same mean."""
    c = _tiny(eval_batch=3, eval_tgt_len=7, eval_mem_len=11, eval_clamp_len=9, **options)
    stream = corpus.splits["valid"][:200]
    torch.manual_seed(0)
    model = c.build(256)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    loss, tokens = evaluate(model, stream, c, CPU)
    assert tokens == 3 * 65
    assert model.training
    assert (model.tgt_len, model.mem_len, model.clamp_len, model.same_length) == (128, 128, -1, False)
    model.eval().reset_length(7, 0, 11)
    model.clamp_len, model.same_length = 9, c.eval_same_length
    total = 0.0
    for row in stream[:198].view(3, 66).long():
        mems = []
        for i in range(0, 65, 7):
            target = row[i + 1 : i + 8, None]
            losses, *mems = model(row[i : i + len(target), None], target, *mems)
            total += losses.sum().item()
    assert loss == pytest.approx(total / tokens, rel=1e-5)


class Terminal(list):
    """A stream that says that it is a terminal."""

    write = list.append

    def isatty(self):
        return True

    def flush(self):
        pass


def test_a_progress_line_is_cut_to_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    Log(None, steps=10, stream=terminal).progress(5, seconds_left=59.9, bpc=2.5, loss=1.7, lr=0.001)
    assert "".join(terminal) == "\r5/10 [##########          ] 2.5 bpc, 0."


def test_a_log_is_json_whatever_the_values(tmp_path):
    """NaN and infinity are not JSON; what goes on from a log keeps what it says, and pictures show a gap."""

    def refuse(constant):
        raise ValueError(constant)

    path = tmp_path / "run" / "log.jsonl"
    path.parent.mkdir()
    Log(path, steps=10).progress(1, seconds_left=1.0, bpc=2.5, loss=1.7)
    Log(path, steps=10, after=1).event(2, valid_bpc=math.nan, valid_loss=math.inf)
    Log(path, steps=10, after=2).event(3, valid_bpc=2.25, valid_loss=1.5)
    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert lines[1] == {"step": 2, "valid_bpc": None, "valid_loss": None}
    events = read(path)
    assert math.isnan(events[1]["valid_bpc"])
    assert [events[0], events[2]] == [lines[0], lines[2]]
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    draw_curves([path.parent], tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").stat().st_size


def test_a_reader_that_is_gone_does_not_end_the_run():
    class Gone(Terminal):
        def write(self, text):
            raise BrokenPipeError

    log = Log(None, steps=10, stream=Gone())
    log.progress(5, seconds_left=1.0, bpc=2.5)
    log.event(6, valid_bpc=2.25)


def test_progress_is_one_line_on_a_terminal():
    terminal = Terminal()
    log = Log(None, steps=10, stream=terminal)
    log.progress(5, seconds_left=3661.0, bpc=2.5, tokens_per_second=12345.6)
    log.progress(6, seconds_left=1.0, bpc=2)
    log.event(6, valid_bpc=2.25)
    long, short, event = "".join(terminal).split("\r")[1:]
    assert long == "5/10 [##########          ] 2.5 bpc, 12,346 tokens/s, 1:01:01 left"
    assert short.startswith("6/10 [############        ] 2 bpc, 0:00:01 left")
    assert len(short) == len(long)  # nothing of the longer line stays
    assert event.strip() == "6/10 2.25 valid bpc"
    assert event.endswith("\n")
