"""What `patch` leaves alone and says so, what it refuses, and what it does not touch."""

import subprocess
import sys

import pytest
from torch import nn

import txl_kernels
from tests.patching.toy import (
    REPLACEMENT,
    Overrides,
    Renamed,
    SelfAttention,
    fused,
    is_fused,
)
from txl_kernels import PatchError, patching
from txl_kernels.patching import Replacement, table

pytestmark = pytest.mark.usefixtures("registered")


def _hooked() -> nn.Module:
    module = SelfAttention()
    module.forward = module.forward  # as accelerate's hooks do
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Overrides, "Overrides overrides forward of SelfAttention"),
        (lambda: SelfAttention(window=1), "a window"),
        (_hooked, "forward of this instance was replaced"),
    ],
)
def test_left_alone(model, x, make, reason):
    left = make()
    both = nn.Sequential(model, left)
    for target in (both, left):
        with pytest.raises(PatchError, match=reason):
            txl_kernels.patch(target, strict=True)
        assert not is_fused(model, x), "strict changed something before it raised"
    report = txl_kernels.patch(both)
    assert [entry.name for entry in report.left_alone] == ["1"]
    assert reason in report.left_alone[0].reason
    assert is_fused(model, x)
    assert "txl_kernels" not in str(left)


def test_changed_signature():
    patching.register(Renamed, REPLACEMENT)
    report = txl_kernels.patch(Renamed())
    assert report.left_alone[0].reason == "forward: expected the parameters (x, weights), got (states, weights)"
    assert txl_kernels.patch(Renamed).left_alone


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        (("0.1", "999"), None),
        (("", ""), None),
        (("999", ""), "torch: expected a version from 999, got "),
        (("", "1.2"), "torch: expected a version below 1.2, got "),
        (("0.1", "1"), "torch: expected a version from 0.1 and below 1, got "),
    ],
)
def test_unknown_version(monkeypatch, versions, reason):
    class Attention(SelfAttention):
        pass

    Attention.__qualname__ = "Attention"
    monkeypatch.setattr(table, "_registered", {})
    family = table.Family("toy", ("Attention",), "torch", versions)
    monkeypatch.setattr(table, "FAMILIES", {__name__: family})
    own = Replacement("forward", fused, ("x", "weights"))
    monkeypatch.setattr(table, "_load", lambda family: type("file", (), {"REPLACEMENTS": {"Attention": own}}))
    report = txl_kernels.patch(Attention())
    if reason is None:
        assert report.patched == ("",)
    else:
        assert report.left_alone[0].reason.startswith(reason)


def test_a_model_without_known_attention():
    report = txl_kernels.patch(nn.Linear(2, 2))
    assert report.entries == report.patched == ()
    assert "no known attention; looked for" in str(report)
    assert "ParakeetEncoderAttention" in str(report)
    with pytest.raises(PatchError, match=r"no known attention; looked for .*SelfAttention"):
        txl_kernels.patch(nn.Linear(2, 2), strict=True)


@pytest.mark.parametrize("function", [txl_kernels.patch, txl_kernels.unpatch])
@pytest.mark.parametrize(("model", "got"), [(3, "int"), (None, "NoneType"), (int, "int"), ("encoder", "str")])
def test_not_a_model(function, model, got):
    with pytest.raises(TypeError, match=f"model: expected a torch.nn.Module or a class of modules, got {got}"):
        function(model)


def test_register_refuses():
    with pytest.raises(TypeError, match="cls: expected a class"):
        patching.register(SelfAttention(), REPLACEMENT)
    with pytest.raises(TypeError, match="replacement: expected a Replacement, got function"):
        patching.register(SelfAttention, fused)
    with pytest.raises(ValueError, match="replacement: expected a method of SelfAttention, got 'attend'"):
        patching.register(SelfAttention, REPLACEMENT._replace(method="attend"))


def test_no_package_of_a_family_is_imported():
    program = (
        "import sys, torch, txl_kernels; txl_kernels.patch(torch.nn.Linear(1, 1)); packages = "
        "{'transformers', 'nemo', 'espnet', 'espnet2', 'speechbrain', 'fairseq', 'ding', 'ray'}; "
        "sys.exit(str(packages & set(sys.modules)) if packages & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
