"""The layer on a GPU: a training step of the original under autocast, and what its mask costs."""

import copy
import warnings

import pytest
import torch

import txl_kernels
from reference.layer import RelPartialLearnableMultiHeadAttn as ReferenceLayer
from tests.layer_tools import assert_as_accurate, make_inputs, make_layer, original_mask, run
from txl_kernels.layer import RelPartialLearnableMultiHeadAttn
from txl_kernels.layer_mask import visibility
from txl_kernels.patching.padding import key_padding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("patched", [False, True])
def test_gradients_of_a_training_step(dtype, patched):
    T, M, B, H, D, C = 150, 150, 4, 10, 41, 410  # wt103 base
    torch.manual_seed(0)
    reference = ReferenceLayer(H, C, D, dropout=0.0).cuda()
    if patched:
        layer = copy.deepcopy(reference)
        txl_kernels.patch(layer, strict=True)
    else:
        layer = RelPartialLearnableMultiHeadAttn(H, C, D, dropout=0.0).cuda()
        layer.load_state_dict(reference.state_dict())
    inputs = make_inputs(T, M, B, device="cuda", sizes=(H, D, C))
    mask, gout = original_mask(T, M).cuda(), torch.randn(T, B, C, device="cuda")

    got = run(layer, inputs, gout, mask, dtype)
    wanted = run(reference, inputs, gout, mask, dtype)
    truth = run(reference.double(), {name: x.double() for name, x in inputs.items()}, gout.double(), mask)
    assert_as_accurate(got, wanted, truth, dtype)


def test_layers_that_share_a_mask_synchronise_once():
    layers = [make_layer().cuda() for _ in range(3)]
    inputs, mask = make_inputs(4, 6, device="cuda"), original_mask(4, 6).cuda()
    layers[0](**inputs)  # what is loaded or built once may synchronise
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for layer in layers:
                layer(**inputs, attn_mask=mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1


def test_under_graph_capture_a_tensor_serves_as_a_mask():
    """It may be another one at the replay, so what is known of it does not count."""
    mask = original_mask(4, 3).cuda()
    assert visibility(mask, 4, 7, 3).attn_mask is None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = visibility(mask, 4, 7, 3)
    assert captured.future
    mask[:, 0] = True
    graph.replay()
    assert torch.equal(captured.attn_mask[0, 0], ~mask[:, :, 0])


def test_padding_is_read_once_and_stays_a_mask_under_graph_capture():
    valid = torch.arange(7, device="cuda") < torch.tensor([[7], [3]], device="cuda")
    assert key_padding(valid).key_lengths.tolist() == [7, 3]
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert key_padding(valid).attn_mask is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = key_padding(valid)
    assert captured.key_lengths is None
    assert captured.attn_mask.shape == (2, 1, 1, 7)
