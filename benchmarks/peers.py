"""What a user could run instead of `rel_attention`, by name, each with the same arguments and the same result.

Two of them compute something else: plain attention is the floor that the position term is paid on top of, and rotary
embedding is what projects migrate to. Each peer names the function that says, in float64, what it should give.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import Thunk, runner, truth_and_reference_by_head
from reference.eager import future_keys, rel_attention_eager, rel_shift
from tests.accuracy import Tensors, assert_all_close_to_truth, assert_close_to_truth, outputs_and_gradients
from txl_kernels import rel_attention

# A peer's largest error, as a multiple of the eager reference's own in the same dtype, plus eps; ours keeps the tests'
# 2 and 3. Compiled code sums the gradient of a bias in one go over all queries and was 7 times off at wt103_base.
FACTOR = 10
OUT_OF_MEMORY = "out of memory"

Attention = Callable[..., Tensor]  # of q, k, v, r, content_bias, position_bias, is_causal by name, as in rel_attention


def compiled(**arguments) -> Tensor:
    """The eager reference under torch.compile."""
    return _compile(rel_attention_eager)(**arguments)


def sdpa_with_bd_mask(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, content_bias: Tensor, position_bias: Tensor, *, is_causal: bool = True
) -> Tensor:
    """The shifted and scaled position term as the additive mask of PyTorch's fused attention, as NeMo has it."""
    T, S = q.shape[2], k.shape[2]
    bd = rel_shift(_position_scores(q, r, position_bias))[..., :S] * (1 / math.sqrt(q.shape[3]))
    if is_causal:
        bd.masked_fill_(future_keys(T, S, q.device), float("-inf"))
    return scaled_dot_product_attention(q + content_bias[:, None], k, v, attn_mask=bd)


def flex(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, content_bias: Tensor, position_bias: Tensor, *, is_causal: bool = True
) -> Tensor:
    """FlexAttention, whose score_mod reads the unshifted position term at its row of r: no shift is computed."""
    T, S = q.shape[2], k.shape[2]
    bd = _position_scores(q, r, position_bias) * (1 / math.sqrt(q.shape[3]))
    last = bd.shape[3] - 1  # beyond it are hidden keys only

    def add_position(score, b, h, i, j):
        return score + bd[b, h, i, (j - i + T - 1).clamp(max=last)]

    mask = _causal_blocks(T, S, q.device) if is_causal else None
    return _compile(flex_attention)(q + content_bias[:, None], k, v, score_mod=add_position, block_mask=mask)


def flash(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = True, **unused: Tensor) -> Tensor:
    """Plain attention by PyTorch's flash kernel; on a CPU it needs a T x S mask where there is memory."""
    T, S = q.shape[2], k.shape[2]
    mask = causal_lower_right(T, S) if is_causal and T > 1 else None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def rotary_flash(q: Tensor, k: Tensor, v: Tensor, **others) -> Tensor:
    """Plain attention by the flash kernel, of queries and keys with rotary position embedding.

    All keys are rotated in each call; in generation a cache would hold those of the memory rotated already.
    """
    return flash(*rotary(q, k), v, **others)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = True, **unused: Tensor) -> Tensor:
    """Attention without a position term, in eager PyTorch: what `flash` should give."""
    return rel_attention_eager(q, k, v, None, is_causal=is_causal)


def plain_attention_of_rotated(q: Tensor, k: Tensor, v: Tensor, **others) -> Tensor:
    """What `rotary_flash` should give."""
    return plain_attention(*rotary(q, k), v, **others)


def rotary(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864) in its half-rotation form; keys stand at 0 ... S - 1.

    Element n of the first half and of the second are turned as a pair; of an odd head size the last is left alone.
    """
    S, D = k.shape[2:]
    cos, sin = _rotations(S, D // 2, k.dtype, k.device)

    def rotated(x: Tensor) -> Tensor:
        c, s = cos[S - x.shape[2] :], sin[S - x.shape[2] :]
        first, second, rest = x.split([D // 2, D // 2, D % 2], dim=-1)
        return torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1)

    return rotated(q), rotated(k)


@dataclass(frozen=True)
class Peer:
    """A function to compare with, the eager function that says what it should give, whether it compiles first."""

    function: Attention
    truth: Attention = rel_attention_eager
    compiles: bool = False

    @property
    def is_relative(self) -> bool:
        """Whether it computes what rel_attention does."""
        return self.truth is rel_attention_eager


PEERS = {
    "eager": Peer(rel_attention_eager),
    "compiled": Peer(compiled, compiles=True),
    "sdpa + BD mask": Peer(sdpa_with_bd_mask),
    "flex": Peer(flex, compiles=True),
    "flash, no position": Peer(flash, truth=plain_attention),
    "rotary + flash": Peer(rotary_flash, truth=plain_attention_of_rotated),
}


def usable(
    peers: dict[str, Peer],
    inputs: Tensors,
    dout: Tensor | None,
    which: str,
    is_causal: bool,
    stopwatch: Callable[[Thunk], float],
) -> tuple[dict[str, Thunk], dict[str, str]]:
    """What can be measured: "ours" and the peers that run here and are right, each as `runner` makes it of a pass.

    Each was called twice, which pays for compilation.

    Args:
        peers: by name.
        inputs: the six of rel_attention.
        dout, which: as in `runner`.
        is_causal: for all.
        stopwatch: times one call; its answer is not used.

    Returns:
        The sides by name, and by name why the other peers were left out.

    Raises:
        Exception: whatever goes wrong with ours.
    """
    torch._dynamo.reset()
    sides, left_out, truths = {}, {}, {}
    for name, peer in ({"ours": Peer(rel_attention)} | peers).items():
        if peer.truth not in truths:
            truths[peer.truth] = truth_and_reference_by_head(inputs, dout, peer.truth, is_causal=is_causal)

        function = functools.partial(peer.function, is_causal=is_causal)
        try:
            with torch.set_grad_enabled(dout is not None):  # as when timed: compiled code is for one of the two
                got = outputs_and_gradients(function, inputs, dout)
            truth, reference = truths[peer.truth]
            if name == "ours":
                assert_all_close_to_truth(got, truth, reference)
            for key in truth:
                assert_close_to_truth(key, got[key], truth[key], reference[key], FACTOR)
            side = runner(function, inputs, dout, which)
            stopwatch(side)
        except Exception as error:  # whatever a peer raises here is a finding
            if name == "ours":
                raise
            left_out[name] = _reason(error)
        else:
            sides[name] = side
    return sides, left_out


def _reason(error: Exception) -> str:
    """One line on why a peer was left out."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _position_scores(q: Tensor, r: Tensor, position_bias: Tensor) -> Tensor:
    """BD before shift and scale, (B, H, T, P)."""
    return torch.einsum("bhid,hpd->bhip", q + position_bias[:, None], r)


@functools.cache
def _compile(function: Callable) -> Callable:
    """Compiled for each shape by itself; `torch._dynamo.reset` forgets them."""
    return torch.compile(function, dynamic=False)


@functools.lru_cache(maxsize=4)
def _causal_blocks(T: int, S: int, device: torch.device) -> BlockMask:
    return create_block_mask(lambda b, h, i, j: i + (S - T) >= j, None, None, T, S, device=device)


@functools.lru_cache(maxsize=4)
def _rotations(S: int, half: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (S, half) of position x frequency."""
    frequency = 10000 ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
    angle = torch.arange(S, device=device, dtype=torch.float64)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)
