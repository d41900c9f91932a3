"""The original's rel-shift where the future is visible, for backends and windows that do not do it themselves."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def unwrapped(
    q: Tensor, r: Tensor | None, position_bias: Tensor | None, q_pos: Tensor | None, r_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """q_pos, r and r_bias with which ordinary distances give what `wrap_future` gives.

    Distance -1 has a zero, and farther ahead query i reads what query i + 1 has for the largest distances. So the
    rows for negative distances are a zero and then r again, seen through a second half of the position query, which
    is that of query i + 1.
    """
    T = q.shape[2]
    if r is not None:
        Dr = r.shape[-1]
        if q_pos is None:
            q_pos = q if position_bias is None else (q + position_bias[:, None]).to(q.dtype)
        q_pos = torch.cat([q_pos, pad(q_pos, (0, 0, 0, 1))[:, :, 1:]], dim=-1)
        r = torch.cat([pad(r, (0, Dr, 0, 1)), pad(r[..., :T, :], (Dr, 0))], dim=-2)
    if r_bias is not None:
        r_bias = torch.cat([pad(r_bias, (0, 1)), r_bias[:, :T]], dim=1)
    return q_pos, r, r_bias
