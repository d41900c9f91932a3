"""The small passes around the main kernels: a few values per query, and the sum over ranges of keys."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import LOWEST, head_pointer, load_rows, store_rows, with_bias


@triton.jit(
    do_not_specialize=[
        "q_ptr", "content_bias_ptr", "position_bias_ptr", "q_content_ptr", "q_position_ptr",
        "stride_qb", "stride_qh", "stride_ob", "stride_oh", "H", "T",
    ]
)  # fmt: skip
def biased_queries_kernel(
    q_ptr,
    content_bias_ptr,
    position_bias_ptr,
    q_content_ptr,
    q_position_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_ob,
    stride_oh,
    stride_om,
    H,
    T,
    ALIGNED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """q + u and q + v, where there is such a bias, (B, H, T, D) laid out alike. Grid: (tiles * B * H,)."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    i0 = pid % n_tiles * BLOCK_M
    offs_m = i0 + tl.arange(0, BLOCK_M)
    bh = (pid // n_tiles).to(tl.int64)
    b = bh // H
    h = bh % H
    q = load_rows((head_pointer(q_ptr, stride_qb, stride_qh, b, h, ALIGNED), stride_qm, T), i0, BLOCK_M, D, BLOCK_D)
    if content_bias_ptr is not None:
        content = head_pointer(q_content_ptr, stride_ob, stride_oh, b, h, ALIGNED)
        store_rows((content, stride_om, T), with_bias(q, content_bias_ptr + h * D, D, BLOCK_D), offs_m, D, BLOCK_D)
    if position_bias_ptr is not None:
        position = head_pointer(q_position_ptr, stride_ob, stride_oh, b, h, ALIGNED)
        store_rows((position, stride_om, T), with_bias(q, position_bias_ptr + h * D, D, BLOCK_D), offs_m, D, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "out_ptr", "do_ptr", "lse_ptr", "dlse_ptr", "lse_stat_ptr", "rest_ptr", "delta_ptr",
        "stride_ob", "stride_oh", "stride_dob", "stride_doh", "H", "T",
    ]
)  # fmt: skip
def row_stats_kernel(
    out_ptr,
    do_ptr,
    lse_ptr,
    dlse_ptr,
    lse_stat_ptr,
    rest_ptr,
    delta_ptr,
    stride_ob,
    stride_oh,
    stride_om,
    stride_dob,
    stride_doh,
    stride_dom,
    H,
    T,
    ALIGNED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What the backward needs of every query, (B, H, T) in float32. Grid: (tiles * B * H,).

    delta_i = out_i . dout_i - dlse_i, so that ds = p (dp - delta); the log-sum-exp, +inf where no key is visible, so
    that p = 0; and, where it comes in float64, the rest that float32 does not hold.
    """
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    i0 = pid % n_tiles * BLOCK_M
    offs_m = i0 + tl.arange(0, BLOCK_M)
    inside = offs_m < T
    bh = (pid // n_tiles).to(tl.int64)
    b = bh // H
    h = bh % H
    out_matrix = (head_pointer(out_ptr, stride_ob, stride_oh, b, h, ALIGNED), stride_om, T)
    do_matrix = (head_pointer(do_ptr, stride_dob, stride_doh, b, h, ALIGNED), stride_dom, T)
    out = load_rows(out_matrix, i0, BLOCK_M, D, BLOCK_D)
    do = load_rows(do_matrix, i0, BLOCK_M, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + bh * T + offs_m, mask=inside, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + bh * T + offs_m, mask=inside, other=0.0)
    empty = lse == float("-inf")
    tl.store(delta_ptr + bh * T + offs_m, tl.where(empty, 0.0, delta), mask=inside)
    tl.store(lse_stat_ptr + bh * T + offs_m, tl.where(empty, float("inf"), lse.to(tl.float32)), mask=inside)
    if rest_ptr is not None:
        rest = tl.where(empty, 0.0, lse) - tl.where(empty, 0.0, lse.to(tl.float32))
        tl.store(rest_ptr + bh * T + offs_m, rest.to(tl.float32), mask=inside)


@triton.jit(
    do_not_specialize=[
        "out_parts_ptr", "lse_parts_ptr", "out_ptr", "lse_ptr", "stride_ob", "stride_oh", "ranges", "H", "T",
    ]
)  # fmt: skip
def combine_kernel(
    out_parts_ptr,
    lse_parts_ptr,
    out_ptr,
    lse_ptr,
    stride_ob,
    stride_oh,
    stride_om,
    ranges,
    H,
    T,
    ALIGNED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The forward's output from that of ranges of keys, always summed in order. Grid: (tiles * B * H,).

    out = sum_n exp(lse_n - lse) out_n with lse = log sum_n exp(lse_n): out_parts is (ranges, B, H, T, D) in float32.
    """
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    i0 = pid % n_tiles * BLOCK_M
    offs_m = i0 + tl.arange(0, BLOCK_M)
    inside = offs_m < T
    bh = (pid // n_tiles).to(tl.int64)
    n_lanes = (tl.num_programs(0) // n_tiles).to(tl.int64)
    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32).to(lse_ptr.dtype.element_ty)
    for part in tl.range(0, ranges):
        lse = tl.load(lse_parts_ptr + (part * n_lanes + bh) * T + offs_m, mask=inside, other=float("-inf"))
        row_max = tl.maximum(row_max, lse)
    total = tl.zeros_like(row_max)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in tl.range(0, ranges):
        first = (part * n_lanes + bh) * T
        lse = tl.load(lse_parts_ptr + first + offs_m, mask=inside, other=float("-inf"))
        weight = tl.exp(lse - row_max)
        total += weight
        out_part = load_rows((out_parts_ptr + first * D, D, T), i0, BLOCK_M, D, BLOCK_D)
        out += weight.to(tl.float32)[:, None] * out_part
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out_matrix = (head_pointer(out_ptr, stride_ob, stride_oh, bh // H, bh % H, ALIGNED), stride_om, T)
    store_rows(out_matrix, out / total.to(tl.float32)[:, None], offs_m, D, BLOCK_D)
    lse = tl.where(empty, float("-inf"), row_max + tl.log(total))
    tl.store(lse_ptr + bh * T + offs_m, lse, mask=inside)
