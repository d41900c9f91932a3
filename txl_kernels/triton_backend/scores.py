"""From AC + BD to the softmax: scale and the optional terms of a score, each in one place for all kernels.

The index arrays offs_m (queries) and offs_n (keys) have the shape of the tile or broadcast to it, so that the same
code serves tiles with queries as rows, their transposes, and tiles in the coordinates of r.

The `terms` of one (batch, head) are a tuple; a term that is absent has None for its first element, and compiles to
nothing (Triton 3.6 cannot return a None, so every kernel builds the tuple itself):

    segment: pointers to the scores, the ids of queries and those of keys; the places of their elements 0
    mask:    pointer, place of its element 0, strides of queries and keys
    dropout: pointer to the seed, key of the (batch, head), bound of the hash, factor of what stays
    softcap, T, S
"""

import triton
import triton.language as tl

from txl_kernels import dropout
from txl_kernels.triton_backend.primitives import exp, visible_mask

MIX_1 = tl.constexpr(dropout.MIX_1)
MIX_2 = tl.constexpr(dropout.MIX_2)
ROW = tl.constexpr(dropout.ROW)
COLUMN = tl.constexpr(dropout.COLUMN)
COLUMN_KEY = tl.constexpr(dropout.COLUMN_KEY)
# Finite mask values go no lower: float32 scores vanish beside this one already, and a float64 log-sum-exp does not.
LOWEST_BIAS = tl.constexpr(-1e10)


@triton.jit
def dropout_key(seed_ptr, lane):
    """What the dropout hash of one (batch, head) starts from; 0 without dropout."""
    key = tl.full((), 0, tl.uint32)
    if seed_ptr is not None:
        key = _lane_key(seed_ptr, lane)
    return key


@triton.jit
def scores(products, terms, offs_m, offs_n, bounds, scale, dtype: tl.constexpr, MASKED: tl.constexpr):
    """The scores of a tile from its products AC + BD, and the slope of the softcap (1 without one)."""
    segment, mask, _, softcap, T, S = terms
    if segment[0] is not None:
        products += _segment_scores(terms, offs_m, offs_n)
    s = products * scale
    slope = 1.0
    if softcap is not None:
        bounded = _tanh(s / softcap, dtype)
        s = softcap * bounded
        slope = 1.0 - bounded * bounded
    mask_ptr, first, stride_mm, stride_mn = mask
    if mask_ptr is not None:
        inside = (offs_m < T) & (offs_n >= 0) & (offs_n < S)
        ptrs = mask_ptr + first + offs_m.to(tl.int64) * stride_mm + offs_n.to(tl.int64) * stride_mn
        if mask_ptr.dtype.element_ty == tl.uint8:
            s = tl.where(tl.load(ptrs, mask=inside, other=0) != 0, s, float("-inf"))
        else:
            bias = tl.load(ptrs, mask=inside, other=float("-inf")).to(tl.float32)
            s += tl.where(bias == float("-inf"), bias, tl.maximum(bias, LOWEST_BIAS))
    if MASKED:
        s = tl.where(visible_mask(offs_m, offs_n, bounds), s, float("-inf"))
    return s, slope


@triton.jit
def dropped(p, terms, offs_m, offs_n):
    """Weights (or their gradients) after dropout: 0, or divided by the probability to stay."""
    _, key, keep_below, keep_scale = terms[2]
    if terms[2][0] is not None:
        p = tl.where(_kept(key, offs_m, offs_n, keep_below), p * keep_scale, 0.0)
    return p


@triton.jit
def gradients(
    products, dp, lse, rest, delta, terms, offs_m, offs_n, bounds, scale, dtype: tl.constexpr, MASKED: tl.constexpr
):
    """The weights after dropout, and the gradients of the scores and of the scaled products.

    p = softmax(s) and ds = p (dp - delta), from the products, their log-sum-exp and dp = dout . v.
    """
    s, slope = scores(products, terms, offs_m, offs_n, bounds, scale, dtype, MASKED)
    p = exp((s - lse) - rest, dtype)
    ds = p * (dropped(dp, terms, offs_m, offs_n) - delta)
    return dropped(p, terms, offs_m, offs_n), ds, ds * slope


@triton.jit
def same_segment(terms, offs_m, offs_n):
    """Whether query and key are of one segment."""
    _, q_ids_ptr, k_ids_ptr, _, first_q, first_k = terms[0]
    q_ids = tl.load(q_ids_ptr + first_q + offs_m, mask=offs_m < terms[4], other=0)
    k_ids = tl.load(k_ids_ptr + first_k + offs_n, mask=(offs_n >= 0) & (offs_n < terms[5]), other=0)
    return q_ids == k_ids


@triton.jit
def _segment_scores(terms, offs_m, offs_n):
    ptrs = terms[0][0] + 2 * (terms[0][3] + offs_m)
    same = tl.load(ptrs, mask=offs_m < terms[4], other=0.0).to(tl.float32)
    other = tl.load(ptrs + 1, mask=offs_m < terms[4], other=0.0).to(tl.float32)
    return tl.where(same_segment(terms, offs_m, offs_n), same, other)


@triton.jit
def _tanh(x, dtype: tl.constexpr):
    """tanh, by a polynomial near 0 where 1 - 2 / (e^2x + 1) cancels (Cephes, Moshier 1992)."""
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    e = exp(-2.0 * tl.abs(x), dtype)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * tl.full((), MIX_1, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), MIX_2, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _lane_key(seed_ptr, lane):
    seed = tl.load(seed_ptr)
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    return _mix(low ^ _mix(high ^ _mix(lane.to(tl.uint32))))


@triton.jit
def _kept(key, offs_m, offs_n, keep_below):
    """Which weights survive: a hash of seed, batch element, head, query and key (see txl_kernels/dropout.py)."""
    row = _mix(key + offs_m.to(tl.uint32) * tl.full((), ROW, tl.uint32))
    column_key = key ^ tl.full((), COLUMN_KEY, tl.uint32)
    column = _mix(column_key + offs_n.to(tl.uint32) * tl.full((), COLUMN, tl.uint32))
    x = (row + column) * tl.full((), MIX_1, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), MIX_2, tl.uint32)
    return x.to(tl.int32, bitcast=True) < keep_below
