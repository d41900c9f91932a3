"""The fused forward pass: softmax(scale (AC + BD)) V without a T x S tensor."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import (
    LOWEST,
    exp,
    exp_difference,
    head_matrix,
    head_pointer,
    key_count,
    load_rows,
    position_block,
    shift_in,
    store_rows,
    with_bias,
)
from txl_kernels.triton_backend.scores import dropout_key, dropped, scores


@triton.jit
def softmax_step(acc, l_i, m_i, s, dtype: tl.constexpr, EXACT: tl.constexpr):
    """Online softmax: p = exp(s - m), with the running sums rescaled to the new row maximum."""
    m_new = tl.maximum(m_i, tl.max(s, 1))
    p = exp_difference(s, m_new[:, None], dtype, EXACT)
    alpha = exp(m_i - m_new, dtype)
    return p, acc * alpha[:, None], l_i * alpha + tl.sum(p, 1), m_new


@triton.jit
def _forward_tile(
    acc,
    l_i,
    m_i,
    pending,
    q,
    q_position,
    k_matrix,
    v_matrix,
    table,
    terms,
    offs_m,
    j0,
    row0,
    bounds,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DR: tl.constexpr,
    BLOCK_DR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys; `pending` is what earlier blocks of (q + v) r^T left for this and later tiles."""
    # (M, D) x (D, N) -> (M, N), for content and for position
    offs_n = j0 + tl.arange(0, BLOCK_N)
    k = load_rows(k_matrix, j0, BLOCK_N, D, BLOCK_D, EDGE=MASKED)
    ac = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    raw = position_block(q_position, table, row0, BLOCK_N, DR, BLOCK_DR, PRECISION)
    bd, pending = shift_in(raw, pending, BLOCK_M, BLOCK_N)
    s, _ = scores(ac + bd, terms, offs_m[:, None], offs_n[None, :], bounds, scale, q.dtype, MASKED)
    p, acc, l_i, m_i = softmax_step(acc, l_i, m_i, s, q.dtype, EXACT=terms[1][0] is not None)
    p = dropped(p, terms, offs_m[:, None], offs_n[None, :])
    # (M, N) x (N, D) -> (M, D)
    v = load_rows(v_matrix, j0, BLOCK_N, D, BLOCK_D, EDGE=MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, l_i, m_i, pending


# Lengths, and strides that follow from them, must not compile a new variant each.
_UNSPECIALIZED = [
    "q_ptr", "k_ptr", "v_ptr", "r_ptr", "r_bias_ptr", "q_pos_ptr", "segment_ptr", "q_ids_ptr", "k_ids_ptr",
    "mask_ptr", "lengths_ptr", "seed_ptr", "content_bias_ptr", "position_bias_ptr", "out_ptr", "lse_ptr",
    "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh", "stride_rb", "stride_rh",
    "stride_pb", "stride_ph", "stride_mb", "stride_mh", "stride_mm", "stride_ob", "stride_oh",
    "H", "group", "T", "S", "P", "rel_offset", "begin", "reach", "keep_below", "range_keys",
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    r_ptr,
    r_bias_ptr,
    q_pos_ptr,
    segment_ptr,
    q_ids_ptr,
    k_ids_ptr,
    mask_ptr,
    lengths_ptr,
    seed_ptr,
    content_bias_ptr,
    position_bias_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_rb,
    stride_rh,
    stride_rp,
    stride_pb,
    stride_ph,
    stride_pm,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    stride_ob,
    stride_oh,
    stride_om,
    H,
    group,
    T,
    S,
    P,
    rel_offset,
    begin,
    reach,
    scale,
    softcap,
    keep_below,
    keep_scale,
    range_keys,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DR: tl.constexpr,
    BLOCK_DR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Output and log-sum-exp of BLOCK_M queries of one head. Grid: (query tiles * B * H, ranges), longest rows first.

    Walks the keys once; each tile multiplies one new block of r and keeps what the next tiles need of it. With
    range_keys (a multiple of BLOCK_N) each program has that many keys only, and out and lse a dimension of ranges
    before B.
    """
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    i0 = (n_tiles - 1 - pid % n_tiles) * BLOCK_M
    bh = (pid // n_tiles).to(tl.int64)
    b = bh // H
    h = bh % H

    keys = key_count(lengths_ptr, b, S)
    bounds = (keys, begin, reach)
    CUT: tl.constexpr = lengths_ptr is not None
    q_matrix = head_matrix(q_ptr, stride_qb, stride_qh, stride_qm, T, b, h, ALIGNED)
    k_matrix = head_matrix(k_ptr, stride_kb, stride_kh, stride_kn, keys, b, h // group, ALIGNED, CUT)
    v_matrix = head_matrix(v_ptr, stride_vb, stride_vh, stride_vn, keys, b, h // group, ALIGNED, CUT)
    # Rows of r in the future of every query are not read.
    r_rows = tl.minimum(P, rel_offset + reach)
    if r_ptr is not None:
        r_matrix = head_matrix(r_ptr, stride_rb, stride_rh, stride_rp, r_rows, b, h, ALIGNED)
    else:
        r_matrix = (None, stride_rp, r_rows)
    if r_bias_ptr is not None:
        r_bias_ptr += h * P
    table = r_matrix, r_bias_ptr
    lane = b * H + h
    terms = (
        (segment_ptr, q_ids_ptr, k_ids_ptr, lane * T, b * T, b * S),
        (mask_ptr, b * stride_mb + h * stride_mh, stride_mm, stride_mn),
        (seed_ptr, dropout_key(seed_ptr, lane), keep_below, keep_scale),
        softcap, T, S,
    )  # fmt: skip

    offs_m = i0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_matrix, i0, BLOCK_M, D, BLOCK_D)
    q_position = q
    if q_pos_ptr is not None:
        q_pos_matrix = head_matrix(q_pos_ptr, stride_pb, stride_ph, stride_pm, T, b, h, ALIGNED)
        q_position = load_rows(q_pos_matrix, i0, BLOCK_M, DR, BLOCK_DR)
    if position_bias_ptr is not None:
        q_position = with_bias(q, position_bias_ptr + h * D, D, BLOCK_D)
    if content_bias_ptr is not None:
        q = with_bias(q, content_bias_ptr + h * D, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m_i = tl.full((BLOCK_M,), LOWEST, tl.float32)

    # Some row sees keys of the tiles in [start, end), every row sees all keys in [lower, upper).
    start, lower = 0, 0
    if begin is not None:
        start = tl.maximum(0, i0 + begin) // BLOCK_N * BLOCK_N
        lower = tl.cdiv(tl.maximum(0, tl.minimum(i0 + BLOCK_M, T) - 1 + begin), BLOCK_N) * BLOCK_N
    upper = tl.minimum(keys, i0 + reach) // BLOCK_N * BLOCK_N
    end = tl.minimum(keys, i0 + BLOCK_M - 1 + reach)
    out_lane = bh
    if range_keys is not None:
        first = tl.program_id(1) * range_keys
        start, lower = tl.maximum(start, first), tl.maximum(lower, first)
        upper, end = tl.minimum(upper, first + range_keys), tl.minimum(end, first + range_keys)
        out_lane += tl.program_id(1) * (tl.num_programs(0) // n_tiles).to(tl.int64)
    # A loop that is unrolled counts its passes wrong where its end lies before its start.
    upper = tl.maximum(lower, upper)

    DESCRIPTORS: tl.constexpr = isinstance(k_ptr, tl.tensor_descriptor)
    c = rel_offset - i0
    GROUPS: tl.constexpr = (BLOCK_M + BLOCK_N - 1) // BLOCK_N
    pending = (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),) * GROUPS
    for e in tl.static_range(GROUPS):
        row0 = c + start + (e - GROUPS) * BLOCK_N
        raw = position_block(q_position, table, row0, BLOCK_N, DR, BLOCK_DR, PRECISION)
        _, pending = shift_in(raw, pending, BLOCK_M, BLOCK_N)

    if begin is not None:
        for j0 in tl.range(start, tl.minimum(lower, end), BLOCK_N, disable_licm=DESCRIPTORS):
            acc, l_i, m_i, pending = _forward_tile(
                acc, l_i, m_i, pending, q, q_position, k_matrix, v_matrix, table, terms, offs_m, j0, c + j0,
                bounds, scale, D, BLOCK_D, DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, MASKED=True,
            )  # fmt: skip
    for j0 in tl.range(lower, upper, BLOCK_N, loop_unroll_factor=UNROLL):
        acc, l_i, m_i, pending = _forward_tile(
            acc, l_i, m_i, pending, q, q_position, k_matrix, v_matrix, table, terms, offs_m, j0, c + j0,
            bounds, scale, D, BLOCK_D, DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, MASKED=False,
        )  # fmt: skip
    for j0 in tl.range(upper, end, BLOCK_N, disable_licm=DESCRIPTORS):
        acc, l_i, m_i, pending = _forward_tile(
            acc, l_i, m_i, pending, q, q_position, k_matrix, v_matrix, table, terms, offs_m, j0, c + j0,
            bounds, scale, D, BLOCK_D, DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, MASKED=True,
        )  # fmt: skip

    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    out_aligned: tl.constexpr = ALIGNED and range_keys is None
    out_matrix = (head_pointer(out_ptr, stride_ob, stride_oh, out_lane // H, h, out_aligned), stride_om, T)
    store_rows(out_matrix, acc / l_i[:, None], offs_m, D, BLOCK_D)
    stat_dtype: tl.constexpr = lse_ptr.dtype.element_ty
    lse = m_i.to(stat_dtype) + tl.log(l_i.to(stat_dtype))
    tl.store(lse_ptr + out_lane * T + offs_m, tl.where(empty, float("-inf"), lse), mask=offs_m < T)
