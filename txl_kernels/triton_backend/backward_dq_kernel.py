"""The gradients of q, q_pos and the segment scores, one program per query tile."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import (
    collect,
    head_matrix,
    head_pointer,
    key_count,
    load_row_stats,
    load_rows,
    position_block,
    shift_in,
    store_rows,
)
from txl_kernels.triton_backend.scores import dropout_key, gradients, same_segment


@triton.jit
def _add_position_part(
    grads,
    ds_raw,
    table,
    first,
    ROWS: tl.constexpr,
    DR: tl.constexpr,
    BLOCK_DR: tl.constexpr,
    PRECISION: tl.constexpr,
    SEPARATE: tl.constexpr,
):
    """Adds the product of a finished block of ds with its rows of r: to dq, or to dq_pos where that is SEPARATE."""
    matrix, _ = table
    if matrix[0] is not None:
        # (M, N) x (N, DR) -> (M, DR)
        r = load_rows(matrix, first, ROWS, DR, BLOCK_DR)
        part = tl.dot(ds_raw, r, grads[1] if SEPARATE else grads[0], input_precision=PRECISION)
        grads = (grads[0], part) + grads[2:] if SEPARATE else (part,) + grads[1:]
    return grads


@triton.jit
def _dq_tile(
    grads,
    pending,
    partial,
    q,
    q_position,
    do,
    lse,
    rest,
    delta,
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
    SEPARATE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys: its content part of dq, and the position part of the block of r that it completes."""
    # (M, D) x (D, N) -> (M, N): content, position, dP
    offs_n = j0 + tl.arange(0, BLOCK_N)
    k = load_rows(k_matrix, j0, BLOCK_N, D, BLOCK_D, EDGE=MASKED)
    ac = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    raw = position_block(q_position, table, row0, BLOCK_N, DR, BLOCK_DR, PRECISION)
    bd, pending = shift_in(raw, pending, BLOCK_M, BLOCK_N)
    v = load_rows(v_matrix, j0, BLOCK_N, D, BLOCK_D, EDGE=MASKED)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    _, _, ds = gradients(
        ac + bd,
        dp,
        lse[:, None],
        rest[:, None],
        delta[:, None],
        terms,
        offs_m[:, None],
        offs_n[None, :],
        bounds,
        scale,
        q.dtype,
        MASKED,
    )
    if terms[0][0] is not None:
        same = same_segment(terms, offs_m[:, None], offs_n[None, :])
        same_sum = grads[len(grads) - 2] + tl.sum(tl.where(same, ds, 0.0), 1)
        grads = grads[: len(grads) - 2] + (same_sum, grads[len(grads) - 1] + tl.sum(tl.where(same, 0.0, ds), 1))
    ds = ds.to(k.dtype)
    # (M, N) x (N, D) -> (M, D): content, position
    grads = (tl.dot(ds, k, grads[0], input_precision=PRECISION),) + grads[1:]
    ds_raw, partial = collect(ds, partial, BLOCK_M, BLOCK_N)
    row0 -= len(partial) * BLOCK_N
    grads = _add_position_part(grads, ds_raw, table, row0, BLOCK_N, DR, BLOCK_DR, PRECISION, SEPARATE)
    return grads, pending, partial


@triton.jit(
    do_not_specialize=[
        "q_ptr", "k_ptr", "v_ptr", "r_ptr", "r_bias_ptr", "q_pos_ptr", "segment_ptr", "q_ids_ptr",
        "k_ids_ptr", "mask_ptr", "lengths_ptr", "seed_ptr", "do_ptr", "lse_ptr", "rest_ptr", "delta_ptr",
        "dq_ptr", "dq_pos_ptr",
        "dsegment_ptr", "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh", "stride_rb",
        "stride_rh", "stride_pb", "stride_ph", "stride_mb", "stride_mh", "stride_mm", "stride_dob",
        "stride_doh", "stride_dqb", "stride_dqh", "stride_dpb", "stride_dph",
        "H", "group", "T", "S", "P", "rel_offset", "begin", "reach", "keep_below",
    ]
)  # fmt: skip
def backward_dq_kernel(
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
    do_ptr,
    lse_ptr,
    rest_ptr,
    delta_ptr,
    dq_ptr,
    dq_pos_ptr,
    dsegment_ptr,
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
    stride_dob,
    stride_doh,
    stride_dom,
    stride_dqb,
    stride_dqh,
    stride_dqm,
    stride_dpb,
    stride_dph,
    stride_dpm,
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
    """dq of BLOCK_M queries of one head. Grid: (query tiles * B * H,), longest rows first.

    dq_i = scale (sum_j ds[i, j] k_j + sum_p ds_raw[i, p] r_p), ds_raw[i, p] = ds[i, j] at p = j - i + rel_offset:
    one accumulator, unless dq_pos takes the second sum. The key loop is that of the forward; the products with r lag
    behind it by the tiles that share a block of r. dsegment (B, H, T, 2) gets the sums of ds over the keys of the
    query's segment and over the others, in float32.
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
    do_matrix = head_matrix(do_ptr, stride_dob, stride_doh, stride_dom, T, b, h, ALIGNED)
    dq_matrix = (head_pointer(dq_ptr, stride_dqb, stride_dqh, b, h, ALIGNED), stride_dqm, T)
    lane = b * H + h
    terms = (
        (segment_ptr, q_ids_ptr, k_ids_ptr, lane * T, b * T, b * S),
        (mask_ptr, b * stride_mb + h * stride_mh, stride_mm, stride_mn),
        (seed_ptr, dropout_key(seed_ptr, lane), keep_below, keep_scale),
        softcap, T, S,
    )  # fmt: skip

    offs_m = i0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_matrix, i0, BLOCK_M, D, BLOCK_D)
    do = load_rows(do_matrix, i0, BLOCK_M, D, BLOCK_D)
    lse, rest, delta = load_row_stats((lse_ptr, rest_ptr, delta_ptr, bh * T), offs_m, T)
    # dq, then dq_pos, then the two sums for the segment scores: those that are asked for.
    grads = (tl.zeros((BLOCK_M, BLOCK_D), tl.float32),)
    q_position = q
    SEPARATE: tl.constexpr = dq_pos_ptr is not None
    if q_pos_ptr is not None:
        q_pos_matrix = head_matrix(q_pos_ptr, stride_pb, stride_ph, stride_pm, T, b, h, ALIGNED)
        q_position = load_rows(q_pos_matrix, i0, BLOCK_M, DR, BLOCK_DR)
    if SEPARATE:
        grads = grads + (tl.zeros((BLOCK_M, BLOCK_DR), tl.float32),)
    if segment_ptr is not None:
        grads = grads + (tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32))

    # Some row sees keys of the tiles in [start, end), every row sees all keys in [lower, upper).
    start, lower = 0, 0
    if begin is not None:
        start = tl.maximum(0, i0 + begin) // BLOCK_N * BLOCK_N
        lower = tl.cdiv(tl.maximum(0, tl.minimum(i0 + BLOCK_M, T) - 1 + begin), BLOCK_N) * BLOCK_N
    upper = tl.minimum(keys, i0 + reach) // BLOCK_N * BLOCK_N
    end = tl.maximum(start, tl.cdiv(tl.minimum(keys, i0 + BLOCK_M - 1 + reach), BLOCK_N) * BLOCK_N)

    # What takes registers from the main loop: with pointers, edges that are pipelined too; with descriptors, what LLVM
    # hoists out of the edges.
    DESCRIPTORS: tl.constexpr = isinstance(k_ptr, tl.tensor_descriptor)
    EDGE_STAGES: tl.constexpr = None if DESCRIPTORS else 1
    c = rel_offset - i0
    GROUPS: tl.constexpr = (BLOCK_M + BLOCK_N - 1) // BLOCK_N
    pending = (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),) * GROUPS
    partial = (tl.zeros((BLOCK_M, BLOCK_N), q.dtype),) * GROUPS
    for e in tl.static_range(GROUPS):
        row0 = c + start + (e - GROUPS) * BLOCK_N
        raw = position_block(q_position, table, row0, BLOCK_N, DR, BLOCK_DR, PRECISION)
        _, pending = shift_in(raw, pending, BLOCK_M, BLOCK_N)

    if begin is not None:
        for j0 in tl.range(start, tl.minimum(lower, end), BLOCK_N, num_stages=EDGE_STAGES, disable_licm=DESCRIPTORS):
            grads, pending, partial = _dq_tile(
                grads, pending, partial, q, q_position, do, lse, rest, delta, k_matrix, v_matrix, table, terms,
                offs_m, j0, c + j0, bounds, scale,
                D, BLOCK_D, DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, SEPARATE, MASKED=True,
            )  # fmt: skip
    for j0 in tl.range(lower, upper, BLOCK_N, loop_unroll_factor=UNROLL):
        grads, pending, partial = _dq_tile(
            grads, pending, partial, q, q_position, do, lse, rest, delta, k_matrix, v_matrix, table, terms,
            offs_m, j0, c + j0, bounds, scale,
            D, BLOCK_D, DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, SEPARATE, MASKED=False,
        )  # fmt: skip
    for j0 in tl.range(tl.maximum(lower, upper), end, BLOCK_N, num_stages=EDGE_STAGES, disable_licm=DESCRIPTORS):
        grads, pending, partial = _dq_tile(
            grads, pending, partial, q, q_position, do, lse, rest, delta, k_matrix, v_matrix, table, terms,
            offs_m, j0, c + j0, bounds, scale,
            D, BLOCK_D, DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, SEPARATE, MASKED=True,
        )  # fmt: skip
    for e in tl.static_range(GROUPS):
        ds_raw, partial = collect(tl.zeros((BLOCK_M, BLOCK_N), q.dtype), partial, BLOCK_M, BLOCK_N)
        row0 = c + end + (e - GROUPS) * BLOCK_N
        grads = _add_position_part(grads, ds_raw, table, row0, BLOCK_N, DR, BLOCK_DR, PRECISION, SEPARATE)

    store_rows(dq_matrix, grads[0] * scale, offs_m, D, BLOCK_D)
    if SEPARATE:
        dq_pos_matrix = (head_pointer(dq_pos_ptr, stride_dpb, stride_dph, b, h, ALIGNED), stride_dpm, T)
        store_rows(dq_pos_matrix, grads[1] * scale, offs_m, DR, BLOCK_DR)
    if segment_ptr is not None:
        dsegment_ptr += 2 * (bh * T + offs_m)
        tl.store(dsegment_ptr, grads[len(grads) - 2] * scale, mask=offs_m < T)
        tl.store(dsegment_ptr + 1, grads[len(grads) - 1] * scale, mask=offs_m < T)
