"""The gradients of k and v, one program per key tile, and of the scores, which the other passes go on from."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import (
    block_of,
    edge_tile,
    head_matrix,
    head_pointer,
    key_count,
    load_row_stats,
    load_rows,
    position_block,
    rotate_down,
    scores_matrix,
    select_block,
    store_row,
    store_rows,
    store_scores,
)
from txl_kernels.triton_backend.scores import dropout_key, gradients


@triton.jit
def _dkv_tile(
    dk,
    dv,
    colsum,
    k,
    v,
    q_matrix,
    q_pos_matrix,
    do_matrix,
    table,
    terms,
    stats,
    ds_matrix,
    i_first,
    column,
    i0,
    offs_n,
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
    """One tile of queries, its scores transposed so that they are the left operands of dK and dV; ds is stored."""
    offs_m = i0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_matrix, i0, BLOCK_M, D, BLOCK_D)
    q_position = q
    if q_pos_matrix is not None:
        q_position = load_rows(q_pos_matrix, i0, BLOCK_M, DR, BLOCK_DR)
    # (N, D) x (D, M) -> (N, M): position, once for every block of r that the tile touches, and content on top of it
    raw = ()
    for g in tl.static_range((BLOCK_M + BLOCK_N - 1) // BLOCK_N + 1):
        first = row0 - g * BLOCK_N
        raw = raw + (position_block(q_position, table, first, BLOCK_N, DR, BLOCK_DR, PRECISION, TRANSPOSED=True),)
    e = block_of(tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None], BLOCK_N)
    bd = rotate_down(select_block(raw, e), BLOCK_M, BLOCK_N)
    products = tl.dot(k, tl.trans(q), bd, input_precision=PRECISION)
    lse, rest, delta = load_row_stats(stats, offs_m, q_matrix[2])
    do = load_rows(do_matrix, i0, BLOCK_M, D, BLOCK_D)
    # (N, D) x (D, M) -> (N, M): dP
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    p, _, ds = gradients(
        products,
        dp,
        lse[None, :],
        rest[None, :],
        delta[None, :],
        terms,
        offs_m[None, :],
        offs_n[:, None],
        bounds,
        scale,
        q.dtype,
        MASKED,
    )
    colsum += tl.sum(ds, 1)  # here, which saves registers
    ds = ds.to(q.dtype)
    store_scores(ds_matrix, ds, i0 - i_first, column, MASKED)
    # (N, M) x (M, D) -> (N, D)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv, colsum


@triton.jit(
    do_not_specialize=[
        "q_ptr", "k_ptr", "v_ptr", "r_ptr", "r_bias_ptr", "q_pos_ptr", "segment_ptr", "q_ids_ptr",
        "k_ids_ptr", "mask_ptr", "lengths_ptr", "seed_ptr", "do_ptr", "lse_ptr", "rest_ptr", "delta_ptr",
        "dk_ptr", "dv_ptr", "du_ptr", "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh",
        "stride_rb", "stride_rh", "stride_pb", "stride_ph", "stride_mb", "stride_mh", "stride_mm",
        "stride_dob", "stride_doh", "stride_dkb", "stride_dkh", "stride_dvb", "stride_dvh",
        "H", "group", "T", "S", "P", "rel_offset", "begin", "reach", "keep_below",
        "b_first", "h_first", "n_heads", "i_first", "i_last", "j_first", "j_last",
    ]
)  # fmt: skip
def backward_dkv_kernel(
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
    dk_ptr,
    dv_ptr,
    du_ptr,
    ds_ptr,
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
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    stride_ds,
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
    b_first,
    h_first,
    n_heads,
    i_first,
    i_last,
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
    """dk and dv of BLOCK_N keys, from the queries of one head in the range, and ds of all its pairs that somebody sees.

    Grid: (key tiles * heads * batch elements of the range,), the keys with most queries first.

    dv_j = sum_i p[i, j] do_i and dk_j = scale sum_i ds[i, j] q_i, (B, H, S, D). The column sums of ds give this
    tile's share of du = scale sum_{b, j} (sum_i ds[i, j]) k_j, in du (B, H, key tiles, D) in float32. With ADD all
    three are added to what earlier ranges left.
    """
    n_key_tiles = tl.cdiv(j_last - j_first, BLOCK_N)
    pid = tl.program_id(0)
    column = pid % n_key_tiles * BLOCK_N
    j0 = j_first + column
    slot = pid // n_key_tiles
    b = (b_first + slot // n_heads).to(tl.int64)
    h = (h_first + slot % n_heads).to(tl.int64)
    ds_matrix = scores_matrix(ds_ptr, stride_ds, i_last - i_first, slot)

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
    q_pos_matrix = None
    if q_pos_ptr is not None:
        q_pos_matrix = head_matrix(q_pos_ptr, stride_pb, stride_ph, stride_pm, T, b, h, ALIGNED)
    do_matrix = head_matrix(do_ptr, stride_dob, stride_doh, stride_dom, T, b, h, ALIGNED)
    dk_matrix = (head_pointer(dk_ptr, stride_dkb, stride_dkh, b, h, ALIGNED), stride_dkn, S)
    dv_matrix = (head_pointer(dv_ptr, stride_dvb, stride_dvh, b, h, ALIGNED), stride_dvn, S)
    lane = b * H + h
    terms = (
        (segment_ptr, q_ids_ptr, k_ids_ptr, lane * T, b * T, b * S),
        (mask_ptr, b * stride_mb + h * stride_mh, stride_mm, stride_mn),
        (seed_ptr, dropout_key(seed_ptr, lane), keep_below, keep_scale),
        softcap, T, S,
    )  # fmt: skip
    stats = (lse_ptr, rest_ptr, delta_ptr, lane * T)

    offs_n = j0 + tl.arange(0, BLOCK_N)
    k = load_rows(k_matrix, j0, BLOCK_N, D, BLOCK_D)
    v = load_rows(v_matrix, j0, BLOCK_N, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    colsum = tl.zeros((BLOCK_N,), tl.float32)

    # Some query of each tile from `first` on, n_tiles of them, sees a key; in the tiles [lower, upper) of these every
    # query of the range sees all. Hidden keys beyond `keys` are cleared at the end; queries beyond T have p = ds = 0.
    first = tl.maximum(i_first, tl.maximum(0, j0 - reach + 1) // BLOCK_M * BLOCK_M)
    last = i_last
    if begin is not None:
        last = tl.minimum(i_last, j0 + BLOCK_N - begin)
    n_tiles = tl.where(j0 < keys, tl.cdiv(tl.maximum(0, last - first), BLOCK_M), 0)
    lower = tl.minimum(n_tiles, tl.cdiv(tl.maximum(0, j0 + BLOCK_N - reach - first), BLOCK_M))
    upper = n_tiles
    if begin is not None:
        seen_by_all = j0 - begin + 1
        upper = tl.where(seen_by_all >= i_last, n_tiles, tl.maximum(0, seen_by_all - first) // BLOCK_M)
    upper = tl.maximum(lower, tl.minimum(upper, (last - first) // BLOCK_M))
    # What takes registers from the main loop: with pointers, edges that are pipelined too; with descriptors, what LLVM
    # hoists out of the edges.
    DESCRIPTORS: tl.constexpr = isinstance(k_ptr, tl.tensor_descriptor)
    EDGE_STAGES: tl.constexpr = None if DESCRIPTORS else 1
    c = j0 + rel_offset
    for tile in tl.range(lower, upper, loop_unroll_factor=UNROLL):
        i0 = first + tile * BLOCK_M
        dk, dv, colsum = _dkv_tile(
            dk, dv, colsum, k, v, q_matrix, q_pos_matrix, do_matrix, table, terms, stats, ds_matrix,
            i_first, column, i0, offs_n, c - i0, bounds, scale,
            D, BLOCK_D, DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, MASKED=False,
        )  # fmt: skip
    for edge in tl.range(0, n_tiles - (upper - lower), num_stages=EDGE_STAGES, disable_licm=DESCRIPTORS):
        i0 = first + edge_tile(edge, lower, upper) * BLOCK_M
        dk, dv, colsum = _dkv_tile(
            dk, dv, colsum, k, v, q_matrix, q_pos_matrix, do_matrix, table, terms, stats, ds_matrix,
            i_first, column, i0, offs_n, c - i0, bounds, scale,
            D, BLOCK_D, DR, BLOCK_DR, BLOCK_M, BLOCK_N, PRECISION, MASKED=True,
        )  # fmt: skip

    if lengths_ptr is not None:
        dk = tl.where((offs_n < keys)[:, None], dk, 0.0)
        dv = tl.where((offs_n < keys)[:, None], dv, 0.0)
    store_rows(dk_matrix, dk * scale, offs_n, D, BLOCK_D, ADD)
    store_rows(dv_matrix, dv, offs_n, D, BLOCK_D, ADD)
    if du_ptr is not None:
        colsum = tl.where(offs_n < keys, colsum, 0.0)
        # Loaded again, which saves the registers that hold k in the loop; no row where no query sees the tile.
        k = load_rows(k_matrix, tl.where(n_tiles > 0, j0, S), BLOCK_N, D, BLOCK_D)
        du = tl.sum(colsum[:, None] * k.to(tl.float32), 0) * scale
        row = lane * tl.cdiv(S, BLOCK_N) + j0 // BLOCK_N
        store_row(du_ptr + row * D, du, D, BLOCK_D, ADD)
