"""The original Transformer-XL code before and after `patch`.

It is not a package: in its place stand the eager layers of `reference.layer`, of the same class names, parameters and
signatures, and the numbers that the code itself gave (tests/golden).
"""

import pytest
import torch
from torch import nn

import reference.layer
import txl_kernels
from tests.accuracy import assert_close_to_truth
from tests.checkpoint_tools import CASES as LM_CASES
from tests.checkpoint_tools import GOLDEN as LM_GOLDEN
from tests.checkpoint_tools import assert_golden as assert_golden_lm
from tests.checkpoint_tools import golden_arguments, golden_state
from tests.layer_tools import (
    GOLDEN_CASES,
    CountOps,
    D,
    H,
    assert_golden,
    golden,
    make_inputs,
    make_layer,
    original_mask,
    run,
    same_length_mask,
)
from tests.patching.tools import (
    assert_alike,
    assert_own_method,
    assert_same_dropout,
    assert_same_when_patched,
    copied,
    largest_tensor,
)
from txl_kernels.models import MemTransformerLM

LAYERS = [reference.layer.RelPartialLearnableMultiHeadAttn, reference.layer.RelLearnableMultiHeadAttn]
T, M, B = 7, 5, 3


@pytest.fixture(params=LAYERS, ids=["projected", "learned"])
def layer(request) -> nn.Module:
    return make_layer(request.param, torch.float64)


def inputs_of(layer: nn.Module, T: int = T, M: int = M, dtype=torch.float64) -> dict[str, torch.Tensor]:
    learned = isinstance(layer, reference.layer.RelLearnableMultiHeadAttn)
    inputs = {k: x.detach() for k, x in make_inputs(T, M, B, dtype, learned=M + T - 2 if learned else None).items()}
    return inputs if M else {k: x for k, x in inputs.items() if k != "mems"}


def masks(T: int, M: int) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    of_a_batch = torch.rand(T, M + T, B, generator=generator) < 0.4
    of_a_batch[torch.arange(T), M + torch.arange(T)] = False  # every query sees itself
    return {
        "causal": original_mask(T, M),
        "causal_uint8": original_mask(T, M, torch.uint8),
        "same_length": same_length_mask(T, M, T),
        "causal and more": original_mask(T, M) | of_a_batch,
        "future": of_a_batch,
        "keys": (torch.arange(M + T)[:, None] % 5 == torch.arange(B)),
        "none": None,
    }


@pytest.mark.parametrize("kind", masks(T, M))
@pytest.mark.parametrize("memory", [M, 0])
def test_masks(layer, kind, memory):
    mask = masks(T, memory)[kind]
    assert_same_when_patched(layer, lambda layer, **inputs: layer(**inputs, attn_mask=mask), inputs_of(layer, M=memory))


def test_memory_of_the_first_segment(layer):
    """The original's model starts from tensors without any axis but one of length 0, and so does NVIDIA's."""
    mask, mems = original_mask(T, 0), torch.empty(0, dtype=torch.float64)
    inputs = inputs_of(layer, M=0)
    assert_same_when_patched(layer, lambda layer, **inputs: layer(**inputs, attn_mask=mask, mems=mems), inputs)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_original_s_numbers(case):
    layer, inputs, numbers = golden(case, reference.layer)
    txl_kernels.patch(layer, strict=True)
    assert_golden(run(layer, inputs, numbers["gout/output"], numbers["in/attn_mask"].bool()), numbers)


class OriginalLM(MemTransformerLM):
    """A language model whose layers are those of `reference.layer`, and which hands them masks as the original does."""

    def __init__(self, case: str) -> None:
        super().__init__(**golden_arguments(case) | {"dropout": 0.0, "dropatt": 0.0})
        self.double().load_state_dict(golden_state(case))
        for layer in self.layers:
            layer.dec_attn.__class__ = getattr(reference.layer, type(layer.dec_attn).__name__)

    def _forward(self, dec_inp, mems=None):
        T, M = dec_inp.shape[0], mems[0].shape[0]
        mask = same_length_mask(T, M, self.mem_len) if self.same_length else original_mask(T, M)
        hids = [self.word_emb(dec_inp)]
        for layer, positions, memory in zip(self.layers, self._positions(M + T, None), mems, strict=False):
            states = layer.dec_attn(hids[-1], *positions, attn_mask=mask, mems=memory)
            hids.append(layer.pos_ff(states))
        return hids[-1], self._update_mems(hids, mems)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("case", LM_CASES)
def test_the_original_s_losses_memory_and_gradients_over_three_segments(case, patched):
    model = OriginalLM(case)
    if patched:
        assert txl_kernels.patch(model, strict=True).patched == ("layers.0.dec_attn", "layers.1.dec_attn")
    assert_golden_lm(model.eval(), case)
    names = [name for name in LM_GOLDEN.files if name.startswith(f"{case}/gparam/")]
    wanted = {name.split("/")[2]: torch.from_numpy(LM_GOLDEN[name]) for name in names}
    mems, losses = [], []
    for n in range(3):
        data, target = (torch.from_numpy(LM_GOLDEN[f"{case}/in/{name}{n}"]) for name in ("data", "target"))
        segment, *mems = model(data, target, *mems)
        clusters = torch.bucketize(target.flatten(), torch.tensor(model.config["cutoffs"]).long(), right=True)
        losses.append(segment.flatten()[clusters.argsort(stable=True)])  # in the original's order
    cotangents = [torch.from_numpy(LM_GOLDEN[f"{case}/gout/nll{n}"]).flatten() for n in range(3)]
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(losses, [parameters[name] for name in wanted], cotangents)
    for (name, x), got in zip(wanted.items(), gradients, strict=True):
        assert_alike(name, got, x, 3e-6)  # the golden scores went through float32 to be masked


@pytest.mark.parametrize("memory", [M, 0])
@pytest.mark.parametrize("kind", ["causal", "same_length", "same_length_by_one", "of a batch", "future"])
def test_masks_of_nvidia_s_version(kind, memory):
    """(T, S) or (B, T, S), here taken by a layer with nothing else changed."""
    masks_here = masks(T, memory) | {"same_length_by_one": same_length_mask(T, memory, T + 1)}
    mask = masks_here["causal and more" if kind == "of a batch" else kind]
    mask = mask[..., 0] if mask.shape[2] == 1 else mask.permute(2, 0, 1).contiguous()

    class RelPartialLearnableMultiHeadAttn(reference.layer.RelPartialLearnableMultiHeadAttn):
        __qualname__ = "RelPartialLearnableMultiHeadAttn"

        def forward(self, w, r, r_w_bias, r_r_bias, attn_mask=None, mems=None):
            hidden = attn_mask[:, :, None] if attn_mask.ndim == 2 else attn_mask.permute(1, 2, 0)
            return super().forward(w, r, r_w_bias, r_r_bias, hidden, mems)

    layer = make_layer(RelPartialLearnableMultiHeadAttn, torch.float64)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(None))
    assert_same_when_patched(layer, lambda layer, **inputs: layer(**inputs, attn_mask=mask), inputs_of(layer, M=memory))
    assert len(calls) == 2


def test_a_mask_whose_axes_can_t_be_told_goes_to_the_layer_itself(layer):
    """As many sequences as queries and keys: (S, B), or NVIDIA's (T, S)?"""
    inputs, mask = inputs_of(layer, B, 0), torch.eye(B, dtype=torch.bool).roll(1, 0)
    assert_own_method(layer, lambda layer: layer(**inputs, attn_mask=mask), "a mask whose axes")


def test_layer_norm_in_front():
    layer = make_layer(LAYERS[0], torch.float64, pre_lnorm=True)
    assert_same_when_patched(
        layer, lambda layer, **inputs: layer(**inputs, attn_mask=original_mask(T, M)), inputs_of(layer)
    )


def test_queries_without_a_key_are_not_NaN(layer):  # noqa: N802
    """The original's are."""
    mask = original_mask(T, M)
    mask[2] = True
    out = copied(layer)(**inputs_of(layer), attn_mask=mask)
    wanted = layer(**inputs_of(layer), attn_mask=mask)
    assert wanted[2].isnan().all()
    assert out[2].isfinite().all()
    seen = torch.arange(T) != 2
    assert_alike("states", out[seen], wanted[seen], 1e-9)


def test_autocast(layer):
    layer, inputs = layer.float(), inputs_of(layer, dtype=torch.float32)
    truth = layer(**inputs, attn_mask=original_mask(T, M))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = layer(**inputs, attn_mask=original_mask(T, M))
        got = copied(layer)(**inputs, attn_mask=original_mask(T, M))
    assert got.dtype == wanted.dtype
    assert_close_to_truth("states", got.bfloat16(), truth, wanted.bfloat16(), 2)


def test_dropout():
    layer = make_layer(LAYERS[0], dropatt=0.3).train()
    inputs = inputs_of(layer, dtype=torch.float32)
    assert_same_dropout(layer, lambda layer: layer(**inputs, attn_mask=original_mask(T, M)))


class Adapter(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.register_forward_hook(lambda net, args, out: out + 1),
        lambda net: setattr(net, "__class__", Adapter),
    ],
    ids=["hook", "class"],
)
def test_an_adapter_on_the_projection_sees_the_memory(layer, change):
    mask = original_mask(T, M)
    change(layer.qkv_net)
    assert_same_when_patched(layer, lambda layer, **inputs: layer(**inputs, attn_mask=mask), inputs_of(layer))


def test_a_class_is_patched_before_its_models_are_made():
    cls, mask = LAYERS[0], original_mask(T, M)
    forward = cls.forward
    before = make_layer(cls, torch.float64)
    wanted = before(**inputs_of(before), attn_mask=mask)
    report = txl_kernels.patch(cls, strict=True)
    try:
        assert [entry.action for entry in report.entries] == ["patched"]
        after = make_layer(cls, torch.float64)
        calls = []
        after.o_net.register_forward_hook(lambda *_: calls.append(txl_kernels))
        for layer in (before, after):
            with CountOps() as ops:
                got = layer(**inputs_of(layer), attn_mask=mask)
            assert ops.calls["rel_attention_with_weights"] == 1
            assert_alike("states", got, wanted, 1e-9)
    finally:
        txl_kernels.unpatch(cls)
    assert cls.forward is forward


def test_a_fork_of_another_signature_is_left_alone():
    class RelPartialLearnableMultiHeadAttn(LAYERS[0]):
        __qualname__ = "RelPartialLearnableMultiHeadAttn"

        def forward(self, w, r, gate, attn_mask=None, mems=None):
            raise NotImplementedError

    report = txl_kernels.patch(make_layer(RelPartialLearnableMultiHeadAttn))
    assert not report.patched
    assert "got (w, r, gate, attn_mask, mems)" in report.left_alone[0].reason


@pytest.mark.parametrize("name", ["dropatt", "r_net"])
def test_a_fork_without_an_attribute_is_left_alone(name):
    layer = make_layer(LAYERS[0])
    delattr(layer, name)
    assert f"none named {name}" in txl_kernels.patch(layer).left_alone[0].reason


def test_layers_of_this_package_are_no_forks():
    assert not txl_kernels.patch(make_layer()).entries


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_compiled_in_one_graph(layer, dtype):
    """A mask can't be read beforehand: it serves as a mask, and the future may be visible."""
    inputs, mask = inputs_of(layer), original_mask(T, M, dtype)
    compiled = torch.compile(copied(layer), fullgraph=True, backend="aot_eager")
    assert_alike("states", compiled(**inputs, attn_mask=mask), layer(**inputs, attn_mask=mask), 1e-9)


def test_heads_of_more_than_128_with_a_visible_future():
    layer = reference.layer.RelPartialLearnableMultiHeadAttn(1, 12, 130, dropout=0.0)
    inputs = {k: x.detach() for k, x in make_inputs(T, M, B, sizes=(1, 130, 12)).items()}
    assert_own_method(layer, lambda layer: layer(**inputs), "head size above 128")


def test_nothing_quadratic_is_made():
    """Views of the caller's mask count as large as it is."""
    layer = reference.layer.RelPartialLearnableMultiHeadAttn(H, 12, D, dropout=0.0)
    inputs, mask = inputs_of(layer, 1024, 1024, torch.float32), original_mask(1024, 1024)

    def step(layer):
        return lambda: layer(**inputs, attn_mask=mask).sum().backward()

    assert largest_tensor(step(copied(layer))) <= mask.nbytes
    assert largest_tensor(step(layer)) >= 4 * B * H * mask.nbytes  # or the measurement would show nothing
