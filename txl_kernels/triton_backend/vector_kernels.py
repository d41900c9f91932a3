"""The small vectors that the main kernels share: one value per row of r, a few per query."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import head_pointer, load_bias, load_rows


@triton.jit(
    do_not_specialize=["r_ptr", "bias_difference_ptr", "r_bias_ptr", "column_ptr", "stride_rb", "stride_rh", "H", "P"]
)
def column_kernel(
    r_ptr,
    bias_difference_ptr,
    r_bias_ptr,
    column_ptr,
    stride_rb,
    stride_rh,
    stride_rp,
    H,
    P,
    ALIGNED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """column[b, h, p] = (v - u)_h . r[b, h, p] + r_bias[h, p] in float32. Grid: (row blocks * H, batches of r)."""
    n_blocks = tl.cdiv(P, BLOCK_P)
    pid = tl.program_id(0)
    offs_p = pid % n_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    h = (pid // n_blocks).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    r = load_rows((head_pointer(r_ptr, stride_rb, stride_rh, b, h, ALIGNED), stride_rp, P), offs_p, D, BLOCK_D)
    column = tl.sum(r.to(tl.float32) * load_bias(bias_difference_ptr, h, D, BLOCK_D)[None, :], 1)
    if r_bias_ptr is not None:
        column += tl.load(r_bias_ptr + h * P + offs_p, mask=offs_p < P, other=0.0)
    tl.store(column_ptr + (b * H + h) * P + offs_p, column, mask=offs_p < P)


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
    offs_m = pid % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < T
    bh = (pid // n_tiles).to(tl.int64)
    b = bh // H
    h = bh % H
    out = load_rows((head_pointer(out_ptr, stride_ob, stride_oh, b, h, ALIGNED), stride_om, T), offs_m, D, BLOCK_D)
    do = load_rows((head_pointer(do_ptr, stride_dob, stride_doh, b, h, ALIGNED), stride_dom, T), offs_m, D, BLOCK_D)
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
