"""The gradients of r and of the biases by row of r, one program per block of rows and range of batch elements."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import (
    block_of,
    edge_tile,
    head_matrix,
    key_count,
    load_row_bias,
    load_row_stats,
    load_rows,
    rotate_up,
    select_block,
    store_rows,
)
from txl_kernels.triton_backend.scores import dropout_key, gradients


@triton.jit
def _product_in_rows_of_r(
    matrix,
    a,
    j0,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """y[x, ii] = matrix[j0 + ii + x] . a_ii, (N, M): the shift the other way, from keys to rows of r."""
    products = ()
    for g in tl.static_range((BLOCK_M + BLOCK_N - 1) // BLOCK_N + 1):
        # (N, D) x (D, M) -> (N, M)
        block = load_rows(matrix, j0 + g * BLOCK_N, BLOCK_N, D, BLOCK_D, EDGE=MASKED)
        products = products + (tl.dot(block, tl.trans(a), input_precision=PRECISION),)
    # Key y of a block stands at x = (y - ii) mod N of query ii.
    ii = tl.arange(0, BLOCK_M)[None, :]
    x = (tl.arange(0, BLOCK_N)[:, None] - ii) & (BLOCK_N - 1)
    return rotate_up(select_block(products, block_of(ii, x, BLOCK_N)), BLOCK_M, BLOCK_N)


@triton.jit
def _dr_tile(
    dr,
    colsum,
    r,
    row_bias,
    q_matrix,
    q_pos_matrix,
    do_matrix,
    k_matrix,
    v_matrix,
    terms,
    stats,
    i0,
    j0,
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
    """One tile of queries in the coordinates (i, p), where j = j0 + ii + x: position needs no shift, keys do."""
    # (N, D) x (D, M) -> (N, M): dP (first, which saves registers), content, position
    offs_m = i0 + tl.arange(0, BLOCK_M)
    do = load_rows(do_matrix, i0, BLOCK_M, D, BLOCK_D)
    dp = _product_in_rows_of_r(v_matrix, do, j0, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, MASKED)
    q = load_rows(q_matrix, i0, BLOCK_M, D, BLOCK_D)
    q_position = q
    if q_pos_matrix is not None:
        q_position = load_rows(q_pos_matrix, i0, BLOCK_M, DR, BLOCK_DR)
    products = row_bias[:, None]
    products += _product_in_rows_of_r(k_matrix, q, j0, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, MASKED)
    if r is not None:
        products += tl.dot(r, tl.trans(q_position), input_precision=PRECISION)
    lse, rest, delta = load_row_stats(stats, offs_m, q_matrix[2])
    offs_n = j0 + tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_M)[None, :]
    _, _, ds = gradients(
        products,
        dp,
        lse[None, :],
        rest[None, :],
        delta[None, :],
        terms,
        offs_m[None, :],
        offs_n,
        bounds,
        scale,
        q.dtype,
        MASKED,
    )
    if r is not None:
        # (N, M) x (M, DR) -> (N, DR)
        dr = tl.dot(ds.to(q.dtype), q_position, dr, input_precision=PRECISION)
    return dr, colsum + tl.sum(ds, 1)


@triton.jit(
    do_not_specialize=[
        "q_ptr", "k_ptr", "v_ptr", "r_ptr", "r_bias_ptr", "q_pos_ptr", "segment_ptr", "q_ids_ptr",
        "k_ids_ptr", "mask_ptr", "lengths_ptr", "seed_ptr", "do_ptr", "lse_ptr", "rest_ptr", "delta_ptr",
        "dr_ptr", "dposition_bias_ptr", "dr_bias_ptr",
        "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh", "stride_rb", "stride_rh",
        "stride_pb", "stride_ph", "stride_mb", "stride_mh", "stride_mm", "stride_dob", "stride_doh",
        "B", "H", "group", "T", "S", "P", "rel_offset", "begin", "reach", "keep_below",
    ]
)  # fmt: skip
def backward_dr_kernel(
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
    dr_ptr,
    dposition_bias_ptr,
    dr_bias_ptr,
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
    B,
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
    """dr of BLOCK_N rows of one head, summed over a range of batch elements. Grid: (row blocks * H, ranges).

    dr_p = scale sum_{b, i} ds_raw[i, p] q_pos_i. Where an r of its own belongs to every batch element (stride_rb is not
    0), a range is one element. The column sums of ds_raw are this block's share of the gradient of r_bias, and give its
    share of the position bias gradient scale sum_{b, p} (sum_i ds_raw[i, p]) r_p. All are stored in float32:
    dr (ranges, H, P, DR), dr_bias (ranges, H, P), dposition_bias (ranges, row blocks, H, D).
    """
    n_blocks = tl.cdiv(P, BLOCK_N)
    pid = tl.program_id(0)
    block = pid % n_blocks
    p0 = block * BLOCK_N
    h = (pid // n_blocks).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    n_parts = tl.num_programs(1)

    # Every query that has a key at a row of [hidden_below, hidden_from) sees it, as far as lengths and masks allow.
    hidden_from = tl.minimum(P, rel_offset + reach)
    hidden_below = 0
    if begin is not None:
        hidden_below = rel_offset + begin

    offs_p = p0 + tl.arange(0, BLOCK_N)
    r = None
    if r_ptr is not None:
        r_matrix = head_matrix(r_ptr, stride_rb, stride_rh, stride_rp, hidden_from, part, h, ALIGNED)
        r = load_rows(r_matrix, p0, BLOCK_N, DR, BLOCK_DR)
    row_bias = tl.zeros((BLOCK_N,), tl.float32)
    if r_bias_ptr is not None:
        row_bias = load_row_bias(r_bias_ptr + h * P, offs_p, hidden_from)
    dr = tl.zeros((BLOCK_N, BLOCK_DR), tl.float32)
    colsum = tl.zeros((BLOCK_N,), tl.float32)

    # What takes registers from the main loop: with pointers, edges that are pipelined too; with descriptors, what LLVM
    # hoists out of the edges.
    DESCRIPTORS: tl.constexpr = isinstance(k_ptr, tl.tensor_descriptor)
    EDGE_STAGES: tl.constexpr = None if DESCRIPTORS else 1
    CUT: tl.constexpr = lengths_ptr is not None
    c = p0 - rel_offset
    some_visible = (p0 < hidden_from) & (p0 + BLOCK_N > hidden_below)
    for b in tl.range((B * part) // n_parts, (B * (part + 1)) // n_parts):
        keys = key_count(lengths_ptr, b, S)
        # n_tiles query tiles from `first` on meet keys in these rows, the tiles [lower, upper) of them nothing else.
        first = tl.maximum(0, 1 - BLOCK_N - c)
        last = tl.minimum(T, keys - c)
        n_tiles = tl.where(some_visible, tl.cdiv(tl.maximum(0, last - first), BLOCK_M), 0)
        lower = tl.minimum(n_tiles, tl.cdiv(tl.maximum(0, -c - first), BLOCK_M))
        upper = tl.minimum(n_tiles, tl.maximum(0, keys - BLOCK_N + 1 - c - first) // BLOCK_M)
        upper = tl.maximum(lower, upper)

        bounds = (keys, begin, reach)
        q_matrix = head_matrix(q_ptr, stride_qb, stride_qh, stride_qm, T, b, h, ALIGNED)
        k_matrix = head_matrix(k_ptr, stride_kb, stride_kh, stride_kn, keys, b, h // group, ALIGNED, CUT)
        v_matrix = head_matrix(v_ptr, stride_vb, stride_vh, stride_vn, keys, b, h // group, ALIGNED, CUT)
        q_pos_matrix = None
        if q_pos_ptr is not None:
            q_pos_matrix = head_matrix(q_pos_ptr, stride_pb, stride_ph, stride_pm, T, b, h, ALIGNED)
        do_matrix = head_matrix(do_ptr, stride_dob, stride_doh, stride_dom, T, b, h, ALIGNED)
        lane = b * H + h
        terms = (
            (segment_ptr, q_ids_ptr, k_ids_ptr, lane * T, b * T, b * S),
            (mask_ptr, b * stride_mb + h * stride_mh, stride_mm, stride_mn),
            (seed_ptr, dropout_key(seed_ptr, lane), keep_below, keep_scale),
            softcap, T, S,
        )  # fmt: skip
        stats = (lse_ptr, rest_ptr, delta_ptr, lane * T)
        for tile in tl.range(lower, upper, loop_unroll_factor=UNROLL):
            i0 = first + tile * BLOCK_M
            dr, colsum = _dr_tile(
                dr, colsum, r, row_bias, q_matrix, q_pos_matrix, do_matrix, k_matrix, v_matrix, terms,
                stats, i0, c + i0, bounds, scale,
                D, BLOCK_D, DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, MASKED=False,
            )  # fmt: skip
        for edge in tl.range(0, n_tiles - (upper - lower), num_stages=EDGE_STAGES, disable_licm=DESCRIPTORS):
            i0 = first + edge_tile(edge, lower, upper) * BLOCK_M
            dr, colsum = _dr_tile(
                dr, colsum, r, row_bias, q_matrix, q_pos_matrix, do_matrix, k_matrix, v_matrix, terms,
                stats, i0, c + i0, bounds, scale,
                D, BLOCK_D, DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, MASKED=True,
            )  # fmt: skip

    visible = (offs_p >= hidden_below) & (offs_p < hidden_from)
    colsum = tl.where(visible, colsum, 0.0) * scale
    if dr_bias_ptr is not None:
        tl.store(dr_bias_ptr + (part * H + h) * P + offs_p, colsum, mask=offs_p < P)
    if r_ptr is not None:
        dr = tl.where(visible[:, None], dr * scale, 0.0)
        store_rows((dr_ptr + (part * H + h) * P * DR, DR, P), dr, offs_p, DR, BLOCK_DR)
    if dposition_bias_ptr is not None:
        offs_d = tl.arange(0, BLOCK_D)
        r = load_rows(r_matrix, tl.where(some_visible, p0, P), BLOCK_N, DR, BLOCK_DR)
        dposition_bias = tl.sum(colsum[:, None] * r.to(tl.float32), 0)
        row = (part * n_blocks + block) * H + h
        tl.store(dposition_bias_ptr + row * D + offs_d, dposition_bias, mask=offs_d < D)
