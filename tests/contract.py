"""Problems that use any combination of the optional arguments of rel_attention, the same for every backend."""

import torch

from tests.accuracy import Tensors, make_inputs

# Each adds one argument, or one form of one; those in a group exclude each other.
FEATURES = (
    "bidirectional", "window", "right window", "band", "bool mask", "float mask", "key mask", "head mask",
    "key lengths", "position query", "row bias", "no r", "segment", "softcap", "grouped heads", "batched r", "shared r",
    "wrapped future",
)  # fmt: skip
EXCLUSIVE = (
    {"bool mask", "float mask", "key mask", "head mask"},
    {"no r", "position query"},
    {"no r", "batched r", "shared r"},
    {"window", "right window"},
    {"wrapped future", "bidirectional"},
    {"wrapped future", "band"},
)


def make_problem(
    features: set[str] | frozenset[str],
    B: int = 2,
    H: int = 4,
    T: int = 21,
    M: int = 9,
    D: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    layout: str = "bhtd",
    biases: bool = True,
) -> tuple[Tensors, dict]:
    """Inputs (which have gradients) and options of a call with the given features of FEATURES.

    Some query has no visible key in every problem with a mask of queries and keys, a right window or key lengths.
    """
    S, is_causal = M + T, not features & {"bidirectional", "wrapped future"}
    needed = S + T - 1 if "bidirectional" in features else S
    P = max(1, needed // 2) if "band" in features else needed
    inputs = make_inputs(B, H, T, M, D, P, dtype, device, is_causal, seed, layout, biases)
    options: dict = {"is_causal": is_causal}
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def coins(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) < 0.6).to(device)

    def below(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator).to(device)

    if "band" in features:
        options["first_distance"] = int(below(S + 1))
    if "window" in features:
        options["window"] = (int(below(S)), int(below(T + 1)) - 1)
    if "right window" in features:
        options["window"] = (-1, int(below(T)))
    if "key lengths" in features:
        options["key_lengths"] = below(S + 1, B)
        options["key_lengths"][-1] = 0
    if "bool mask" in features:
        options["attn_mask"] = coins(B, 1, T, S)
        options["attn_mask"][:, :, T // 2] = False
    if "key mask" in features:
        options["attn_mask"] = coins(B, 1, 1, S)
    if "float mask" in features:
        inputs["attn_mask"] = draw(B, H, T, S).masked_fill_(~coins(B, H, T, S), float("-inf"))
        inputs["attn_mask"][:, :, T // 2] = float("-inf")
    if "head mask" in features:
        inputs["attn_mask"] = draw(H, 1, S)
    if "position query" in features:
        width = D // 2 + 3
        inputs["q_pos"] = draw(B, H, T, width)
        inputs["r"] = draw(H, P, width)
        inputs.pop("position_bias", None)
    width = inputs["r"].shape[-1]
    if "batched r" in features:
        inputs["r"] = draw(B, H, P, width)
    if "shared r" in features:
        inputs["r"] = draw(1, P, width)
    if "no r" in features:
        del inputs["r"]
        inputs.pop("position_bias", None)
        options["r"] = None
    if features & {"row bias", "no r"}:
        inputs["r_bias"] = draw(H, P)
    if "segment" in features:
        inputs["segment_scores"] = draw(B, H, T, 2)
        options["segment_ids"] = (below(2, B, T), below(2, B, S))
    if "softcap" in features:
        options["softcap"] = 2.0
    if "wrapped future" in features:
        options["wrap_future"] = True
    if "grouped heads" in features and H % 2 == 0:
        for name in ("k", "v"):
            inputs[name] = inputs[name][:, : H // 2]
    return inputs, options


def compatible(features: set[str]) -> bool:
    """Whether no two of the features exclude each other."""
    return all(len(features & group) <= 1 for group in EXCLUSIVE)


def pairs() -> list[frozenset[str]]:
    """Every feature alone and every compatible pair."""
    sets = {frozenset(pair) for pair in ((a, b) for a in FEATURES for b in FEATURES)}
    return sorted((x for x in sets if compatible(set(x))), key=sorted)
