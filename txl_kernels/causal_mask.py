"""Proof that a mask of the original Transformer-XL is the causal mask, so that attention need not read it.

The original builds one (T, S, 1) mask per forward of the model and hands it to every layer. `rel_attention`
hides the future by index arithmetic, so the layer has only to know that the mask says nothing else. That is
proven once per mask object, from three vectors of length T and with one copy to the host:

- the largest entry of each row is 1, of the last row 0: entries are 0 or 1, the last query sees all keys;
- the first hidden key of query i is i + M + 1: nothing of the past is hidden;
- the first query that sees key M + c is c: all of the future is hidden.

Row sums in place of the third would prove as much, but PyTorch sums bytes by copying them to int64 first.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# mask -> the version at which it was proven: an edit in place changes the version, a freed mask leaves
_proven = WeakTensorKeyDictionary()


def require_causal(attn_mask: Tensor, T: int, S: int) -> None:
    """Raises unless attn_mask is the original's causal mask: key j is hidden from query i iff j > i + M.

    Synchronises once for a mask object, and again after an edit in place. Inference tensors keep no version,
    so an edit of one of them goes unnoticed.

    Args:
        attn_mask: (T, S, 1), bool or uint8, True or 1 = hidden.
        T: Number of queries.
        S: Number of keys, S = M + T.

    Raises:
        TypeError: attn_mask is not a bool or uint8 tensor.
        ValueError: Its shape is not (T, S, 1), or an entry differs from the causal mask.
        RuntimeError: It came under torch.compile or CUDA graph capture, where its entries cannot be read.
    """
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype not in (torch.bool, torch.uint8):
        got = attn_mask.dtype if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
        raise TypeError(f"attn_mask: expected None or a bool or uint8 tensor (T, S, 1), got {got}")
    if attn_mask.shape != (T, S, 1):
        raise ValueError(
            f"attn_mask: expected None or the causal mask (T, S, 1) = ({T}, {S}, 1), got shape "
            f"{tuple(attn_mask.shape)}; masks by batch element, (T, S, B) or (S, B), are not supported"
        )
    if torch.compiler.is_compiling() or (attn_mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        raise RuntimeError(
            "attn_mask: expected None, which means causal, got a tensor: its entries can't be read under "
            "torch.compile or CUDA graph capture"
        )
    version = -1 if attn_mask.is_inference() else attn_mask._version
    if attn_mask.numel() and _proven.get(attn_mask) != version:
        _prove_causal(attn_mask[:, :, 0].view(torch.uint8))
        _proven[attn_mask] = version


def _prove_causal(hidden: Tensor) -> None:
    T, S = hidden.shape
    M = S - T
    # argmax and argmin give the first of equal entries
    got = torch.stack([hidden.amax(1).long(), hidden.argmax(1), hidden[:, M:].argmin(0)]).cpu()
    wanted = torch.stack([torch.ones(T).long(), torch.arange(M + 1, S + 1), torch.arange(T)])
    wanted[:2, -1] = 0  # the last query hides nothing
    if not torch.equal(got, wanted):
        i, j, entry = _first_difference(hidden)
        raise ValueError(
            f"attn_mask: expected None or the causal mask, key j hidden from query i iff j > i + {M}, "
            f"got {entry} at query {i}, key {j} (1 = hidden); same_length and padding masks are not supported"
        )


def _first_difference(hidden: Tensor) -> tuple[int, int, int]:
    # Row by row, since nothing T x S may be allocated; only an error pays for the synchronisations.
    T, S = hidden.shape
    keys = torch.arange(S)
    return next(
        (i, int(j), int(hidden[i, j])) for i in range(T) for j in (hidden[i].cpu() != (keys > i + S - T)).nonzero()
    )
