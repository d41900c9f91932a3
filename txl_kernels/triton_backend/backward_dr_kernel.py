"""The gradients of r and r_bias from ds, one program per block of rows and part of the batch elements."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import (
    edge_tile,
    head_matrix,
    key_count,
    load_raw_scores,
    load_rows,
    scores_matrix,
    store_rows,
)


@triton.jit
def _dr_tile(
    sums,
    ds_matrix,
    q_matrix,
    i0,
    i_first,
    p0,
    shift,
    bounds,
    DR: tl.constexpr,
    BLOCK_DR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    WITH_R: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of queries: its part of dr, then of the column sums of ds; those that are asked for."""
    ds = load_raw_scores(ds_matrix, i0, p0, shift, bounds, BLOCK_M, BLOCK_N, MASKED)
    new = ()
    if WITH_R:
        q = load_rows(q_matrix, i_first + i0, BLOCK_M, DR, BLOCK_DR)
        # (N, M) x (M, DR) -> (N, DR)
        new = new + (tl.dot(tl.trans(ds), q, sums[0], input_precision=PRECISION),)
    if WITH_BIAS:
        new = new + (sums[len(sums) - 1] + tl.sum(ds.to(tl.float32), 0),)
    return new


@triton.jit(
    do_not_specialize=[
        "q_pos_ptr", "lengths_ptr", "dr_ptr", "dr_bias_ptr",
        "stride_pb", "stride_ph", "H", "T", "S", "P", "r_rows", "shift", "begin", "reach",
        "b_first", "n_batches", "h_first", "n_heads", "i_first", "n_rows", "j_first", "j_last",
        "first_block", "n_blocks", "first_part",
    ]
)  # fmt: skip
def backward_dr_kernel(
    ds_ptr,
    q_pos_ptr,
    lengths_ptr,
    dr_ptr,
    dr_bias_ptr,
    stride_ds,
    stride_pb,
    stride_ph,
    stride_pm,
    H,
    T,
    S,
    P,
    r_rows,
    shift,
    begin,
    reach,
    scale,
    b_first,
    n_batches,
    h_first,
    n_heads,
    i_first,
    n_rows,
    j_first,
    j_last,
    first_block,
    n_blocks,
    first_part,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    DR: tl.constexpr,
    BLOCK_DR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """dr of BLOCK_N rows of one head, summed over the queries of the range and a part of its batch elements.

    Grid: (row blocks * heads of the range, parts).

    dr_p = scale sum_{b, i} ds_raw[i, p] q_pos_i, (parts, H, P, DR); the column sums of ds_raw are the gradient of
    r_bias, (parts, H, P); both in float32. With ADD they are added to what earlier ranges left. Where every batch
    element has an r of its own, it is a part.

    Inside, queries and keys count from i_first and j_first, and so do begin, reach and shift.
    """
    pid = tl.program_id(0)
    p0 = (first_block + pid % n_blocks) * BLOCK_N
    h = (h_first + pid // n_blocks).to(tl.int64)
    part = tl.program_id(1)
    n_parts = tl.num_programs(1)

    # Every query that has a key at a row of [hidden_below, hidden_from) sees it, as far as lengths and masks allow.
    hidden_below, hidden_from = 0, tl.minimum(reach + shift, r_rows)
    if begin is not None:
        hidden_below = begin + shift
    some_visible = (p0 < hidden_from) & (p0 + BLOCK_N > hidden_below)
    WITH_R: tl.constexpr = dr_ptr is not None
    WITH_BIAS: tl.constexpr = dr_bias_ptr is not None
    sums = ()
    if WITH_R:
        sums = sums + (tl.zeros((BLOCK_N, BLOCK_DR), tl.float32),)
    if WITH_BIAS:
        sums = sums + (tl.zeros((BLOCK_N,), tl.float32),)

    c = p0 - shift
    for batch in tl.range((n_batches * part) // n_parts, (n_batches * (part + 1)) // n_parts):
        b = (b_first + batch).to(tl.int64)
        keys = tl.minimum(key_count(lengths_ptr, b, S), j_last) - j_first
        bounds = (keys, begin, reach)
        # n_tiles query tiles from `first` on meet keys in these rows, the tiles [lower, upper) of them nothing else.
        first = tl.maximum(0, 1 - BLOCK_N - c)
        n_tiles = tl.where(some_visible, tl.cdiv(tl.maximum(0, tl.minimum(n_rows, keys - c) - first), BLOCK_M), 0)
        lower = tl.minimum(n_tiles, tl.cdiv(tl.maximum(0, -c - first), BLOCK_M))
        upper = tl.maximum(0, tl.minimum(n_rows, keys - BLOCK_N + 1 - c) - first) // BLOCK_M
        upper = tl.maximum(lower, tl.minimum(n_tiles, upper))
        ds_matrix = scores_matrix(ds_ptr, stride_ds, n_rows, batch * n_heads + pid // n_blocks)
        q_matrix = head_matrix(q_pos_ptr, stride_pb, stride_ph, stride_pm, T, b, h, ALIGNED)
        for tile in tl.range(lower, upper, loop_unroll_factor=UNROLL):
            sums = _dr_tile(
                sums, ds_matrix, q_matrix, first + tile * BLOCK_M, i_first, p0, shift, bounds,
                DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, WITH_R, WITH_BIAS, MASKED=False,
            )  # fmt: skip
        for edge in tl.range(0, n_tiles - (upper - lower)):
            sums = _dr_tile(
                sums, ds_matrix, q_matrix, first + edge_tile(edge, lower, upper) * BLOCK_M, i_first, p0, shift, bounds,
                DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, WITH_R, WITH_BIAS, MASKED=True,
            )  # fmt: skip

    offs_p = p0 + tl.arange(0, BLOCK_N)
    visible = (offs_p >= hidden_below) & (offs_p < hidden_from)
    table = ((first_part + part) * H + h) * P
    if WITH_R:
        dr = tl.where(visible[:, None], sums[0] * scale, 0.0)
        store_rows((dr_ptr + table * DR, DR, P), dr, offs_p, DR, BLOCK_DR, ADD)
    if WITH_BIAS:
        dr_bias = tl.where(visible, sums[len(sums) - 1] * scale, 0.0)
        ptrs = dr_bias_ptr + table + offs_p
        if ADD:
            dr_bias += tl.load(ptrs, mask=offs_p < P, other=0.0)
        tl.store(ptrs, dr_bias, mask=offs_p < P)
