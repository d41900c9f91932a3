"""Keys, values and r that are kept: the numbers of forward, what is not done again, and modes of PyTorch."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.models.test_original import CASES, by_cluster, golden
from tests.models.tools import ADAPTIVE, SIZES, make_model, make_stream, through_forward


def through_cache(model, stream, cache=None):
    cache = cache or model.init_cache(stream[0][0].shape[1])
    return torch.cat([model.losses(data, target, cache) for data, target in stream])


def assert_same_numbers(model, stream=None, rtol=1e-12):
    model, stream = model.eval(), stream or make_stream()
    torch.testing.assert_close(through_cache(model, stream), through_forward(model, stream), rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_lnorm": True},
        {"same_length": True},
        {"same_length": True, "mem_len": 3},
        {"clamp_len": 4},
        {"same_length": True, "clamp_len": 3, "pre_lnorm": True},
        {"mem_len": 0},
        {"mem_len": 1},
        {"mem_len": 40},
        {"mem_len": 500},
        {"dropout": 0.3, "dropatt": 0.3},
        ADAPTIVE,
    ],
    ids=str,
)
@pytest.mark.parametrize("attn_type", [0, 1])
def test_the_numbers_of_forward(attn_type, options):
    assert_same_numbers(make_model(attn_type=attn_type, **options))


def test_the_numbers_of_forward_with_biases_of_each_layer():
    assert_same_numbers(make_model(untie_r=True))


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_the_original(case):
    model, numbers = golden(case)
    if model.attn_type > 1 or model.ext_len:
        pytest.skip("no cache for attn_type 2 and 3 and for ext_len > 0: test_models_without_a_cache")
    model.eval()
    cache = model.init_cache(numbers["in/data0"].shape[1])
    for n in range(3):
        data, target = numbers[f"in/data{n}"], numbers[f"in/target{n}"]
        losses = by_cluster(model.losses(data, target, cache), target, model)
        torch.testing.assert_close(losses, numbers[f"out/nll{n}"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, ADAPTIVE, ADAPTIVE | {"div_val": 1}], ids=str)
def test_log_probs_are_those_of_the_next_token(options):
    model = make_model(**options).eval()
    cache, mems = model.init_cache(3), []
    for data, target in make_stream():
        losses, *mems = model(data, target, *mems)
        log_probs = model.log_probs(data, cache)
        assert log_probs.shape == (3, SIZES["n_token"])
        torch.testing.assert_close(-log_probs.gather(1, target[-1][:, None])[:, 0], losses[-1].detach())
        torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3).double())


@pytest.mark.parametrize("pre_lnorm", [False, True])
def test_memory_of_hidden_states_to_start_with(pre_lnorm):
    model, stream = make_model(pre_lnorm=pre_lnorm).eval(), make_stream()
    _, *mems = model(*stream[0])
    for start in (mems, [torch.zeros(7, 3, 12).double()] * 3, model.init_mems()):
        wanted = through_forward(model, stream[1:], start)
        got = through_cache(model, stream[1:], model.init_cache(3, *start))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_targets_of_the_last_tokens_only():
    model, (data, target) = make_model().eval(), make_stream([9])[0]
    got, wanted = model.losses(data, target[6:], model.init_cache(3)), through_cache(model, [(data, target)])
    torch.testing.assert_close(got, wanted[6:], rtol=1e-12, atol=1e-12)


def test_a_batch_of_none():
    model, empty = make_model(**ADAPTIVE).eval(), torch.empty(5, 0, dtype=torch.int64)
    cache = model.init_cache(0)
    assert model.losses(empty, empty, cache).shape == (5, 0)
    assert model.log_probs(empty, cache).shape == (0, 29)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits(dtype, autocast):
    """As near to float64 as forward is."""
    model, stream = make_model().eval(), make_stream()
    truth, model = through_forward(model, stream), model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, wanted = through_cache(model, stream), through_forward(model, stream)
    assert got.dtype == torch.float32
    assert (got - truth).abs().mean() < 1.5 * (wanted - truth).abs().mean()


# What is not done again


@pytest.mark.parametrize("attn_type", [0, 1])
def test_products_of_a_step_do_not_grow_with_the_memory(attn_type):
    """The attention's own are not counted."""
    flop = []
    for mem_len in (10, 90):
        model, (*stream, step) = make_model(attn_type=attn_type, mem_len=mem_len).eval(), make_stream([60, 60, 1])
        cache = model.init_cache(3)
        through_cache(model, stream, cache)
        assert cache.length == mem_len
        with FlopCounterMode(display=False) as counter:
            model.losses(*step, cache)
        flop.append(counter.get_total_flops())
    assert flop[0] == flop[1] > 0


class Copied(TorchDispatchMode):
    """Counts the elements that copies write."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("copy_", "clone", "cat", "index_copy", "contiguous"):
            self.elements += out.numel()
        return out


def test_the_memory_moves_once_in_mem_len_tokens():
    mem_len, times = 30, 4
    model, (start, *stream) = make_model(mem_len=mem_len).eval(), make_stream([mem_len, *[1] * mem_len * times], B=1)
    cache = model.init_cache(1)
    model.losses(*start, cache)
    with Copied() as copied:
        through_cache(model, stream, cache)
    token = 2 * 2 * 2 * 5  # layers, k and v, H, D
    written, moved = len(stream), (times + 1) * mem_len
    assert copied.elements <= token * (written + moved) + 3 * 12 * len(stream)  # a few states of one token each


def test_the_room_is_twice_the_memory_and_a_segment():
    model = make_model(mem_len=30).eval()
    cache = model.init_cache(3)
    for data, target in make_stream([4, *[1] * 200, 4, 3]):
        model.losses(data, target, cache)
        assert cache._buffer.shape == (2, 2, 3, 2, 64, 5)
        assert cache.length <= 30


# Modes


def test_no_gradient_is_recorded():
    model, (data, target) = make_model().eval(), make_stream([5])[0]
    cache = model.init_cache(3)
    assert not model.losses(data, target, cache).requires_grad
    assert not model.log_probs(data, cache).requires_grad


def test_inference_mode_may_begin_and_end():
    model, stream = make_model(mem_len=3).eval(), make_stream([2] * 12)
    wanted, got = through_forward(model, stream), []
    with torch.inference_mode():
        cache = model.init_cache(3)
    for n, (data, target) in enumerate(stream):
        with torch.inference_mode(n // 3 % 2 == 0):
            got.append(model.losses(data, target, cache).clone())
    torch.testing.assert_close(torch.cat(got), wanted, rtol=1e-12, atol=1e-12)


def test_a_copy_goes_on_by_itself():
    model, (first, second, third) = make_model().eval(), make_stream([6, 6, 6])
    cache = model.init_cache(3)
    model.losses(*first, cache)
    twin = copy.deepcopy(cache)
    wanted = model.losses(*second, cache)
    model.losses(*third, cache)
    assert torch.equal(model.losses(*second, twin), wanted)


def test_a_segment_that_fails_changes_nothing():
    model, stream = make_model(mem_len=4).eval(), make_stream([3, 3, 3, 9, 3])
    wanted, cache, got = through_forward(model, stream), model.init_cache(3), []

    def fail(module, args):
        raise KeyboardInterrupt

    for data, target in stream:
        handle = model.layers[1].pos_ff.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model.losses(data, target, cache)
        handle.remove()
        got.append(model.losses(data, target, cache))
    torch.testing.assert_close(torch.cat(got), wanted, rtol=1e-12, atol=1e-12)
