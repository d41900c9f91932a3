"""What a query without a visible key gets: `rel_attention` gives zeros, some models the mean of all values."""

import torch
from torch import Tensor


def mean_of_values(out: Tensor, v: Tensor, dead: Tensor) -> Tensor:
    """out, with the mean of v over all keys, hidden ones included, in the rows of dead queries.

    That is what softmax gives where every score was replaced by the same finite number.

    Args:
        out: (B, H, T, D).
        v: (B, Hk, S, D), Hk dividing H.
        dead: (B, T) or (B, H, T), bool: the queries that see no key.
    """
    mean = v.mean(2, keepdim=True)
    if v.shape[1] != out.shape[1]:
        mean = mean.repeat_interleave(out.shape[1] // v.shape[1], dim=1)
    dead = dead[:, None] if dead.ndim == 2 else dead
    return torch.where(dead[..., None], mean, out)
