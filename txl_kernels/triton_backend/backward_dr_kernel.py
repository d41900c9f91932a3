"""The gradient of r, and the position bias gradient, one program per block of rows and range of batch elements."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import (
    block_of,
    head_pointer,
    load_bias,
    load_column,
    load_query,
    load_row_stats,
    load_rows,
    rotate_up,
    select_block,
    softmax_gradient,
    store_rows,
)


@triton.jit
def _product_in_rows_of_r(
    matrix,
    a,
    j0,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[x, ii] = matrix[j0 + ii + x] . a_ii, (N, M): the shift the other way, from keys to rows of r."""
    products = ()
    for g in tl.static_range((BLOCK_M + BLOCK_N - 1) // BLOCK_N + 1):
        # (N, D) x (D, M) -> (N, M)
        block = load_rows(matrix, j0 + g * BLOCK_N + tl.arange(0, BLOCK_N), D, BLOCK_D)
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
    column,
    q_matrix,
    do_matrix,
    k_matrix,
    v_matrix,
    u_ptr,
    lse_ptr,
    delta_ptr,
    h,
    offs_m,
    j0,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of queries in the coordinates (i, p), where j = j0 + ii + x: position needs no shift, keys do."""
    q = load_query(q_matrix, offs_m, u_ptr, h, D, BLOCK_D)
    # (N, D) x (D, M) -> (N, M): position, content, dP
    bd = tl.dot(r, tl.trans(q), input_precision=PRECISION) + column[:, None]
    ac = _product_in_rows_of_r(k_matrix, q, j0, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
    s = (ac + bd) * scale
    if MASKED:
        offs_n = j0 + tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_M)[None, :]
        s = tl.where((offs_n >= 0) & (offs_n < k_matrix[2]), s, float("-inf"))
    lse, delta = load_row_stats(lse_ptr, delta_ptr, offs_m, q_matrix[2])
    do = load_rows(do_matrix, offs_m, D, BLOCK_D)
    dp = _product_in_rows_of_r(v_matrix, do, j0, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
    _, ds = softmax_gradient(s, lse[None, :], dp, delta[None, :], q.dtype)
    # (N, M) x (M, D) -> (N, D)
    dr = tl.dot(ds.to(q.dtype), q, dr, input_precision=PRECISION)
    return dr, colsum + tl.sum(ds, 1)


@triton.jit(
    do_not_specialize=[
        "q_ptr", "k_ptr", "v_ptr", "r_ptr", "u_ptr", "column_ptr", "do_ptr", "lse_ptr", "delta_ptr",
        "bias_difference_ptr", "dr_ptr", "dposition_bias_ptr",
        "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh", "stride_rh",
        "stride_dob", "stride_doh", "stride_drz", "stride_drh", "B", "H", "T", "S", "P", "rel_offset", "reach",
    ]
)  # fmt: skip
def backward_dr_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    r_ptr,
    u_ptr,
    column_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    bias_difference_ptr,
    dr_ptr,
    dposition_bias_ptr,
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
    stride_drz,
    stride_drh,
    stride_drp,
    B,
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
    """dr of BLOCK_N rows of one head, summed over a range of batch elements. Grid: (row blocks * H, ranges).

    dr_p = scale sum_{b, i} ds_raw[i, p] (q_i + v), with q + v = (q + u) + (v - u): the second part is the column sum
    of ds_raw times bias_difference = v - u, (H, D). The same column sums give this block's share of the position
    bias gradient scale sum_{b, p} (sum_i ds_raw[i, p]) r_p, stored in float32 in (ranges, row blocks, H, D).
    """
    n_blocks = tl.cdiv(P, BLOCK_N)
    pid = tl.program_id(0)
    block = pid % n_blocks
    p0 = block * BLOCK_N
    h = (pid // n_blocks).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    n_parts = tl.num_programs(1)

    # Rows from `hidden` on lie in the future of every query.
    hidden = tl.minimum(P, rel_offset + reach)
    r_matrix = (head_pointer(r_ptr, 0, stride_rh, 0, h, ALIGNED), stride_rp, hidden)
    dr_matrix = (head_pointer(dr_ptr, stride_drz, stride_drh, part, h, ALIGNED), stride_drp, P)

    offs_p = p0 + tl.arange(0, BLOCK_N)
    offs_y = tl.arange(0, BLOCK_M)
    r = load_rows(r_matrix, offs_p, D, BLOCK_D)
    column = tl.zeros((BLOCK_N,), tl.float32)
    if column_ptr is not None:
        column = load_column(column_ptr + h * P, offs_p, hidden)
    dr = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    colsum = tl.zeros((BLOCK_N,), tl.float32)

    # Query tiles [first, last) meet keys in these rows, the tiles [lower, upper) of them nothing but keys.
    first = tl.maximum(0, rel_offset - p0 - BLOCK_N + 1)
    last = tl.minimum(T, S + rel_offset - p0)
    n_tiles = tl.where(p0 < hidden, tl.cdiv(tl.maximum(0, last - first), BLOCK_M), 0)
    c = p0 - rel_offset
    lower = tl.minimum(n_tiles, tl.cdiv(tl.maximum(0, -c - first), BLOCK_M))
    upper = tl.minimum(n_tiles, tl.maximum(0, S - BLOCK_N + 1 - c - first) // BLOCK_M)
    upper = tl.maximum(lower, upper)
    for b in tl.range((B * part) // n_parts, (B * (part + 1)) // n_parts):
        q_matrix = (head_pointer(q_ptr, stride_qb, stride_qh, b, h, ALIGNED), stride_qm, T)
        k_matrix = (head_pointer(k_ptr, stride_kb, stride_kh, b, h, ALIGNED), stride_kn, S)
        v_matrix = (head_pointer(v_ptr, stride_vb, stride_vh, b, h, ALIGNED), stride_vn, S)
        do_matrix = (head_pointer(do_ptr, stride_dob, stride_doh, b, h, ALIGNED), stride_dom, T)
        row = (b * H + h) * T
        for tile in tl.range(lower, upper):
            i0 = first + tile * BLOCK_M
            dr, colsum = _dr_tile(
                dr, colsum, r, column, q_matrix, do_matrix, k_matrix, v_matrix, u_ptr,
                lse_ptr + row, delta_ptr + row, h, i0 + offs_y, c + i0, scale,
                D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, MASKED=False,
            )  # fmt: skip
        for edge in tl.range(0, n_tiles - (upper - lower), num_stages=1):
            i0 = first + tl.where(edge < lower, edge, edge + upper - lower) * BLOCK_M
            dr, colsum = _dr_tile(
                dr, colsum, r, column, q_matrix, do_matrix, k_matrix, v_matrix, u_ptr,
                lse_ptr + row, delta_ptr + row, h, i0 + offs_y, c + i0, scale,
                D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, MASKED=True,
            )  # fmt: skip

    visible = offs_p < hidden
    colsum = tl.where(visible, colsum, 0.0) * scale
    dr = tl.where(visible[:, None], dr * scale, 0.0)
    if column_ptr is not None:
        dr += colsum[:, None] * load_bias(bias_difference_ptr, h, D, BLOCK_D)[None, :]
    store_rows(dr_matrix, dr, offs_p, D, BLOCK_D)
    if dposition_bias_ptr is not None:
        offs_d = tl.arange(0, BLOCK_D)
        dposition_bias = tl.sum(colsum[:, None] * r.to(tl.float32), 0)
        row = (part * n_blocks + block) * H + h
        tl.store(dposition_bias_ptr + row * D + offs_d, dposition_bias, mask=offs_d < D)
