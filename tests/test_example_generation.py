"""The example's generation: what is drawn from, what is drawn, and how it comes out."""

import itertools
import json
import os
import subprocess

import pytest
import torch
from lm.generation import distribution, generate
from lm.vocabulary import Vocabulary

from tests.example_tools import TEXT, TINY, program, start
from txl_kernels.models import MemTransformerLM, load

# What is drawn from

P = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_k": 5}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_k": 99}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.64}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.66}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ({"top_p": 0.999}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # of the three, 0.47 and 0.29
        ({"top_k": 3, "top_p": 0.45}, [0, 1, 0, 0, 0]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-310}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5}, (P**2 / (P**2).sum()).tolist()),
        ({"temperature": 0.5, "top_p": 0.55}, [0, 1, 0, 0, 0]),  # the first has 0.57 now
    ],
)
def test_distribution(options, wanted):
    got = distribution(P.log(), **options)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))
    assert (got > 0).tolist() == [p > 0 for p in wanted]


def test_equal_probabilities_keep_the_first():
    log_probs = torch.zeros(6).log_softmax(0)
    assert distribution(log_probs, top_k=2).tolist() == [0.5, 0.5, 0, 0, 0, 0]
    assert distribution(log_probs, temperature=0).argmax() == 0
    assert distribution(torch.zeros(2), top_p=0.5).tolist() == [1, 0]  # one reaches it


# What is drawn


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MemTransformerLM(
        29, 2, 2, 12, 5, 17, 0.1, 0.1, tgt_len=5, mem_len=7, ext_len=0, cutoffs=[8, 19], same_length=True
    )
    for name, parameter in model.named_parameters():  # so that what was read decides what is written
        if "layer_norm" not in name and not name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def log_probs_by_forward(model, tokens):
    """Of every token as the next one, by the training forward, one token at a time with its memory."""
    mems, n = [], model.n_token
    with torch.no_grad():
        for token in tokens:
            data = torch.full((1, n), token)
            losses, *mems = model(data, torch.arange(n)[None], *mems)
    return -losses[0]


@pytest.mark.parametrize("length", [1, 3, 5, 6, 23])
def test_greedy_is_the_argmax_of_forward(model, length):
    """Prompts shorter and longer than a segment, and than memory."""
    prompt = torch.arange(length) * 5 % 29
    tokens, text = generate(model, prompt, temperature=0), prompt.tolist()
    for _ in range(12):
        text.append(next(tokens))
        assert text[-1] == log_probs_by_forward(model, text[:-1]).argmax()


def test_draws_follow_the_distribution(model):
    """500 seeds, one draw each; bounds of 5 standard deviations."""
    prompt = torch.tensor([3, 1, 4])
    wanted = distribution(log_probs_by_forward(model, prompt.tolist()), 2.0, 12, 0.9)
    draws = torch.tensor(
        [next(generate(model, prompt, temperature=2.0, top_k=12, top_p=0.9, seed=s)) for s in range(500)]
    )
    share = draws.bincount(minlength=29) / 500
    assert ((share - wanted).abs() <= 5 * (wanted * (1 - wanted) / 500).sqrt()).all()
    assert share[wanted == 0].sum() == 0
    assert (wanted > 0).sum() > 3


def draw(model, seed, n=30):
    tokens = generate(model, torch.tensor([1]), seed=seed)
    return [next(tokens) for _ in range(n)]


def test_the_seed_decides(model):
    first = draw(model, 1)
    torch.manual_seed(5)  # PyTorch's own generator has no say, and isn't touched
    state = torch.get_rng_state()
    assert draw(model, 1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(model, 2) != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature: expected >= 0, got -1\.0"),
        ({"top_k": -1}, r"top_k: expected >= 0, 0 for all, got -1"),
        ({"top_p": 0.0}, r"top_p: expected 0 < p <= 1, got 0\.0"),
        ({"top_p": 1.1}, r"top_p: expected 0 < p <= 1, got 1\.1"),
    ],
)
def test_bad_filters_are_named_at_once(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, torch.tensor([1]), **options)


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    (folder / "text").write_text(TEXT)
    assert program("train", folder / "run", "--data", folder / "text", *TINY) == 0
    return folder / "run"


def test_prompts_come_from_where_they_are_told(run, tmp_path, capsys):
    (tmp_path / "prompt").write_text("3 times é")
    options = ["generate", run, "--device", "cpu", "--tokens", "40", "--seed", "3"]
    assert program(*options, "--prompt", "3 times é") == 0
    text = capsys.readouterr().out
    assert text.startswith("3 times é")
    assert len(text.encode()) >= len("3 times é".encode()) + 40
    assert program(*options, "--prompt-file", tmp_path / "prompt") == 0
    assert capsys.readouterr().out == text
    process = start(*options, "--prompt-file", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.communicate("3 times é")[0] == text
    assert program(*options) == 0
    assert len(capsys.readouterr().out) > 10


def test_text_comes_as_it_is_made(run):
    """The first bytes are there long before the last; a reader that goes away is no error."""
    options = ["--tokens", "1000000", "--device", "cpu", "--prompt", "x"]
    process = start("generate", run, *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert 0 < len(os.read(process.stdout.fileno(), 1 << 20)) < 4096  # less than a pipe is given at once otherwise
    assert process.poll() is None
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


MIN_COUNT = {"characters": [], "words": ["--min-count", "2"]}


@pytest.mark.parametrize("units", MIN_COUNT)
def test_other_units(tmp_path, units, capsys):
    (tmp_path / "text").write_text(TEXT)
    assert (
        program("train", tmp_path / "run", "--data", tmp_path / "text", "--units", units, *MIN_COUNT[units], *TINY) == 0
    )
    capsys.readouterr()
    assert program("generate", tmp_path / "run", "--prompt", "3 times 4", "--tokens", "10") == 0
    text = capsys.readouterr().out
    if units == "words":
        words = text.replace("\n", " <eos> ").split()[:-1]  # the last line break is the program's
        assert words[:3] == ["3", "times", "4"] or words[0] == "<unk>"
        assert len(words) == 13
    else:
        assert len(text) == len("3 times 4") + 10 + 1
        assert program("generate", tmp_path / "run", "--prompt", "\x07", "--tokens", "10") == 2
        assert r"character '\x07': not among the" in capsys.readouterr().err
    assert program("evaluate", tmp_path / "run") == 0
    assert ("ppl" if units == "words" else "bpc") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "0"], "top_p: expected 0 < p <= 1, got 0.0"),
        (["--prompt-file", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_named(run, capsys, options, message):
    assert program("generate", run, *options) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert not output.out


def test_a_model_without_cache_is_named(tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    assert program("train", tmp_path / "run", "--data", tmp_path / "text", *TINY, "--attn-type", "2") == 0
    assert program("generate", tmp_path / "run") == 2
    assert "attn_type: expected 0 or 1" in capsys.readouterr().err


def test_bytes_that_are_no_text(run, capsys):
    """Any byte may come; what comes out is text all the same."""
    assert program("generate", run, "--tokens", "200", "--temperature", "100", "--device", "cpu") == 0
    assert "�" in capsys.readouterr().out


def test_an_exported_model_is_the_one_that_was_trained(run, tmp_path, capsys):
    """Loaded by the library alone, with the vocabulary beside it, it writes what the program writes."""
    assert program("export", run, tmp_path / "model") == 0
    model = load(tmp_path / "model")
    model.reset_length(16, 0, 11)
    model.clamp_len, model.same_length = 13, True
    vocabulary = Vocabulary(**json.loads((tmp_path / "model" / "vocabulary.json").read_text()))
    start = vocabulary.encode("7 times")
    tokens = itertools.islice(generate(model, start, seed=3), 40)
    written = "".join(vocabulary.decode([*start.tolist(), *tokens]))
    capsys.readouterr()
    assert program("generate", run, "--prompt", "7 times", "--tokens", "40", "--seed", "3") == 0
    assert capsys.readouterr().out == written + "\n"
