"""The tuner judges a candidate by its results: in the interpreter, since on a GPU a wrong check rules out every row."""

import pytest
import torch

from benchmarks import tune, tune_workspace


@pytest.mark.parametrize("name", [*tune.KERNELS, "backward"])
def test_right_results_pass_the_check(name):
    work = tune.Pass(name, 16, torch.device("cpu"), torch.float16, {"B": 2, "H": 2, "T": 20, "M": 13})
    work.check(work.run())


def test_workspaces_are_timed(capsys):
    tune_workspace.main(["--smoke"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[::2]] == list(tune_workspace.PROBLEMS)
    assert all(line.startswith("*   64  1024 ") for line in lines[1::2])
