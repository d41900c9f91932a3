"""`make gpu`: its parts, which go on where the time was up, and the tuner."""

import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the tuner is of Triton's kernels")

from benchmarks import gpu, tune


@pytest.fixture
def gpu_parts(monkeypatch, tmp_path):
    """Runs benchmarks.gpu with arguments; every part passes, but for those in `outcomes`. Returns what was done."""

    def run(*arguments, **outcomes):
        done = []

        def run_part(name, arguments, seconds, beside=False):
            assert beside == name.startswith("tests")
            done.append(name)
            passed = outcomes.get(name.replace("-", "_"), True)
            if passed:
                (tmp_path / f"{name}.done").touch()
            return passed

        monkeypatch.setattr(gpu, "run_part", run_part)
        monkeypatch.setattr(gpu, "save", lambda results: done.append("saved"))
        monkeypatch.setattr("sys.argv", ["gpu", *arguments])
        try:
            gpu.main()
        except SystemExit as stopped:
            done.append(stopped.code)
        return done

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "STATE", tmp_path)
    return run


def test_gpu_parts_go_on_where_time_was_up(gpu_parts, capsys):
    """Finished parts are not run again; results are saved before the tuner, which comes last."""
    tests, benchmarks = ([name for name, _ in parts()] for parts in (gpu.test_parts, gpu.benchmark_parts))
    first = gpu_parts(benchmark_wt103_large=None)
    assert sorted(first[: len(tests)]) == sorted(tests)
    place = benchmarks.index("benchmark-wt103_large")
    assert first[len(tests) :] == [*benchmarks[: place + 1], "saved", tune.UNFINISHED]
    assert gpu_parts(tune=None) == [*benchmarks[place:], "saved", "tune", tune.UNFINISHED]
    assert gpu_parts() == ["saved", "tune", "workspace"]
    assert capsys.readouterr().out.endswith("all parts are done\n")


def test_gpu_parts_can_be_chosen_and_a_failure_stops_no_other(gpu_parts):
    done = gpu_parts("--only", "tests-layer", "benchmark-square_512", "tune", tests_layer_others=False)
    assert done == ["tests-layer-others", "benchmark-square_512", "saved", "tune", "failed: tests-layer-others"]


def test_gpu_parts_hold_every_test_once():
    """No test has two of the names that divide its file, and no file is left out."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/gpu", "-m", "gpu and not long"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for file, test in re.findall(r"^tests/gpu/test_(\w+)\.py::(.*)$", listing, re.MULTILINE):
        chosen = [name for name in gpu.TESTS[file] if name in test]
        assert len(chosen) <= 1, test
        found.setdefault(file, set()).update(chosen or ["others"])
    assert found == {file: {*names, "others"} for file, names in gpu.TESTS.items()}


WITHOUT_TRANSFORMERS = """
import sys, pytest
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_what_is_not_installed_is_skipped_not_failed():
    """An empty part must pass, or the session ends with an error on machines without the packages of others."""
    (arguments,) = (x for name, x in gpu.benchmark_parts() if name == "benchmark-longest_audio")
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, *arguments, "-rs", "--device=cpu", "--smoke"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert "transformers is not installed" in run.stdout


def test_tuner_times_a_shortlist_and_goes_on_behind_a_candidate_that_hung(monkeypatch, tmp_path, capsys):
    timed, state = [], tmp_path / "tune.jsonl"
    todo = tune.jobs(["dq"], [64], "sm_90", (2,))[:4]

    def measured(work, row, stopwatch, device):
        timed.append(row)
        if row == todo[1].row:
            raise KeyboardInterrupt
        return {"ms": float(len(timed))}

    def sweep():
        return tune.measured_sweep(torch.device("cpu"), todo, 1.0, state, True, lambda group: group[:3])

    monkeypatch.setattr(tune, "Pass", lambda *args: None)
    monkeypatch.setattr(tune, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        sweep()
    assert sweep()
    assert timed == [job.row for job in todo[:3]]
    assert f'"dq": {{64: Launch{tuple(todo[0].row)}}},' in capsys.readouterr().out
