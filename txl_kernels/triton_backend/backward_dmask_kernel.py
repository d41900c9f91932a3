"""The gradient of a float mask, one program per tile of the mask as the caller gave it."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import (
    block_of,
    head_pointer,
    key_count,
    load_row_stats,
    load_rows,
    position_block,
    rotate_right,
    select_block,
)
from txl_kernels.triton_backend.scores import dropout_key, gradients


@triton.jit(
    do_not_specialize=[
        "q_ptr", "k_ptr", "v_ptr", "r_ptr", "r_bias_ptr", "q_pos_ptr", "segment_ptr", "q_ids_ptr",
        "k_ids_ptr", "mask_ptr", "lengths_ptr", "seed_ptr", "do_ptr", "lse_ptr", "rest_ptr", "delta_ptr", "dmask_ptr",
        "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh", "stride_rb", "stride_rh",
        "stride_pb", "stride_ph", "stride_mb", "stride_mh", "stride_mm", "stride_dob", "stride_doh",
        "B", "H", "group", "T", "S", "P", "rel_offset", "begin", "reach", "keep_below",
        "mask_b", "mask_h", "mask_t", "mask_s",
    ]
)  # fmt: skip
def backward_dmask_kernel(
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
    dmask_ptr,
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
    mask_b,
    mask_h,
    mask_t,
    mask_s,
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
    """dmask, contiguous (mask_b, mask_h, mask_t, mask_s) in float32, each size full or 1: the sum over what it serves.

    Grid: (tiles of mask_s * mask_t * mask_b * mask_h,). A tile is one row high or one column wide where the mask
    has size 1, and the program then walks all queries or keys; likewise batch elements and heads.
    """
    i_full = mask_t == T
    j_full = mask_s == S
    column_tiles = tl.where(j_full, tl.cdiv(S, BLOCK_N), 1)
    tile_j = tl.program_id(0) % column_tiles
    row_tiles = tl.where(i_full, tl.cdiv(T, BLOCK_M), 1)
    tile_i = tl.program_id(0) // column_tiles % row_tiles
    mask_lane = (tl.program_id(0) // column_tiles // row_tiles).to(tl.int64)
    i_first = tl.where(i_full, tile_i * BLOCK_M, 0)
    i_last = tl.where(i_full, tl.minimum(T, i_first + BLOCK_M), T)
    j_first = tl.where(j_full, tile_j * BLOCK_N, 0)
    j_last = tl.where(j_full, tl.minimum(S, j_first + BLOCK_N), S)
    b_first = tl.where(mask_b == B, mask_lane // mask_h, 0)
    b_last = tl.where(mask_b == B, b_first + 1, B)
    h_first = tl.where(mask_h == H, mask_lane % mask_h, 0)
    h_last = tl.where(mask_h == H, h_first + 1, H)

    r_rows = tl.minimum(P, rel_offset + reach)
    dmask = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_y = tl.arange(0, BLOCK_M)
    offs_x = tl.arange(0, BLOCK_N)
    e = block_of(offs_y[:, None], offs_x[None, :], BLOCK_N)
    for served in tl.range(0, (b_last - b_first) * (h_last - h_first)):
        b = b_first + served // (h_last - h_first)
        h = h_first + served % (h_last - h_first)
        keys = key_count(lengths_ptr, b, S)
        q_matrix = (head_pointer(q_ptr, stride_qb, stride_qh, b, h, ALIGNED), stride_qm, T)
        k_matrix = (head_pointer(k_ptr, stride_kb, stride_kh, b, h // group, ALIGNED), stride_kn, keys)
        v_matrix = (head_pointer(v_ptr, stride_vb, stride_vh, b, h // group, ALIGNED), stride_vn, keys)
        if r_ptr is not None:
            head_r_ptr = head_pointer(r_ptr, stride_rb, stride_rh, b, h, ALIGNED)
        else:
            head_r_ptr: tl.constexpr = None
        if r_bias_ptr is not None:
            head_r_bias_ptr = r_bias_ptr + h * P
        else:
            head_r_bias_ptr: tl.constexpr = None
        table = (head_r_ptr, stride_rp, r_rows), head_r_bias_ptr
        do_matrix = (head_pointer(do_ptr, stride_dob, stride_doh, b, h, ALIGNED), stride_dom, T)
        lane = b * H + h
        terms = (
            (segment_ptr, q_ids_ptr, k_ids_ptr, lane * T, b * T, b * S),
            (mask_ptr, b * stride_mb + h * stride_mh, stride_mm, stride_mn),
            (seed_ptr, dropout_key(seed_ptr, lane), keep_below, keep_scale),
            softcap, T, S,
        )  # fmt: skip
        stats = (lse_ptr, rest_ptr, delta_ptr, lane * T)
        for i0 in tl.range(i_first, i_last, BLOCK_M):
            offs_m = i0 + offs_y
            q = load_rows(q_matrix, i0, BLOCK_M, D, BLOCK_D)
            q_position = q
            if q_pos_ptr is not None:
                q_pos_matrix = (head_pointer(q_pos_ptr, stride_pb, stride_ph, b, h, ALIGNED), stride_pm, T)
                q_position = load_rows(q_pos_matrix, i0, BLOCK_M, DR, BLOCK_DR)
            do = load_rows(do_matrix, i0, BLOCK_M, D, BLOCK_D)
            lse, rest, delta = load_row_stats(stats, offs_m, T)
            # Steps from j_first that some query of the tile sees.
            begin_step = 0
            if begin is not None:
                begin_step = tl.maximum(0, i0 + begin - j_first) // BLOCK_N
            end_step = tl.cdiv(
                tl.maximum(0, tl.minimum(tl.minimum(keys, j_last), i0 + BLOCK_M - 1 + reach) - j_first), BLOCK_N
            )
            # Unrolled, a loop counts its passes wrong where its end lies before its start.
            for step in tl.range(begin_step, tl.maximum(begin_step, end_step), loop_unroll_factor=UNROLL):
                j0 = j_first + step * BLOCK_N
                offs_n = j0 + offs_x
                # (M, D) x (D, N) -> (M, N): content, position, dP
                k = load_rows(k_matrix, j0, BLOCK_N, D, BLOCK_D)
                ac = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                raw = ()
                for g in tl.static_range((BLOCK_M + BLOCK_N - 1) // BLOCK_N + 1):
                    row0 = rel_offset - i0 + j0 - g * BLOCK_N
                    raw = raw + (position_block(q_position, table, row0, BLOCK_N, DR, BLOCK_DR, PRECISION),)
                bd = rotate_right(select_block(raw, e), BLOCK_M, BLOCK_N)
                v = load_rows(v_matrix, j0, BLOCK_N, D, BLOCK_D)
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                _, ds, _ = gradients(
                    ac + bd, dp, lse[:, None], rest[:, None], delta[:, None], terms, offs_m[:, None], offs_n[None, :],
                    (keys, begin, reach), scale, q.dtype, MASKED=True,
                )  # fmt: skip
                dmask += ds

    ptr = dmask_ptr + mask_lane * mask_t * mask_s
    offs_m = (i_first + offs_y).to(tl.int64)
    offs_n = j_first + offs_x
    if i_full:
        if j_full:
            inside = (offs_m < T)[:, None] & (offs_n < S)[None, :]
            tl.store(ptr + offs_m[:, None] * S + offs_n[None, :], dmask, mask=inside)
        else:
            tl.store(ptr + offs_m, tl.sum(dmask, 1), mask=offs_m < T)
    else:
        if j_full:
            tl.store(ptr + offs_n, tl.sum(dmask, 0), mask=offs_n < S)
        else:
            tl.store(ptr, tl.sum(dmask))
