"""What the layers read from a mask of the original: what is recognised, what serves as a mask, and what it costs."""

import gc
import itertools
import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.layer_tools import CountOps, original_mask, same_length_mask
from txl_kernels.layer_mask import Visibility, visibility

CAUSAL = Visibility()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize(("T", "M"), [(1, 0), (1, 6), (2, 0), (2, 1), (7, 0), (5, 7), (0, 3), (40, 300)])
def test_the_original_mask_is_causal(T, M, dtype):
    assert visibility(original_mask(T, M, dtype), T, M + T, 3) == CAUSAL
    assert visibility(None, T, M + T, 3) == CAUSAL


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize(
    ("T", "M", "mem_len"),
    [(5, 6, 6), (5, 5, 5), (5, 9, 11), (1, 6, 6), (1, 1, 1), (40, 300, 300), (64, 640, 640)],
)
def test_the_same_length_mask_is_a_window(T, M, mem_len, dtype):
    assert visibility(same_length_mask(T, M, mem_len, dtype), T, M + T, 3) == Visibility(window=(mem_len - 1, -1))


def test_same_length_while_the_memory_still_grows_is_causal():
    assert visibility(same_length_mask(5, 2, 7), 5, 7, 3) == CAUSAL


def test_any_layout_is_read():
    for mask, wanted in ((original_mask(5, 6), CAUSAL), (same_length_mask(5, 6, 6), Visibility((5, -1)))):
        assert visibility(mask.transpose(0, 1).contiguous().transpose(0, 1), 5, 11, 1) == wanted
        assert visibility(mask.expand(5, 11, 4)[:, :, 2:3], 5, 11, 1) == wanted


def windows(T, S):
    """The masks to recognise, by their window's left: it reaches back over the segment."""
    distance = torch.arange(T)[:, None] + S - T - torch.arange(S)
    return {left: ((distance < 0) | (distance > left)).to(torch.uint8) for left in range(T - 1, S)}


def check_what_is_read(hidden, wanted):
    """Recognised are the masks of wanted and no others; of those, it is known which hide the future."""
    T, S = hidden.shape
    visible = visibility(hidden[:, :, None], T, S, 2)
    equal = [left for left, mask in wanted.items() if torch.equal(mask, hidden)]
    if equal:
        assert visible == Visibility(None if equal == [S - 1] else (equal[0], -1))
    else:
        assert visible.attn_mask is not None
        assert visible.future == bool((hidden == 0).triu(1 + S - T).any())


@pytest.mark.parametrize(("T", "S", "entries"), [(1, 3, 2), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 4, 2), (2, 4, 3)])
def test_of_all_masks_only_those_are_recognised(T, S, entries):
    wanted = windows(T, S)
    for mask in itertools.product(range(entries), repeat=T * S):
        check_what_is_read(torch.tensor(mask, dtype=torch.uint8).view(T, S), wanted)


@pytest.mark.parametrize(("T", "S"), [(3, 6), (4, 9), (5, 7)])
def test_one_wrong_entry_is_noticed(T, S):
    wanted = windows(T, S)
    for mask in wanted.values():
        for i, j in itertools.product(range(T), range(S)):
            wrong = mask.clone()
            wrong[i, j] ^= 1
            check_what_is_read(wrong, wanted)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_other_masks_serve_as_masks(dtype):
    T, S, B = 4, 7, 3
    generator = torch.Generator().manual_seed(0)
    future = torch.ones(T, S).triu(1 + S - T).bool()
    for shape in ((T, S, B), (T, S, 1), (1, S, B), (T, 1, 1), (S, B), (S, 1)):
        hidden = torch.rand(shape, generator=generator) < 0.4
        window, mask, sees_future = visibility(hidden.to(dtype), T, S, B)
        full = hidden.expand(T, S, B)
        assert window is None
        assert torch.equal(mask.expand(B, 1, T, S)[:, 0].permute(1, 2, 0), ~full)
        assert mask.numel() == hidden.numel()
        assert sees_future == bool((~full & future[:, :, None]).any())


def test_a_future_hidden_in_every_batch_element_is_known():
    causal = original_mask(4, 3)
    padded = causal | (torch.arange(7)[:, None] < torch.tensor([0, 1, 5]))
    assert not visibility(padded, 4, 7, 3).future
    padded[1, 5, 2] = False
    assert visibility(padded, 4, 7, 3).future


@pytest.mark.parametrize("shape", [(4, 7), (7, 2), (5, 7, 1), (4, 8, 1), (7, 4, 1), (4, 7, 2), (7,), (4, 7, 1, 1)])
def test_other_shapes_are_rejected(shape):
    message = rf"attn_mask: .*\(T, S, 1\) = \(4, 7, 1\).*got shape \({', '.join(map(str, shape))}"
    with pytest.raises(ValueError, match=message):
        visibility(torch.zeros(shape, dtype=torch.bool), 4, 7, 3)


def test_other_types_are_rejected():
    for mask, got in ((original_mask(4, 3).float(), r"torch\.float32"), ([[0]], "list")):
        with pytest.raises(TypeError, match=f"attn_mask: expected None or a bool or uint8 .*got {got}"):
            visibility(mask, 4, 7, 3)


def reads(function):
    """Runs function and counts how often a mask was read."""
    with CountOps() as ops:
        function()
    return ops.calls["amin"]


@pytest.mark.parametrize("kind", ["causal", "padded"])
def test_a_mask_is_read_once(kind):
    mask, twin = original_mask(5, 3), original_mask(5, 3)
    if kind == "padded":
        mask[:, 0], twin[:, 0] = True, True
    assert reads(lambda: [visibility(mask, 5, 8, 3) for _ in range(3)]) == 1
    assert reads(lambda: visibility(twin, 5, 8, 3)) == 1
    assert reads(lambda: visibility(mask, 5, 8, 3)) == 0
    assert visibility(mask, 5, 8, 3) is visibility(mask, 5, 8, 3)  # layers share what was made of it


def test_an_inference_tensor_is_read_once_a_forward():
    """It keeps no version: the next forward, or who gives no name, must look again."""
    layers = [torch.nn.Identity() for _ in range(3)]
    with torch.inference_mode():
        mask = original_mask(5, 3)
        for _ in range(2):
            assert reads(lambda: [visibility(mask, 5, 8, 3, reader=layer) for layer in layers]) == 1
        assert visibility(mask, 5, 8, 3, reader=layers[0]) == CAUSAL
        mask[:, 0] = True
        got = [visibility(mask, 5, 8, 3, reader=layer) for layer in layers[::2]]
        assert got[0].attn_mask is not None
        assert got[0] is got[1]
        mask[:, 0] = False
        assert visibility(mask, 5, 8, 3) == CAUSAL


def test_a_mask_edited_in_place_is_read_again():
    square = torch.ones(4, 7, dtype=torch.bool).triu_(4)
    mask = square[:, :, None]
    assert visibility(mask, 4, 7, 3) == CAUSAL
    square[0, 4] = True  # as it was
    assert reads(lambda: [visibility(mask, 4, 7, 3) for _ in range(2)]) == 1
    square[2, 1] = True
    assert not visibility(mask, 4, 7, 3).attn_mask[0, 0, 2, 1]
    square[2, 1] = False
    assert visibility(mask, 4, 7, 3) == CAUSAL


def test_a_mask_is_read_again_for_other_lengths():
    keys = torch.tensor([False, False, False, True])[:, None]
    assert not visibility(keys, 2, 4, 3).future
    assert visibility(keys, 3, 4, 3).future
    mask = original_mask(4, 3)
    visibility(mask, 4, 7, 3)
    with pytest.raises(ValueError, match=r"\(4, 8, 1\).*got shape \(4, 7, 1\)"):
        visibility(mask, 4, 8, 3)


def test_a_mask_first_seen_in_inference_mode_can_be_trained_with():
    mask = original_mask(4, 3)
    mask[:, 0] = True
    with torch.inference_mode():
        assert visibility(mask, 4, 7, 3).attn_mask.is_inference()
    assert not visibility(mask, 4, 7, 3).attn_mask.is_inference()


def test_a_freed_mask_is_forgotten():
    masks = [original_mask(4, M) for M in range(3)]
    masks[0][:, 0] = True
    said = [visibility(mask, 4, 4 + M, 3).attn_mask for M, mask in enumerate(masks)]
    gone = [weakref.ref(x) for x in (*masks, said[0])]
    assert said[0] is visibility(masks[0], 4, 4, 3).attn_mask
    del masks, said
    gc.collect()
    assert [x() for x in gone] == [None] * 4


def largest_allocation(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return max(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")


def test_nothing_of_size_t_by_s_is_allocated_for_a_mask_that_is_recognised():
    T = M = 512
    vectors = 8 * (5 * T + 2 * M)  # int64, in one tensor
    for mask in (original_mask(T, M), same_length_mask(T, M, M)):
        assert 0 < largest_allocation(lambda mask=mask: visibility(mask, T, M + T, 3)) <= vectors
    padded = original_mask(T, M)
    padded[:, 0] = True
    assert largest_allocation(lambda: visibility(padded, T, M + T, 3)) == T * (M + T)  # its inverse, in bytes


def test_under_compile_a_tensor_serves_as_a_mask():
    mask = original_mask(4, 3)
    assert visibility(mask, 4, 7, 3) == CAUSAL
    compiled = torch.compile(visibility, backend="eager", fullgraph=True)
    window, attn_mask, future = compiled(mask, 4, 7, 3)
    assert window is None
    assert torch.equal(attn_mask[0, 0], ~mask[:, :, 0])
    assert future


def test_meta_tensors_serve_as_masks():
    assert visibility(original_mask(4, 3).to("meta"), 4, 7, 3).attn_mask.shape == (1, 1, 4, 7)
