"""The gradients of k and v, and the keys' share of the content bias gradient, one program per key tile."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import (
    block_of,
    head_pointer,
    load_column,
    load_query,
    load_row_stats,
    load_rows,
    rotate_down,
    select_block,
    softmax_gradient,
    store_rows,
    visible_mask,
)


@triton.jit
def _dkv_tile(
    dk,
    dv,
    colsum,
    k,
    v,
    q_matrix,
    do_matrix,
    r_matrix,
    u_ptr,
    column_ptr,
    lse_ptr,
    delta_ptr,
    h,
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
    """One tile of queries, its scores transposed so that they are the left operands of dK and dV."""
    q = load_query(q_matrix, offs_m, u_ptr, h, D, BLOCK_D)
    # (N, D) x (D, M) -> (N, M): content, and position once for every block of r that the tile touches
    ac = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    raw = ()
    for g in tl.static_range((BLOCK_M + BLOCK_N - 1) // BLOCK_N + 1):
        rows = row0 - g * BLOCK_N + tl.arange(0, BLOCK_N)
        r = load_rows(r_matrix, rows, D, BLOCK_D)
        block = tl.dot(r, tl.trans(q), input_precision=PRECISION)
        if column_ptr is not None:
            block += load_column(column_ptr, rows, r_matrix[2])[:, None]
        raw = raw + (block,)
    e = block_of(tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None], BLOCK_N)
    bd = rotate_down(select_block(raw, e), BLOCK_M, BLOCK_N)
    s = (ac + bd) * scale
    if MASKED:
        s = tl.where(visible_mask(offs_m[None, :], offs_n[:, None], S, reach), s, float("-inf"))
    lse, delta = load_row_stats(lse_ptr, delta_ptr, offs_m, q_matrix[2])
    do = load_rows(do_matrix, offs_m, D, BLOCK_D)
    # (N, D) x (D, M) -> (N, M): dP
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    p, ds = softmax_gradient(s, lse[None, :], dp, delta[None, :], q.dtype)
    # (N, M) x (M, D) -> (N, D)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, colsum + tl.sum(ds, 1)


@triton.jit(
    do_not_specialize=[
        "q_ptr", "k_ptr", "v_ptr", "r_ptr", "u_ptr", "column_ptr", "do_ptr", "lse_ptr", "delta_ptr",
        "dk_ptr", "dv_ptr", "du_ptr", "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh",
        "stride_rh", "stride_dob", "stride_doh", "stride_dkb", "stride_dkh", "stride_dvb", "stride_dvh",
        "H", "T", "S", "P", "rel_offset", "reach",
    ]
)  # fmt: skip
def backward_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    r_ptr,
    u_ptr,
    column_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    du_ptr,
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
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
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
    """dk and dv of BLOCK_N keys of one head. Grid: (key tiles * B * H,), the keys with the most queries first.

    dv_j = sum_i p[i, j] do_i and dk_j = scale sum_i ds[i, j] (q_i + u). The column sums of ds give this tile's
    share of du = scale sum_{b, j} (sum_i ds[i, j]) k_j, stored in du (B, H, key tiles, D) in float32.
    """
    n_tiles = tl.cdiv(S, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid % n_tiles
    j0 = tile * BLOCK_N
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
    dk_matrix = (head_pointer(dk_ptr, stride_dkb, stride_dkh, b, h, ALIGNED), stride_dkn, S)
    dv_matrix = (head_pointer(dv_ptr, stride_dvb, stride_dvh, b, h, ALIGNED), stride_dvn, S)
    if column_ptr is not None:
        column_ptr += h * P
    lse_ptr += bh * T
    delta_ptr += bh * T

    offs_n = j0 + tl.arange(0, BLOCK_N)
    offs_y = tl.arange(0, BLOCK_M)
    k = load_rows(k_matrix, offs_n, D, BLOCK_D)
    v = load_rows(v_matrix, offs_n, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    colsum = tl.zeros((BLOCK_N,), tl.float32)

    # No query before `start` sees a key of this tile; those from `interior` on see all of them. Keys beyond S and
    # queries beyond T need no mask: the former are not stored, the latter have p = ds = 0.
    c = j0 + rel_offset
    start = tl.maximum(0, j0 - reach + 1) // BLOCK_M * BLOCK_M
    interior = tl.minimum(T, tl.cdiv(tl.maximum(0, j0 + BLOCK_N - reach), BLOCK_M) * BLOCK_M)
    for i0 in tl.range(start, interior, BLOCK_M, num_stages=1):
        dk, dv, colsum = _dkv_tile(
            dk, dv, colsum, k, v, q_matrix, do_matrix, r_matrix, u_ptr, column_ptr, lse_ptr, delta_ptr, h,
            i0 + offs_y, offs_n, c - i0, S, reach, scale,
            D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, MASKED=True,
        )  # fmt: skip
    for i0 in tl.range(tl.cdiv(interior, BLOCK_M) * BLOCK_M, T, BLOCK_M):
        dk, dv, colsum = _dkv_tile(
            dk, dv, colsum, k, v, q_matrix, do_matrix, r_matrix, u_ptr, column_ptr, lse_ptr, delta_ptr, h,
            i0 + offs_y, offs_n, c - i0, S, reach, scale,
            D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, MASKED=False,
        )  # fmt: skip

    store_rows(dk_matrix, dk * scale, offs_n, D, BLOCK_D)
    store_rows(dv_matrix, dv, offs_n, D, BLOCK_D)
    if u_ptr is not None:
        offs_d = tl.arange(0, BLOCK_D)
        colsum = tl.where(offs_n < S, colsum, 0.0)
        du = tl.sum(colsum[:, None] * k.to(tl.float32), 0) * scale
        tl.store(du_ptr + (bh * n_tiles + tile) * D + offs_d, du, mask=offs_d < D)
