"""Plans: what is worked out for one call serves those that are laid out alike, and no others."""

from types import SimpleNamespace

import pytest
import torch

from tests.accuracy import make_inputs, outputs_and_gradients
from tests.interpreter.test_kernels import triton_attention
from txl_kernels.triton_backend.plans import PLANS, Plans, Step


@pytest.fixture
def plans_are_kept(use_tiles, monkeypatch):
    use_tiles(16, 16)
    monkeypatch.setattr(PLANS, "most_steps", 1000)
    monkeypatch.setattr(PLANS, "_plans", {})


def some_calls():
    """Calls that differ in one thing each, by what it is."""
    inputs = make_inputs(2, 1, 18, 2, 16)
    yield "the first", inputs, {}
    yield "other numbers", make_inputs(2, 1, 18, 2, 16, seed=1), {}
    for name, option in {"scale": 0.7, "window": (5, -1), "softcap": 3.0, "first_distance": 17}.items():
        yield name, inputs, {name: option}
    yield "lengths", inputs, {"key_lengths": torch.tensor([20, 11])}
    yield "other lengths", inputs, {"key_lengths": torch.tensor([2, 20])}
    yield "time-major", {name: x.transpose(0, -2).contiguous().transpose(0, -2) for name, x in inputs.items()}, {}
    yield "another type", {name: x.half() for name, x in inputs.items()}, {}
    yield "one bias", {name: x for name, x in inputs.items() if name != "content_bias"}, {}
    yield "the other bias", {name: x for name, x in inputs.items() if name != "position_bias"}, {}
    yield "r by batch element", inputs | {"r": torch.stack([inputs["r"], inputs["r"] + 1])}, {}
    yield "few queries", inputs | {"q": inputs["q"][:, :, :5]}, {}


def test_plans_are_told_apart(plans_are_kept, monkeypatch):
    """With plans kept from call to call every result has the bits that it has without."""

    def results():
        for name, inputs, options in some_calls():
            yield name, outputs_and_gradients(triton_attention, inputs, torch.ones_like(inputs["q"]), **options)

    kept = dict(results()) | {f"{name}, again": x for name, x in results()}
    assert len(PLANS._plans) == 2 * (len(list(some_calls())) - 2)  # numbers and lengths, which plans do not depend on
    monkeypatch.setattr(PLANS, "most_steps", 0)
    monkeypatch.setattr(PLANS, "_plans", {})
    for name, wanted in results():
        for got in (kept[name], kept[f"{name}, again"]):
            assert all(torch.equal(got[x], wanted[x]) for x in wanted), name


def test_a_plan_serves_the_gradients_it_was_made_for(plans_are_kept):
    inputs = make_inputs(2, 1, 18, 2, 16)

    def gradients(*names):
        leaves = {name: x.detach().requires_grad_(name in names) for name, x in inputs.items()}
        return torch.autograd.grad(triton_attention(**leaves).sum(), [leaves[name] for name in names])

    alone = [gradients(name)[0] for name in inputs]
    for name, x, wanted in zip(inputs, alone, gradients(*inputs), strict=True):
        assert torch.equal(x, wanted), name


def tensors_in(x: object) -> list[torch.Tensor]:
    """The tensors with memory that an object holds, at any depth."""
    if isinstance(x, torch.Tensor):
        return [] if x.is_meta else [x]
    if type(x).__module__.startswith(("txl_kernels.triton_backend", "triton.tools")):
        x = getattr(x, "__dict__", x)
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def test_a_plan_holds_no_tensor(plans_are_kept):
    inputs = make_inputs(2, 1, 18, 2, 16) | {"r_bias": torch.randn(1, 20)}
    outputs_and_gradients(triton_attention, inputs, torch.ones_like(inputs["q"]))
    assert len(PLANS._plans) == 2
    assert tensors_in(PLANS) == []


def test_the_oldest_plans_make_room():
    plans, made = Plans(most_steps=5), []

    def make(name, n_steps):
        made.append(name)
        return SimpleNamespace(n_steps=n_steps)

    for name, n_steps in (("a", 2), ("b", 3), ("a", 2), ("c", 1), ("b", 3), ("a", 2), ("too large", 6), ("c", 1)):
        assert plans.find(make, (name,), name, n_steps).n_steps == n_steps
    assert made == ["a", "b", "c", "a", "too large", "c"]
    plans.most_steps = 0  # what patches constants gets no plan from before
    assert plans.find(make, ("c",), "anew", 7).n_steps == 7


def test_a_step_launches_the_variant_that_it_got():
    """Triton is asked once; tensors go to their places, the rest is what it was."""
    asked = []

    class Kernel:
        arg_names = "x_ptr", "n", "missing_ptr"

        def __getitem__(self, grid):
            def launch(*values, **options):
                asked.append(("kernel", grid, values, options))
                return Variant()

            return launch

    class Variant:
        def __getitem__(self, grid):
            return lambda *values: asked.append(("variant", grid, values))

    x, y = torch.zeros(1), torch.ones(1)
    step = Step(Kernel(), (3,), {"x_ptr": x, "n": 7, "missing_ptr": None, "unused": 1, "num_warps": 8})
    step({"x_ptr": x, "unused_ptr": y})
    step({"x_ptr": y})
    assert asked == [("kernel", (3, 1, 1), (x, 7, None), {"num_warps": 8}), ("variant", (3, 1, 1), (y, 7, None))]
