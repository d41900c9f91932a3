"""The gradient of q, one program per query tile."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import (
    collect,
    head_pointer,
    load_query,
    load_row_stats,
    load_rows,
    position_block,
    shift_in,
    softmax_gradient,
    store_rows,
    visible_mask,
)


@triton.jit
def _dq_tile(
    dq,
    pending,
    partial,
    q,
    do,
    lse,
    delta,
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
    """One tile of keys: its content part of dq, and the position part of the block of r that it completes."""
    # (M, D) x (D, N) -> (M, N): content, position, dP
    k = load_rows(k_matrix, offs_n, D, BLOCK_D)
    ac = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    rows = row0 + tl.arange(0, BLOCK_N)
    raw = position_block(q, r_matrix, column_ptr, rows, D, BLOCK_D, PRECISION)
    bd, pending = shift_in(raw, pending, BLOCK_M, BLOCK_N)
    s = (ac + bd) * scale
    if MASKED:
        s = tl.where(visible_mask(offs_m[:, None], offs_n[None, :], S, reach), s, float("-inf"))
    v = load_rows(v_matrix, offs_n, D, BLOCK_D)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    _, ds = softmax_gradient(s, lse[:, None], dp, delta[:, None], q.dtype)
    ds = ds.to(k.dtype)
    # (M, N) x (N, D) -> (M, D): content, position
    dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    ds_raw, partial = collect(ds, partial, BLOCK_M, BLOCK_N)
    r = load_rows(r_matrix, rows - len(partial) * BLOCK_N, D, BLOCK_D)
    dq = tl.dot(ds_raw, r, dq, input_precision=PRECISION)
    return dq, pending, partial


@triton.jit(
    do_not_specialize=[
        "q_ptr", "k_ptr", "v_ptr", "r_ptr", "u_ptr", "column_ptr", "do_ptr", "lse_ptr", "delta_ptr", "dq_ptr",
        "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh", "stride_rh",
        "stride_dob", "stride_doh", "stride_dqb", "stride_dqh", "H", "T", "S", "P", "rel_offset", "reach",
    ]
)  # fmt: skip
def backward_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    r_ptr,
    u_ptr,
    column_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    stride_dob,
    stride_doh,
    stride_dom,
    stride_dqb,
    stride_dqh,
    stride_dqm,
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
    """dq of BLOCK_M queries of one head. Grid: (query tiles * B * H,), longest rows first.

    dq_i = scale (sum_j ds[i, j] k_j + sum_p ds_raw[i, p] r_p), ds_raw[i, p] = ds[i, j] at p = j - i + rel_offset:
    one accumulator. The key loop is that of the forward; the products with r lag behind it by the tiles that
    share a block of r.
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
    do_matrix = (head_pointer(do_ptr, stride_dob, stride_doh, b, h, ALIGNED), stride_dom, T)
    dq_matrix = (head_pointer(dq_ptr, stride_dqb, stride_dqh, b, h, ALIGNED), stride_dqm, T)
    if column_ptr is not None:
        column_ptr += h * P

    offs_m = i0 + tl.arange(0, BLOCK_M)
    offs_x = tl.arange(0, BLOCK_N)
    q = load_query(q_matrix, offs_m, u_ptr, h, D, BLOCK_D)
    do = load_rows(do_matrix, offs_m, D, BLOCK_D)
    lse, delta = load_row_stats(lse_ptr + bh * T, delta_ptr + bh * T, offs_m, T)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    c = rel_offset - i0
    GROUPS: tl.constexpr = (BLOCK_M + BLOCK_N - 1) // BLOCK_N
    pending = (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),) * GROUPS
    partial = (tl.zeros((BLOCK_M, BLOCK_N), q.dtype),) * GROUPS
    for e in tl.static_range(GROUPS):
        rows = c + (e - GROUPS) * BLOCK_N + offs_x
        raw = position_block(q, r_matrix, column_ptr, rows, D, BLOCK_D, PRECISION)
        _, pending = shift_in(raw, pending, BLOCK_M, BLOCK_N)

    # Every row sees the keys below `interior`; none sees those from `end` on.
    interior = tl.minimum(S, i0 + reach) // BLOCK_N * BLOCK_N
    end = tl.cdiv(tl.minimum(S, i0 + BLOCK_M - 1 + reach), BLOCK_N) * BLOCK_N
    for j0 in tl.range(0, interior, BLOCK_N):
        dq, pending, partial = _dq_tile(
            dq, pending, partial, q, do, lse, delta, k_matrix, v_matrix, r_matrix, column_ptr,
            offs_m, j0 + offs_x, c + j0, S, reach, scale,
            D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, MASKED=False,
        )  # fmt: skip
    for j0 in tl.range(interior, end, BLOCK_N, num_stages=1):
        dq, pending, partial = _dq_tile(
            dq, pending, partial, q, do, lse, delta, k_matrix, v_matrix, r_matrix, column_ptr,
            offs_m, j0 + offs_x, c + j0, S, reach, scale,
            D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, MASKED=True,
        )  # fmt: skip
    for e in tl.static_range(GROUPS):
        ds_raw, partial = collect(tl.zeros((BLOCK_M, BLOCK_N), q.dtype), partial, BLOCK_M, BLOCK_N)
        r = load_rows(r_matrix, c + end + (e - GROUPS) * BLOCK_N + offs_x, D, BLOCK_D)
        dq = tl.dot(ds_raw, r, dq, input_precision=PRECISION)

    store_rows(dq_matrix, dq * scale, offs_m, D, BLOCK_D)
