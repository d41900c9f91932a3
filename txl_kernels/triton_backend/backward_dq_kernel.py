"""The gradients of q, q_pos, the position bias and the segment scores from ds, one program per query tile."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import (
    edge_tile,
    head_matrix,
    head_pointer,
    key_count,
    load_raw_scores,
    load_rows,
    load_scores,
    scores_matrix,
    store_row,
    store_rows,
    visible_mask,
)
from txl_kernels.triton_backend.scores import same_segment


@triton.jit
def _content_tile(
    grads,
    ds_matrix,
    k_matrix,
    terms,
    i0,
    j0,
    j_first,
    bounds,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys: its part of dq, and of the sums over the keys of the query's segment and over the others."""
    offs_m = (i0 + tl.arange(0, BLOCK_M))[:, None]
    offs_n = (j0 + tl.arange(0, BLOCK_N))[None, :]
    ds = load_scores(ds_matrix, i0, j0, BLOCK_M, BLOCK_N)
    if MASKED:
        ds = tl.where(visible_mask(offs_m, offs_n, bounds), ds, 0.0)
    k = load_rows(k_matrix, j_first + j0, BLOCK_N, D, BLOCK_D, EDGE=MASKED)
    if terms[0][0] is not None:
        same = same_segment(terms, offs_m, offs_n)
        of_same, of_others = tl.where(same, ds, 0.0), tl.where(same, 0.0, ds)
        sums = grads[1] + tl.sum(of_same.to(tl.float32), 1), grads[2] + tl.sum(of_others.to(tl.float32), 1)
        # Multiplied from registers: a tile that is both read and multiplied where it lies has a buffer too few, and the
        # copy engine overwrites it under the product (Triton 3.6 and 3.7, tests/emulator).
        ds = of_same + of_others
    # (M, N) x (N, D) -> (M, D)
    dq = tl.dot(ds, k, grads[0], input_precision=PRECISION)
    return (dq,) if terms[0][0] is None else (dq, sums[0], sums[1])


@triton.jit
def _position_tile(
    dq,
    ds_matrix,
    r_matrix,
    i0,
    p0,
    shift,
    bounds,
    DR: tl.constexpr,
    BLOCK_DR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of rows of r: its part of dq."""
    ds = load_raw_scores(ds_matrix, i0, p0, shift, bounds, BLOCK_M, BLOCK_N, MASKED)
    r = load_rows(r_matrix, p0, BLOCK_N, DR, BLOCK_DR)
    # (M, N) x (N, DR) -> (M, DR)
    return tl.dot(ds, r, dq, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=[
        "k_ptr", "r_ptr", "q_ids_ptr", "k_ids_ptr", "lengths_ptr",
        "dq_ptr", "dq_pos_ptr", "dposition_bias_ptr", "dsegment_ptr",
        "stride_kb", "stride_kh", "stride_rb", "stride_rh", "stride_dqb", "stride_dqh", "stride_dpb", "stride_dph",
        "H", "group", "T", "S", "r_rows", "shift", "begin", "reach",
        "b_first", "h_first", "n_heads", "i_first", "n_rows", "j_first", "j_last",
    ]
)  # fmt: skip
def backward_dq_kernel(
    ds_ptr,
    ds_raw_ptr,
    k_ptr,
    r_ptr,
    q_ids_ptr,
    k_ids_ptr,
    lengths_ptr,
    dq_ptr,
    dq_pos_ptr,
    dposition_bias_ptr,
    dsegment_ptr,
    stride_ds,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_rb,
    stride_rh,
    stride_rp,
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
    r_rows,
    shift,
    begin,
    reach,
    scale,
    b_first,
    h_first,
    n_heads,
    i_first,
    n_rows,
    j_first,
    j_last,
    ADD: tl.constexpr,
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
    """dq of BLOCK_M queries of one head, from the keys of the range.

    Grid: (query tiles * heads * batch elements of the range,), longest rows first.

    dq_i = scale (sum_p ds_raw[i, p] r_p + sum_j ds[i, j] k_j), ds_raw[i, p] = ds[i, j] at p = j - i + rel_offset: one
    accumulator, unless dq_pos takes the first sum. That sum over the tile's queries is its share of the position bias
    gradient, stored in dposition_bias (B, H, query tiles, D); dsegment (B, H, T, 2) gets the sums of ds over the keys
    of the query's segment and over the others; both in float32. With ADD all are added to what earlier ranges left.

    Inside, queries and keys count from i_first and j_first, and so do begin, reach and shift.
    """
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    pid = tl.program_id(0)
    i0 = (n_tiles - 1 - pid % n_tiles) * BLOCK_M
    i_end = tl.minimum(i0 + BLOCK_M, n_rows) - 1
    slot = pid // n_tiles
    b = (b_first + slot // n_heads).to(tl.int64)
    h = (h_first + slot % n_heads).to(tl.int64)
    lane = b * H + h
    rows = i_first + i0 + tl.arange(0, BLOCK_M)

    keys = key_count(lengths_ptr, b, S)
    CUT: tl.constexpr = lengths_ptr is not None
    k_matrix = head_matrix(k_ptr, stride_kb, stride_kh, stride_kn, keys, b, h // group, ALIGNED, CUT)
    keys = tl.minimum(keys, j_last) - j_first
    bounds = (keys, begin, reach)
    grads = (tl.zeros((BLOCK_M, BLOCK_D), tl.float32),)

    if r_ptr is not None:
        # Some query sees a key in `count` tiles of rows from `first` on, every query does in [lower, upper) of these.
        raw_matrix = scores_matrix(ds_raw_ptr, stride_ds, n_rows, slot)
        r_matrix = head_matrix(r_ptr, stride_rb, stride_rh, stride_rp, r_rows, b, h, ALIGNED)
        seen_by_some, seen_by_all = -i_end, -i0
        if begin is not None:
            seen_by_some, seen_by_all = tl.maximum(seen_by_some, begin), tl.maximum(seen_by_all, begin)
        first = tl.maximum(seen_by_some + shift, 0)
        last = tl.minimum(tl.minimum(keys - i0, reach) + shift, r_rows)
        count = tl.cdiv(tl.maximum(0, last - first), BLOCK_N)
        lower = tl.minimum(count, tl.cdiv(tl.maximum(0, seen_by_all + shift - first), BLOCK_N))
        upper = tl.maximum(0, tl.minimum(keys - i_end, reach) + shift - first) // BLOCK_N
        upper = tl.where(i0 + BLOCK_M > n_rows, 0, tl.minimum(count, upper))
        upper = tl.maximum(lower, upper)
        dq_position = tl.zeros((BLOCK_M, BLOCK_DR), tl.float32)
        for tile in tl.range(lower, upper, loop_unroll_factor=UNROLL):
            dq_position = _position_tile(
                dq_position, raw_matrix, r_matrix, i0, first + tile * BLOCK_N, shift, bounds,
                DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, MASKED=False,
            )  # fmt: skip
        for edge in tl.range(0, count - (upper - lower)):
            dq_position = _position_tile(
                dq_position, raw_matrix, r_matrix, i0, first + edge_tile(edge, lower, upper) * BLOCK_N, shift, bounds,
                DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, MASKED=True,
            )  # fmt: skip
        if dposition_bias_ptr is not None:
            row = lane * tl.cdiv(T, BLOCK_M) + (i_first + i0) // BLOCK_M
            store_row(dposition_bias_ptr + row * D, tl.sum(dq_position, 0) * scale, D, BLOCK_D, ADD)
        if dq_pos_ptr is not None:
            dq_pos_matrix = (head_pointer(dq_pos_ptr, stride_dpb, stride_dph, b, h, ALIGNED), stride_dpm, T)
            store_rows(dq_pos_matrix, dq_position * scale, rows, DR, BLOCK_DR, ADD)
        else:
            grads = (dq_position,)

    # The same of keys.
    ds_matrix = scores_matrix(ds_ptr, stride_ds, n_rows, slot)
    ids = (q_ids_ptr, q_ids_ptr, k_ids_ptr, 0, b * T + i_first, b * S + j_first)
    terms = ids, None, None, None, n_rows, keys
    if q_ids_ptr is not None:
        grads = grads + (tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32))
    first, lower = 0, 0
    if begin is not None:
        first = tl.maximum(0, i0 + begin) // BLOCK_N * BLOCK_N
        lower = tl.cdiv(tl.maximum(0, i_end + begin - first), BLOCK_N)
    count = tl.cdiv(tl.maximum(0, tl.minimum(keys, i_end + reach) - first), BLOCK_N)
    lower = tl.minimum(count, lower)
    upper = tl.maximum(lower, tl.maximum(0, tl.minimum(keys, i0 + reach) - first) // BLOCK_N)
    for tile in tl.range(lower, upper, loop_unroll_factor=UNROLL):
        grads = _content_tile(
            grads, ds_matrix, k_matrix, terms, i0, first + tile * BLOCK_N, j_first, bounds,
            D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, MASKED=False,
        )  # fmt: skip
    for edge in tl.range(0, count - (upper - lower)):
        grads = _content_tile(
            grads, ds_matrix, k_matrix, terms, i0, first + edge_tile(edge, lower, upper) * BLOCK_N, j_first, bounds,
            D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, MASKED=True,
        )  # fmt: skip

    dq_matrix = (head_pointer(dq_ptr, stride_dqb, stride_dqh, b, h, ALIGNED), stride_dqm, T)
    store_rows(dq_matrix, grads[0] * scale, rows, D, BLOCK_D, ADD)
    if q_ids_ptr is not None:
        for which in tl.static_range(2):
            ptrs = dsegment_ptr + 2 * (lane * T + rows) + which
            total = grads[1 + which] * scale
            if ADD:
                total += tl.load(ptrs, mask=rows < T, other=0.0)
            tl.store(ptrs, total, mask=rows < T)
