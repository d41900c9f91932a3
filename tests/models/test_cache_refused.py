"""Caches that do not fit the model as it is, models that can have none: all are refused by name."""

import copy

import pytest
import torch

from tests.models.tools import make_model, make_stream, through_forward


def train_a_step(model, optimizer=torch.optim.SGD, **options):
    (data, target), *_ = make_stream()
    model.train()(data, target)[0].mean().backward()
    optimizer(model.parameters(), lr=0.1, **options).step()
    model.eval()


OLD = []  # parameters that somebody still holds


def replace_a_parameter(model):
    OLD.append(model.r_w_bias)
    model.r_w_bias = torch.nn.Parameter(model.r_w_bias.detach() + 1)


OLDER = r"cache: expected one made by init_cache after the weights last changed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (train_a_step, OLDER),
        (lambda model: train_a_step(model, torch.optim.AdamW, fused=True), OLDER),  # which PyTorch doesn't count
        (lambda model: model.train().eval(), OLDER),
        (replace_a_parameter, OLDER),
        (lambda model: model.load_state_dict(model.state_dict()), OLDER),
        (lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True), OLDER),
        (lambda model: model.float(), r"cache: expected one made for torch\.float32 .* got torch\.float64"),
        (lambda model: model.float().double(), OLDER),
        (lambda model: model.train(), r"cache: expected a model in eval mode, .* got training mode"),
        (lambda model: model.reset_length(5, 0, 8), r"cache: .* clamp_len\) = \(8, 0, -1\), got \(7, 0, -1\)"),
        (lambda model: model.reset_length(5, 1, 7), r"cache: .* clamp_len\) = \(7, 1, -1\), got \(7, 0, -1\)"),
        (lambda model: setattr(model, "clamp_len", 2), r"cache: .* clamp_len\) = \(7, 0, 2\), got \(7, 0, -1\)"),
    ],
)
def test_a_cache_of_what_the_model_was_is_refused(change, message):
    model, (first, second) = make_model().eval(), make_stream([5, 5])
    cache = model.init_cache(3)
    model.losses(*first, cache)
    change(model)
    with pytest.raises(ValueError, match=message):
        model.losses(*second, cache)
    with pytest.raises(ValueError, match=message):
        model.log_probs(second[0], cache)


def test_other_caches_are_refused_and_not_changed():
    model, (first, second) = make_model().eval(), make_stream([5, 5])
    wanted, cache = through_forward(model, [first, second])[5:], model.init_cache(3)
    model.losses(*first, cache)
    with pytest.raises(ValueError, match=r"cache: expected one made by init_cache of this model"):
        copy.deepcopy(model).losses(*second, cache)
    with pytest.raises(ValueError, match=r"cache: expected one for batch size 2 as data, got 3"):
        model.losses(*(x[:, :2] for x in second), cache)
    with pytest.raises(TypeError, match=r"data: expected dtype torch\.int64"):
        model.log_probs(second[0].float(), cache)
    with pytest.raises(ValueError, match=r"target: expected \(1 to 5, 3\) as data, got \(6, 3\)"):
        model.losses(second[0], torch.zeros(6, 3, dtype=torch.int64), cache)
    torch.testing.assert_close(model.losses(*second, cache), wanted, rtol=1e-12, atol=1e-12)


def test_autocast_changes_what_is_kept_but_not_in_float64():
    (first, second), autocast = make_stream([5, 5]), torch.autocast("cpu", torch.bfloat16)
    model = make_model(torch.float32).eval()
    cache = model.init_cache(3)
    model.losses(*first, cache)
    with autocast, pytest.raises(ValueError, match=r"cache: .* torch\.bfloat16 .* torch\.float32"):
        model.losses(*second, cache)
    model = make_model().eval()
    cache = model.init_cache(3)
    with autocast:
        losses = [model.losses(*segment, cache) for segment in (first, second)]
    wanted = through_forward(model, [first, second])
    torch.testing.assert_close(torch.cat(losses), wanted, rtol=1e-12, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_type": 2}, r"attn_type: expected 0 or 1 for a cache, got 2, which adds positions before"),
        ({"attn_type": 3}, r"attn_type: expected 0 or 1 for a cache, got 3"),
        ({"ext_len": 2}, r"ext_len: expected 0 for a cache, .* got 2"),
    ],
)
def test_models_without_a_cache(options, message):
    with pytest.raises(ValueError, match=message):
        make_model(**options).eval().init_cache(3)


def test_bad_beginnings_are_named():
    model, states = make_model().eval(), torch.zeros(8, 3, 12).double()
    for arguments, message in (
        ((-1,), r"batch_size: expected an int >= 0, got -1"),
        ((3.0,), r"batch_size: expected an int >= 0, got 3\.0"),
        ((3, states[:2]), r"mems: expected n_layer \+ 1 = 3 tensors or none, got 1"),
        ((2, *[states[:2]] * 3), r"mems: expected \(M, B, d_model\) = \(M, 2, 12\) for each"),
        ((3, *[states] * 3), r"mems: expected M <= mem_len = 7, got M = 8"),
    ):
        with pytest.raises(ValueError, match=message):
            model.init_cache(*arguments)
    with pytest.raises(TypeError, match=r"mems: expected dtype torch\.float64 .* got torch\.float32"):
        model.init_cache(3, *[states[:2].float()] * 3)
    with pytest.raises(ValueError, match=r"cache: expected a model in eval mode"):
        model.train().init_cache(3)


def test_same_length_without_memory_is_refused():
    model = make_model(same_length=True, mem_len=0).eval()
    with pytest.raises(ValueError, match=r"mem_len: expected >= 1 with same_length, .* got 0"):
        model.log_probs(make_stream([2])[0][0], model.init_cache(3))
