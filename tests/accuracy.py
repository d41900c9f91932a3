"""The error policy of every test: truth in float64, and the eager reference's own error as the yardstick.

Inputs are made in the low dtype, so truth and reference see the same rounded numbers. A result passes when
its largest error is at most 2x (gradients 3x) that of the eager reference in the same dtype, plus
eps(dtype) * max|truth|.
"""

import torch
from torch import Tensor

from reference.eager import rel_attention_eager

INPUTS = (
    *("q", "k", "v", "r", "content_bias", "position_bias"),
    *("q_pos", "r_bias", "attn_mask", "segment_scores"),
)
OUTPUT_FACTOR, GRADIENT_FACTOR = 2, 3

Tensors = dict[str, Tensor]


def tolerance(truth: Tensor, same_dtype_reference: Tensor, factor: float) -> float:
    """Largest error allowed: factor x the reference's error + eps of its dtype x max|truth|."""
    if truth.numel() == 0:
        return 0.0
    eps = torch.finfo(same_dtype_reference.dtype).eps
    finite = truth.masked_fill(truth.isinf(), 0.0)  # the log-sum-exp of no key
    return factor * largest_difference(same_dtype_reference, truth) + eps * finite.abs().max().item()


def largest_difference(got: Tensor, truth: Tensor) -> float:
    """max |got - truth|; NaN where got has one, 0 where both are the same infinity."""
    if truth.numel() == 0:
        return 0.0
    got, truth = got.double(), truth.double()
    return (got - truth).masked_fill((got == truth), 0.0).abs().max().item()


def assert_close_to_truth(name: str, got: Tensor, truth: Tensor, same_dtype_reference: Tensor, factor: float) -> None:
    """Fails unless got has the reference's shape and dtype and is within tolerance() of truth."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(truth.shape)}"
    assert got.dtype == same_dtype_reference.dtype, f"{name}: {got.dtype}, not {same_dtype_reference.dtype}"
    error = largest_difference(got, truth)
    allowed = tolerance(truth, same_dtype_reference, factor)
    assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g} = {factor}x the reference's + eps"


def make_inputs(
    B: int,
    H: int,
    T: int,
    M: int,
    D: int,
    P: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    is_causal: bool = True,
    seed: int = 0,
    layout: str = "bhtd",
    biases: bool = True,
) -> Tensors:
    """Makes the six inputs of rel_attention by name, the same numbers on every device.

    Args:
        B: batch size.
        H: number of heads.
        T: query length.
        M: memory length; S = M + T.
        D: head size.
        P: rows of r; by default S (causal) or S + T - 1.
        dtype: dtype of all six.
        device: where they are wanted; they are drawn on the CPU.
        is_causal: decides the default of P.
        seed: of the generator.
        layout: "bhtd", or "tbhd" for permuted views of time-major tensors.
        biases: whether content_bias and position_bias are among them.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    S = M + T
    P = P if P is not None else S if is_causal else S + T - 1
    if layout == "tbhd":
        inputs = {name: draw(n, B, H, D).permute(1, 2, 0, 3) for name, n in (("q", T), ("k", S), ("v", S))}
        inputs["r"] = draw(P, H, D).transpose(0, 1)
    else:
        inputs = {name: draw(B, H, n, D) for name, n in (("q", T), ("k", S), ("v", S))}
        inputs["r"] = draw(H, P, D)
    if biases:
        inputs |= {"content_bias": draw(H, D), "position_bias": draw(H, D)}
    return inputs


def outputs_and_gradients(
    function, inputs: Tensors, dout: Tensor | None = None, dlse: Tensor | None = None, **options
) -> Tensors:
    """Runs function(**inputs, **options): "out", "lse" when dlse is given, and each input's gradient.

    Without dout (in the dtype of the inputs) only the forward runs. An input without influence has gradient
    zero. The input segment_scores and the option segment_ids are given to the function as its `segment`.
    """
    leaves = {name: x.detach().requires_grad_(dout is not None) for name, x in inputs.items()}
    arguments = leaves | options
    if "segment_ids" in arguments:
        arguments["segment"] = (arguments.pop("segment_scores"), *arguments.pop("segment_ids"))
    if dlse is None:
        results, upstream = {"out": function(**arguments)}, [dout]
    else:
        out, lse = function(**arguments, return_lse=True)
        results, upstream = {"out": out, "lse": lse}, [dout, dlse]
    if dout is not None:
        cotangents = [g.to(x.dtype) for g, x in zip(upstream, results.values(), strict=True)]
        # Sums of nothing, where no query sees a key, have no history in the definition.
        parts = [(x, g) for x, g in zip(results.values(), cotangents, strict=True) if x.requires_grad]
        outputs, cotangents = zip(*parts, strict=True) if parts else ((), ())
        gradients = (
            torch.autograd.grad(outputs, list(leaves.values()), cotangents, materialize_grads=True)
            if parts
            else [torch.zeros_like(x) for x in leaves.values()]
        )
        results |= dict(zip(leaves, gradients, strict=True))
    return {name: x.detach() for name, x in results.items()}


def truth_and_reference(
    inputs: Tensors, dout: Tensor | None = None, dlse: Tensor | None = None, **options
) -> tuple[Tensors, Tensors]:
    """The eager reference's outputs and gradients in float64 and in the dtypes of the inputs."""
    exact = {name: x.double() for name, x in inputs.items()}
    return (
        outputs_and_gradients(rel_attention_eager, exact, dout, dlse, **options),
        outputs_and_gradients(rel_attention_eager, inputs, dout, dlse, **options),
    )


def assert_all_close_to_truth(got: Tensors, truth: Tensors, reference: Tensors) -> None:
    """The error policy for everything that outputs_and_gradients returns."""
    assert got.keys() == truth.keys(), f"got {sorted(got)}, wanted {sorted(truth)}"
    for name in truth:
        factor = GRADIENT_FACTOR if name in INPUTS else OUTPUT_FACTOR
        assert_close_to_truth(name, got[name], truth[name], reference[name], factor)
