"""The fused forward pass: softmax(scale (AC + BD)) V without a T x S tensor."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import (
    exp,
    head_pointer,
    load_query,
    load_rows,
    position_block,
    shift_in,
    store_rows,
    visible_mask,
)


@triton.jit
def _softmax_step(acc, l_i, m_i, s, dtype: tl.constexpr):
    """Online softmax: p = exp(s - m), with the running sums rescaled to the new row maximum."""
    m_new = tl.maximum(m_i, tl.max(s, 1))
    p = exp(s - m_new[:, None], dtype)
    alpha = exp(m_i - m_new, dtype)
    return p, acc * alpha[:, None], l_i * alpha + tl.sum(p, 1), m_new


@triton.jit
def _forward_tile(
    acc,
    l_i,
    m_i,
    pending,
    q,
    k_matrix,
    v_matrix,
    r_matrix,
    column_ptr,
    offs_m,
    offs_n,
    row0,
    S,
    reach,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys; `pending` is what earlier blocks of (q + v) r^T left for this and later tiles."""
    # (M, D) x (D, N) -> (M, N), for content and for position
    k = load_rows(k_matrix, offs_n, D, BLOCK_D)
    ac = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    rows = row0 + tl.arange(0, BLOCK_N)
    raw = position_block(q, r_matrix, column_ptr, rows, D, BLOCK_D, PRECISION)
    bd, pending = shift_in(raw, pending, BLOCK_M, BLOCK_N)
    s = (ac + bd) * scale
    if MASKED:
        s = tl.where(visible_mask(offs_m[:, None], offs_n[None, :], S, reach), s, float("-inf"))
    p, acc, l_i, m_i = _softmax_step(acc, l_i, m_i, s, q.dtype)
    # (M, N) x (N, D) -> (M, D)
    v = load_rows(v_matrix, offs_n, D, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, l_i, m_i, pending


# Lengths, and strides that follow from them, must not compile a new variant each.
_UNSPECIALIZED = [
    "q_ptr", "k_ptr", "v_ptr", "r_ptr", "u_ptr", "column_ptr", "out_ptr", "lse_ptr",
    "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh", "stride_rh", "stride_ob", "stride_oh",
    "H", "T", "S", "P", "rel_offset", "reach",
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    r_ptr,
    u_ptr,
    column_ptr,
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
    stride_rh,
    stride_rp,
    stride_ob,
    stride_oh,
    stride_om,
    H,
    T,
    S,
    P,
    rel_offset,
    reach,
    scale,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Output and log-sum-exp of BLOCK_M queries of one head. Grid: (query tiles * B * H,), longest rows first.

    Walks the keys once; each tile multiplies one new block of r and keeps what the next tiles need of it.
    """
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    i0 = (n_tiles - 1 - pid % n_tiles) * BLOCK_M
    bh = (pid // n_tiles).to(tl.int64)
    b = bh // H
    h = bh % H

    q_matrix = (head_pointer(q_ptr, stride_qb, stride_qh, b, h, ALIGNED), stride_qm, T)
    k_matrix = (head_pointer(k_ptr, stride_kb, stride_kh, b, h, ALIGNED), stride_kn, S)
    v_matrix = (head_pointer(v_ptr, stride_vb, stride_vh, b, h, ALIGNED), stride_vn, S)
    # Rows of r in the future of every query are not read.
    r_rows = tl.minimum(P, rel_offset + reach)
    r_matrix = (head_pointer(r_ptr, 0, stride_rh, b, h, ALIGNED), stride_rp, r_rows)
    out_matrix = (head_pointer(out_ptr, stride_ob, stride_oh, b, h, ALIGNED), stride_om, T)
    if column_ptr is not None:
        column_ptr += h * P

    offs_m = i0 + tl.arange(0, BLOCK_M)
    q = load_query(q_matrix, offs_m, u_ptr, h, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    c = rel_offset - i0
    offs_x = tl.arange(0, BLOCK_N)
    GROUPS: tl.constexpr = (BLOCK_M + BLOCK_N - 1) // BLOCK_N
    pending = (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),) * GROUPS
    for e in tl.static_range(GROUPS):
        rows = c + (e - GROUPS) * BLOCK_N + offs_x
        raw = position_block(q, r_matrix, column_ptr, rows, D, BLOCK_D, PRECISION)
        _, pending = shift_in(raw, pending, BLOCK_M, BLOCK_N)

    # Every row sees the keys below `interior`; none sees those from `end` on.
    interior = tl.minimum(S, i0 + reach) // BLOCK_N * BLOCK_N
    end = tl.minimum(S, i0 + BLOCK_M - 1 + reach)
    for j0 in tl.range(0, interior, BLOCK_N):
        acc, l_i, m_i, pending = _forward_tile(
            acc, l_i, m_i, pending, q, k_matrix, v_matrix, r_matrix, column_ptr, offs_m, j0 + offs_x, c + j0,
            S, reach, scale, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, MASKED=False,
        )  # fmt: skip
    for j0 in tl.range(interior, end, BLOCK_N):
        acc, l_i, m_i, pending = _forward_tile(
            acc, l_i, m_i, pending, q, k_matrix, v_matrix, r_matrix, column_ptr, offs_m, j0 + offs_x, c + j0,
            S, reach, scale, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, MASKED=True,
        )  # fmt: skip

    store_rows(out_matrix, acc / l_i[:, None], offs_m, D, BLOCK_D)
    tl.store(lse_ptr + bh * T + offs_m, m_i + tl.log(l_i), mask=offs_m < T)
