"""The benchmarks' machinery: what they count, compare, refuse and print."""

import itertools
import json
from collections import Counter

import pytest
import torch

from benchmarks import language_model, machine, report
from benchmarks.language_model import Config, LanguageModel, Training
from benchmarks.measure import CLOCK, Comparison, peak_memory, rounds_within, truth_and_reference_by_head
from benchmarks.shapes import SHAPES, TRAINED, Shape, shape_for
from reference.layer import RelPartialLearnableMultiHeadAttn
from tests.accuracy import make_inputs, truth_and_reference

CPU = torch.device("cpu")
MACHINE = {
    "device": "Chip",
    "kind": "cpu",
    "threads": 2,
    "torch": "2.13",
    "triton": "3.7",
    "python": "3.11",
    "commit": "abc",
}


class FakeBenchmark:
    """pytest-benchmark's pedantic mode, as far as Comparison uses it."""

    def pedantic(self, target, setup, rounds, teardown):
        for _ in range(rounds):
            if setup is not None:
                setup()
            target()
            if teardown is not None:
                teardown()


def saved_results(path, **changes):
    """A file as pytest-benchmark writes it: a shape for which the reference was too large, and one with all sides."""
    alone = {
        "shape": "long_4096",
        "pass": "forward + backward",
        "sizes": {"B": 4, "H": 8, "T": 150, "M": 151, "D": 64},
        "dtype": "float32",
        "seconds": {"ours": 0.002},
        "ratio": {},
        "tflop_per_second": {"ours": 0.5},
        "peak_bytes": {"ours": 1 << 20},
        "out_of_memory": ["original", "batch-major"],
        "smoke": False,
        "machine": MACHINE,
    }
    compared = alone | {
        "shape": "wt103_base",
        "pass": "forward",
        "seconds": {"ours": 0.002, "original": 0.007, "batch-major": 0.004},
        "ratio": {"original": 3.25, "batch-major": 1.75},
        "peak_bytes": {"ours": 1 << 20, "original": 12 << 20, "batch-major": 11 << 20},
        "out_of_memory": [],
    }
    stats = {"min": 1, "median": 2, "max": 3, "iqr": 1, "rounds": 5, "data": [1, 2, 3]}
    benchmarks = [
        {"name": f"test[{info['shape']}]", "stats": stats, "extra_info": info | changes} for info in (alone, compared)
    ]
    path.write_text(json.dumps({"machine_info": {"node": "x"}, "benchmarks": benchmarks}))
    return path


@pytest.mark.parametrize(("T", "M"), [(1, 0), (1, 6), (5, 0), (4, 7)])
def test_flop_is_counted_pair_by_pair(T, M):
    pairs = sum(i + M - j >= 0 for i in range(T) for j in range(M + T))
    shape = Shape(B=2, H=3, T=T, M=M, D=5)
    assert shape.flop(backward=False) == 6 * 2 * 3 * 5 * pairs
    assert shape.flop(backward=True) == (6 + 16) * 2 * 3 * 5 * pairs


def test_shapes_by_device_and_mode():
    for name, full in SHAPES.items():
        assert shape_for(name, torch.device("cuda"), smoke=False) == full
        on_cpu, smoke = shape_for(name, CPU, smoke=False), shape_for(name, CPU, smoke=True)
        assert (on_cpu.T, on_cpu.M, on_cpu.D) == (full.T, full.M, full.D)
        assert on_cpu.B * on_cpu.H <= full.B * full.H
        assert smoke.T * (smoke.T + smoke.M) <= 33 * 73
    assert "wt103_large" in TRAINED
    assert "eval_128_1600" not in TRAINED


def test_sides_alternate_and_the_ratio_is_the_median_of_pairs():
    calls, seconds = [], {"ours": iter([1.0, 2.0, 5.0]), "a": iter([4.0, 6.0, 5.0]), "b": iter([1.0, 1.0, 1.0])}

    def stopwatch(function):
        calls.append(function())
        return next(seconds[calls[-1]])

    comparison = Comparison({"ours": lambda: "ours", "a": lambda: "a", "b": lambda: "b"}, stopwatch)
    before = CLOCK.now()
    comparison.run(FakeBenchmark(), rounds=3, after_round=lambda: calls.append("|"))
    assert [sorted(round.split()) for round in " ".join(calls).split("|")] == [["a", "b", "ours"]] * 3 + [[]]
    assert CLOCK.now() - before == 8.0  # what pytest-benchmark sees: ours
    assert comparison.results() == {
        "seconds": {"ours": 2.0, "a": 5.0, "b": 1.0},
        "ratio": {"a": 3.0, "b": 0.5},  # of 4, 3, 1; the ratio of the medians would be 2.5
    }


def test_every_side_follows_every_other_as_often():
    calls = []

    def stopwatch(function):
        calls.append(function())
        return 1.0

    rounds = 3000
    Comparison({name: lambda name=name: name for name in ("ours", "a", "b")}, stopwatch).run(FakeBenchmark(), rounds)
    followed = Counter(itertools.pairwise(calls))
    assert len(followed) == 9
    for (first, second), count in followed.items():  # itself where a round ends and the next begins
        assert count == pytest.approx(rounds / 9 if first == second else 4 * rounds / 9, rel=0.2)


def test_rounds_fit_the_time():
    assert [rounds_within(5.0, per_round) for per_round in (10.0, 0.1, 1e-6)] == [3, 50, 200]


def test_peak_memory_is_the_running_peak_beyond_what_was_held():
    held = [torch.empty(3 << 20)]

    def allocate():
        held.clear()  # freeing what came before counts for nothing
        first = torch.empty(1 << 20)
        del first
        second, third = torch.empty(1 << 20), torch.empty(1 << 19)
        del second, third
        torch.empty(1 << 18)

    assert peak_memory(allocate, CPU) == 4 * ((1 << 20) + (1 << 19))


def test_truth_by_head_is_the_truth():
    inputs = make_inputs(2, 3, 5, 4, 8)
    dout = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    for got, wanted in zip(truth_and_reference_by_head(inputs, dout), truth_and_reference(inputs, dout), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "GPU_FILES", (str(tmp_path / "nvidia0"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_a_machine_without_gpu_measures_the_cpu(no_gpu):
    assert machine.choose_device() == CPU


def test_a_gpu_file_that_torch_does_not_see_is_refused(no_gpu):
    (no_gpu / "nvidia0").touch()
    with pytest.raises(RuntimeError, match=r"has a GPU \(.*nvidia0\) but torch .* does not see it"):
        machine.choose_device()
    assert machine.choose_device("cpu") == CPU


@pytest.mark.parametrize("listed", ["GPU 0: NVIDIA H200", "No devices were found"])
def test_a_gpu_that_nvidia_smi_lists_is_refused(no_gpu, listed):
    program = no_gpu / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{listed}'\n")
    program.chmod(0o755)
    if listed.startswith("GPU"):
        with pytest.raises(RuntimeError, match="GPU 0: NVIDIA H200"):
            machine.choose_device()
    else:
        assert machine.choose_device() == CPU


def test_report_writes_table_figure_and_a_small_copy(tmp_path):
    readme, figure, saved = tmp_path / "README.md", tmp_path / "new" / "cpu.svg", tmp_path / "kept" / "run.json"
    readme.write_text("before\n<!-- benchmark:cpu begin -->\nold\n<!-- benchmark:cpu end -->\nafter\n")
    raw = saved_results(tmp_path / "raw.json")
    report.main([str(raw), "--readme", str(readme), "--figure", str(figure), "--save", str(saved)])

    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmark:cpu begin -->\nMeasured on Chip, 2 threads; torch 2.13")
    assert text.endswith("<!-- benchmark:cpu end -->\nafter\n")
    assert "old" not in text
    assert "commit abc" in text
    assert "](new/cpu.svg)" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| wt103_base | 4, 8 x 64, 150 + 151 | forward | 2 | 7 | 4 | 3.25x | 1.75x | 1 | 12 | 0.5 |",
        "| long_4096 | 4, 8 x 64, 150 + 151 | forward + backward | 2 | out of memory | out of memory |  |  | 1 |  "
        "| 0.5 |",
    ]
    assert figure.read_text().count("3.2x") == 1
    assert "data" not in json.loads(saved.read_text())["benchmarks"][0]["stats"]

    report.main([str(saved), "--readme", str(readme), "--figure", str(figure)])
    assert readme.read_text() == text  # the copy says the same


def test_report_tells_what_hidden_keys_save():
    result = {
        "hidden_keys": "half_lengths", "pass": "forward", "sizes": {"B": 4, "H": 8, "T": 1024, "M": 0, "D": 64},
        "dtype": "float32", "seconds": {"ours": 0.05, "all keys": 0.1}, "ratio": {"all keys": 1.99}, "smoke": False,
        "machine": MACHINE,
    }  # fmt: skip
    assert "| half_lengths | 4, 8 x 64, 1024 | forward | 50 | 100 | 1.99x |" in report.markdown([result])


def test_report_refuses_what_means_nothing(tmp_path):
    good, smoke = saved_results(tmp_path / "a.json"), saved_results(tmp_path / "b.json", smoke=True)
    with pytest.raises(ValueError, match="smoke run"):
        report.load([good, smoke])
    other = saved_results(tmp_path / "c.json", machine=MACHINE | {"commit": "def"})
    with pytest.raises(ValueError, match=r"different runs: .*commit abc; .*commit def"):
        report.load([good, other])
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:cpu end --><!-- benchmark:cpu begin -->")
    with pytest.raises(ValueError, match="needs <!-- benchmark:cpu begin -->"):
        report.replace_section(readme, "cpu", "text")


def test_training_sentence_is_generated():
    result = {
        "text": "t.txt",
        "config": vars(Config()),
        "dtype": "float32",
        "tokens_per_second": {"ours": 2000.4, "original": 1000.0},
        "ratio": {"original": 2.0},
        "first_losses_difference": 2e-7,
        "last_loss": {"ours": 1.5, "original": 1.5001},
        "unigram_entropy": 3.26,
        "machine": MACHINE,
    }
    text = report.markdown([result])
    assert "2000 tokens/s, with the original's layer 1000 (2.00x)" in text
    assert "1.5000 and 1.5001 nats" in text


def test_report_compares_bfloat16():
    result = {
        "bfloat16": "square_1024", "pass": "forward", "sizes": {"B": 2, "H": 8, "T": 1024, "M": 1024, "D": 64},
        "seconds": {"ours": 0.02, "float32": 0.05, "original": 0.12}, "ratio": {"float32": 2.5, "original": 6.0},
        "machine": MACHINE, "smoke": False,
    }  # fmt: skip
    assert "| square_1024 | 2, 8 x 64, 1024 + 1024 | forward | 20 | 50 | 120 | 2.50x | 6.00x |" in report.markdown(
        [result]
    )


def test_report_tells_what_kept_projections_save():
    result = {
        "kept_projections": "segment", "sizes": {"B": 1, "H": 16, "D": 64, "C": 1024, "M": 1600, "T": 128},
        "seconds": {"ours": 0.02, "projected again": 0.07, "original": 0.1},
        "ratio": {"projected again": 3.5, "original": 5.0}, "machine": MACHINE, "smoke": False,
    }  # fmt: skip
    assert "| segment | 1, 16 x 64, 128 + 1600 | 20 | 70 | 100 | 3.50x | 5.00x |" in report.markdown([result])


def test_report_tells_how_fast_models_evaluate_and_train():
    sizes = {"n_layer": 4, "n_head": 4, "d_model": 256, "d_head": 64, "d_inner": 1024, "T": 128}
    common = {"dtype": "float32", "machine": MACHINE, "smoke": False}
    evaluations = [
        common | {
            "attention_length": length, "published": 363, "sizes": sizes | {"batch": 1},
            "seconds": {"ours": 0.0256, "projected again": 0.128, "vanilla": 0.1},
            "ratio": {"projected again": 5.0, "vanilla": 500.4},
        } for length in (1800, 800)
    ]  # fmt: skip
    training = common | {
        "trained": "wt103_base", "n_token": 1000, "sizes": sizes | {"batch": 8},
        "seconds": {"ours": 1.0, "original": 2.0}, "ratio": {"original": 2.0},
        "tokens_per_second": {"ours": 1024.0, "original": 512.0},
    }  # fmt: skip
    text = report.markdown([*evaluations, training])
    assert text.index("| 800 | 0.2 | 1 | 100 | 500x | 363x |") < text.index("| 1800 | 0.2 | 1 | 100 | 500x | 363x |")
    assert "batch 1, ours 128 tokens at a time" in text
    assert "d_inner 1024 | 128, 8 | 1024 | 512 | 2.00x |" in text


def test_report_tells_that_memory_helps():
    losses = {"trained with memory": {"0": 2.9, "12": 2.06}, "same_length": {"12": 1.5}}
    result = {"memory_helps": losses, "period": 24, "segment": 16, "memory": 12, "clamp_len": 27, "machine": MACHINE}
    text = report.markdown([result])
    assert "| | 0 | 12 |\n|---|--:|--:|\n| trained with memory | 2.90 | 2.06 |\n| same_length |  | 1.50 |" in text


def test_report_compares_models_and_their_attention():
    step = {
        "length": "T = 750", "dtype": "float32", "machine": MACHINE, "smoke": False,
        "seconds": {"ours": 0.02, "own": 0.05}, "ratio": {"own": 2.4}, "peak_bytes": {"ours": 1 << 20, "own": 3 << 20},
    }  # fmt: skip
    model = step | {"family": "NeMo", "step": "training step"}
    modules = [step | {"attention_of": "NeMo", "step": name} for name in ("training step", "forward")]
    text = report.markdown([*modules, model])
    assert "| NeMo | T = 750 |  |  |  |  |  | 50 | 20 | 2.40x | 3 | 1 |" in text
    assert "| NeMo | T = 750 | 50 | 20 | 2.40x | 3 | 1 | 50 | 20 | 2.40x | 3 | 1 |" in text
    assert text.index("| model | shape |") < text.index("| attention of | shape |")


def test_text_comes_from_cpython_or_a_file(monkeypatch, tmp_path):
    monkeypatch.delenv(language_model.TEXT_VARIABLE, raising=False)
    name, text = language_model.load_text(100_000)
    assert name == "pydoc_data.topics"
    assert b"The ``assert`` statement" in text or b'The "assert" statement' in text

    file = tmp_path / "book.txt"
    monkeypatch.setenv(language_model.TEXT_VARIABLE, str(file))
    with pytest.raises(FileNotFoundError, match=r"TXL_BENCH_TEXT=.*book\.txt: no such file"):
        language_model.load_text(3)
    for content in ("", "ab"):
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"book\.txt: {len(content)} bytes, needs at least 3"):
            language_model.load_text(3)
    file.write_text("abc")
    assert language_model.load_text(3) == ("book.txt", b"abc")


def test_unigram_entropy():
    assert language_model.unigram_entropy(b"abab") == pytest.approx(0.6931471805599453)
    assert language_model.unigram_entropy(b"aaaa") == 0


def test_memory_carries_the_segment_before():
    config = Config(n_layer=2, d_model=16, n_head=2, d_head=8, d_inner=16, segment=6, batch=2)
    torch.manual_seed(0)
    model = LanguageModel(config, RelPartialLearnableMultiHeadAttn, passes_mask=True)
    for parameter in model.parameters():
        parameter.data *= 10  # initial weights are too small for attention to matter
    tokens = torch.randint(256, (13, 2))
    _, mems = model(tokens[:6], tokens[1:7], None)
    with_memory, _ = model(tokens[6:12], tokens[7:13], mems)
    without, _ = model(tokens[6:12], tokens[7:13], None)
    in_one, _ = model(tokens[:12], tokens[1:13], None)
    first, _ = model(tokens[:6], tokens[1:7], None)
    assert not torch.allclose(with_memory, without)
    torch.testing.assert_close((first + with_memory) / 2, in_one)


def test_training_starts_over_without_memory_when_the_text_ends():
    config = Config(n_layer=1, d_model=16, n_head=2, d_head=8, d_inner=16, segment=6, batch=2, learning_rate=0.0)
    torch.manual_seed(0)
    training = Training(
        LanguageModel(config, RelPartialLearnableMultiHeadAttn, passes_mask=True), bytes(range(26)), config
    )
    training.run(4)
    assert training.losses[:2] == training.losses[2:]
    assert training.losses[0] != training.losses[1]
    assert language_model.minimum_bytes(config) == 26
