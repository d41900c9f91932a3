"""The original's numbers, checkpoints and first parameters."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.tools import ADAPTIVE, LENGTHS
from txl_kernels.models import MemTransformerLM

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "original_lm.npz")
CASES = sorted({key.split("/")[0] for key in GOLDEN.files if "/" in key})


def golden(case, dtype=torch.float64):
    """The model of a golden case, and its numbers."""
    numbers = {
        key.removeprefix(f"{case}/"): torch.from_numpy(GOLDEN[key])
        for key in GOLDEN.files
        if key.startswith(f"{case}/") and GOLDEN[key].dtype.kind in "if"
    }
    model = MemTransformerLM(**json.loads(str(GOLDEN[f"{case}/cfg"]))).to(dtype)
    model.load_state_dict({k.removeprefix("param/"): x for k, x in numbers.items() if k.startswith("param/")})
    return model, numbers


def by_cluster(losses, target, model):
    """Losses as the original returns them: those of the first cluster first."""
    cutoffs = torch.tensor(model.crit.cutoff_ends[1:-1], dtype=torch.int64)
    order = torch.bucketize(target.flatten(), cutoffs, right=True).argsort(stable=True)
    return losses.flatten()[order].view_as(losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_the_original(case, dtype):
    model, numbers = golden(case, dtype)
    # the golden scores went through float32 to be masked
    allowed = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}

    def assert_golden(name, got):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), numbers[name], **allowed, msg=lambda text: f"{name}: {text}")

    mems, total = [], 0
    for n in range(3):
        data, target = numbers[f"in/data{n}"], numbers[f"in/target{n}"]
        assert_golden(f"out/hidden{n}", model._forward(data, mems or model.init_mems())[0])
        losses, *mems = model(data, target, *mems)
        losses = by_cluster(losses, target, model)
        assert_golden(f"out/nll{n}", losses)
        for i, memory in enumerate(mems):
            assert_golden(f"out/mems{n}.{i}", memory)
        total = total + (losses * numbers[f"gout/nll{n}"]).sum()
    total.backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {k.removeprefix("gparam/") for k in numbers if k.startswith("gparam/")}
    for name, parameter in parameters.items():
        assert_golden(f"gparam/{name}", parameter.grad)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_are_the_original_s(case):
    prefix = f"{case}/param/"
    shapes = {k.removeprefix(prefix): GOLDEN[k].shape for k in GOLDEN.files if k.startswith(prefix)}
    state = golden(case)[0].state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == shapes
    assert list(state) == list(shapes)  # optimizer states count the parameters in this order


def test_parameters_are_drawn_as_the_training_script_does():
    torch.manual_seed(0)
    sizes = {"n_token": 400, "n_layer": 2, "n_head": 8, "d_model": 64, "d_head": 16, "d_inner": 64}
    for attn_type in (0, 1):
        model = MemTransformerLM(
            **sizes | LENGTHS | ADAPTIVE, dropout=0.0, dropatt=0.0, attn_type=attn_type, tie_weight=False
        )
        for name, x in model.named_parameters():
            mean, std = float("layer_norm.weight" in name), 0.01 if "projs" in name else 0.02
            if name.endswith(".bias") or name in ("r_bias", "crit.cluster_bias"):
                assert not x.any(), name
            else:
                assert abs(x.mean().item() - mean) < 5 * std / x.numel() ** 0.5, name
                assert x.std().item() == pytest.approx(std, rel=5 / x.numel() ** 0.5), name


def test_importing_the_package_does_not_import_the_models():
    program = "import sys, txl_kernels; sys.exit('txl_kernels.models' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
