"""The proof that a mask tensor is the causal mask: what passes, what doesn't, and what it costs."""

import gc
import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.layer_tools import CountOps, original_mask
from txl_kernels import causal_mask
from txl_kernels.causal_mask import require_causal


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize(("T", "M"), [(1, 0), (1, 6), (2, 0), (2, 1), (7, 0), (5, 7), (0, 3), (40, 300)])
def test_the_original_mask_passes(T, M, dtype):
    require_causal(original_mask(T, M, dtype), T, M + T)


def test_any_layout_passes():
    mask = original_mask(5, 3)
    require_causal(mask.transpose(0, 1).contiguous().transpose(0, 1), 5, 8)
    require_causal(mask.expand(5, 8, 4)[:, :, 2:3], 5, 8)


@pytest.mark.parametrize(("T", "S", "entries"), [(1, 3, 2), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 4, 2), (2, 3, 3)])
def test_of_all_masks_only_the_causal_one_passes(T, S, entries):
    passed = []
    for mask in itertools.product(range(entries), repeat=T * S):
        mask = torch.tensor(mask, dtype=torch.uint8).view(T, S, 1)
        try:
            require_causal(mask, T, S)
        except ValueError:
            continue
        passed.append(mask)
    assert len(passed) == 1
    assert torch.equal(passed[0], original_mask(T, S - T, torch.uint8))


@pytest.mark.parametrize("value", [0, 1, 2, 255])
def test_the_error_names_the_first_wrong_entry(value):
    T, M = 4, 3
    for i, j in itertools.product(range(T), range(M + T)):
        mask = original_mask(T, M, torch.uint8)
        if mask[i, j] == value:
            continue
        mask[i, j] = value
        mask[i, j + 1 :] ^= 1  # later ones, which the message leaves out
        mask[i + 1 :] ^= 1
        with pytest.raises(
            ValueError, match=rf"attn_mask: .* j > i \+ 3, got {value} at query {i}, key {j} \(1 = hidden\)"
        ):
            require_causal(mask, T, M + T)


@pytest.mark.parametrize(
    "mask",
    {
        "no mask": torch.zeros(4, 7, 1, dtype=torch.bool),
        "inverted": ~original_mask(4, 3),
        "same_length": original_mask(4, 3) | torch.ones(4, 7, 1).tril(-1).bool(),
        "one step late": original_mask(4, 3).roll(1, 1),
        "hidden padding": original_mask(4, 3) | (torch.arange(7) < 2)[None, :, None],
        "aligned top-left": torch.ones(4, 7).triu(1).bool()[:, :, None],
    }.items(),
    ids=lambda item: item[0],
)
def test_other_masks_are_rejected(mask):
    with pytest.raises(ValueError, match="attn_mask: expected None or the causal mask"):
        require_causal(mask[1], 4, 7)


@pytest.mark.parametrize(
    "shape", [(4, 7), (4, 7, 2), (7, 2), (5, 7, 1), (4, 8, 1), (7, 4, 1), (1, 7, 1), (4, 1, 1)], ids=str
)
def test_other_shapes_are_rejected(shape):
    with pytest.raises(ValueError, match=rf"attn_mask: .* \(4, 7, 1\), got shape \({shape[0]}, {shape[1]}"):
        require_causal(torch.zeros(shape, dtype=torch.bool), 4, 7)


def test_other_types_are_rejected():
    for mask, got in ((original_mask(4, 3).float(), r"torch\.float32"), ([[0]], "list")):
        with pytest.raises(TypeError, match=f"attn_mask: expected None or a bool or uint8 .*got {got}"):
            require_causal(mask, 4, 7)


def proofs(function):
    """Runs function and counts how often a mask was read."""
    with CountOps() as ops:
        function()
    return ops.calls["argmax"]


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_is_proven_once(inference):
    with torch.inference_mode(inference):
        mask, twin = original_mask(5, 3), original_mask(5, 3)
        assert proofs(lambda: [require_causal(mask, 5, 8) for _ in range(3)]) == 1
        assert proofs(lambda: require_causal(twin, 5, 8)) == 1
        assert proofs(lambda: require_causal(mask, 5, 8)) == 0


def test_a_mask_edited_in_place_is_proven_again():
    square = torch.ones(4, 7, dtype=torch.bool).triu_(4)
    mask = square[:, :, None]
    require_causal(mask, 4, 7)
    square[0, 4] = True  # as it was
    assert proofs(lambda: [require_causal(mask, 4, 7) for _ in range(2)]) == 1
    square[2, 1] = True
    for _ in range(2):
        with pytest.raises(ValueError, match="got 1 at query 2, key 1"):
            require_causal(mask, 4, 7)
    square[2, 1] = False
    require_causal(mask, 4, 7)


def test_a_proven_mask_is_still_held_against_the_lengths():
    mask = original_mask(4, 3)
    require_causal(mask, 4, 7)
    with pytest.raises(ValueError, match=r"\(4, 8, 1\), got shape \(4, 7, 1\)"):
        require_causal(mask, 4, 8)


def test_a_freed_mask_is_forgotten():
    gc.collect()
    before = len(causal_mask._proven)
    masks = [original_mask(4, M) for M in range(3)]
    for M, mask in enumerate(masks):
        require_causal(mask, 4, 4 + M)
    assert len(causal_mask._proven) == before + 3
    del mask, masks
    gc.collect()
    assert len(causal_mask._proven) == before


def test_nothing_of_size_t_by_s_is_allocated():
    T = M = 512
    good = original_mask(T, M)
    bad = good.clone()
    bad[-1, 0] = True
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        require_causal(good, T, M + T)
        with pytest.raises(ValueError, match="got 1 at query 511, key 0"):
            require_causal(bad, T, M + T)
    largest = max(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    assert 0 < largest <= 8 * 3 * T  # the three vectors of int64, stacked


def test_a_tensor_under_compile_is_refused_with_advice():
    mask = original_mask(4, 3)
    require_causal(mask, 4, 7)
    compiled = torch.compile(require_causal, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="attn_mask: expected None, which means causal"):
        compiled(mask, 4, 7)
