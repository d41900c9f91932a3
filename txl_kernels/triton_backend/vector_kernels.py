"""The two small vectors that the main kernels share: one value per row of r, one per query."""

import triton
import triton.language as tl

from txl_kernels.triton_backend.primitives import head_pointer, load_bias, load_rows


@triton.jit(do_not_specialize=["r_ptr", "bias_difference_ptr", "column_ptr", "stride_rh", "P"])
def column_kernel(
    r_ptr,
    bias_difference_ptr,
    column_ptr,
    stride_rh,
    stride_rp,
    P,
    ALIGNED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """column[h, p] = (v - u)_h . r[h, p] in float32, (H, P). Grid: (row blocks * H,)."""
    n_blocks = tl.cdiv(P, BLOCK_P)
    pid = tl.program_id(0)
    offs_p = pid % n_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    h = (pid // n_blocks).to(tl.int64)
    r = load_rows((head_pointer(r_ptr, 0, stride_rh, 0, h, ALIGNED), stride_rp, P), offs_p, D, BLOCK_D)
    column = tl.sum(r.to(tl.float32) * load_bias(bias_difference_ptr, h, D, BLOCK_D)[None, :], 1)
    tl.store(column_ptr + h * P + offs_p, column, mask=offs_p < P)


@triton.jit(
    do_not_specialize=[
        "out_ptr", "do_ptr", "dlse_ptr", "delta_ptr",
        "stride_ob", "stride_oh", "stride_dob", "stride_doh", "H", "T",
    ]
)  # fmt: skip
def delta_kernel(
    out_ptr,
    do_ptr,
    dlse_ptr,
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
    """delta_i = out_i . dout_i - dlse_i in float32, (B, H, T), so that ds = p (dp - delta). Grid: (tiles * B * H,)."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    offs_m = pid % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    bh = (pid // n_tiles).to(tl.int64)
    b = bh // H
    h = bh % H
    out = load_rows((head_pointer(out_ptr, stride_ob, stride_oh, b, h, ALIGNED), stride_om, T), offs_m, D, BLOCK_D)
    do = load_rows((head_pointer(do_ptr, stride_dob, stride_doh, b, h, ALIGNED), stride_dom, T), offs_m, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + bh * T + offs_m, mask=offs_m < T, other=0.0)
    tl.store(delta_ptr + bh * T + offs_m, delta, mask=offs_m < T)
