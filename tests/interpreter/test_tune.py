"""The tuner judges a candidate by its results: in the interpreter, since on a GPU a wrong check rules out every row."""

import pytest
import torch

from benchmarks import tune


@pytest.mark.parametrize("name", tune.KERNELS)
def test_right_results_pass_the_check(name):
    work = tune.Pass(name, 16, torch.device("cpu"), torch.float16, {"B": 2, "H": 2, "T": 20, "M": 13})
    work.check(work.run())
