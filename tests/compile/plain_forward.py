"""The forward kernel without its position term, from the same steps: what flash attention costs beside it."""

import triton
import triton.language as tl

from tests.compile.ahead_of_time import Launch
from txl_kernels.triton_backend.forward_kernel import softmax_step
from txl_kernels.triton_backend.primitives import LOWEST, head_pointer, load_rows, store_rows, visible_mask

# (queries, keys, warps, stages) that give the plain kernel the fewest instructions a score without spills.
BEST_PLAIN = {
    ("sm_80", 64): (128, 128, 8, 2), ("sm_80", 128): (128, 64, 8, 2),
    ("sm_90", 64): (128, 128, 8, 2), ("sm_90", 128): (128, 128, 8, 2),
}  # fmt: skip


@triton.jit
def _plain_tile(
    acc,
    l_i,
    m_i,
    q,
    k_matrix,
    v_matrix,
    offs_m,
    j0,
    bounds,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    k = load_rows(k_matrix, j0, BLOCK_N, D, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        offs_n = j0 + tl.arange(0, BLOCK_N)
        s = tl.where(visible_mask(offs_m[:, None], offs_n[None, :], bounds), s, float("-inf"))
    p, acc, l_i, m_i = softmax_step(acc, l_i, m_i, s, q.dtype, EXACT=False)
    v = load_rows(v_matrix, j0, BLOCK_N, D, BLOCK_D)
    return tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION), l_i, m_i


@triton.jit(
    do_not_specialize=[
        "q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr", "stride_qb", "stride_qh", "stride_kb", "stride_kh",
        "stride_vb", "stride_vh", "stride_ob", "stride_oh", "H", "group", "T", "S", "reach",
    ]
)  # fmt: skip
def plain_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    H,
    group,
    T,
    S,
    reach,
    scale,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Causal attention with the content bias, the loops of forward_kernel."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    i0 = (n_tiles - 1 - pid % n_tiles) * BLOCK_M
    bh = (pid // n_tiles).to(tl.int64)
    b = bh // H
    h = bh % H
    q_matrix = (head_pointer(q_ptr, stride_qb, stride_qh, b, h, ALIGNED), stride_qm, T)
    k_matrix = (head_pointer(k_ptr, stride_kb, stride_kh, b, h // group, ALIGNED), stride_kn, S)
    v_matrix = (head_pointer(v_ptr, stride_vb, stride_vh, b, h // group, ALIGNED), stride_vn, S)
    offs_m = i0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_matrix, i0, BLOCK_M, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m_i = tl.full((BLOCK_M,), LOWEST, tl.float32)
    upper = tl.minimum(S, i0 + reach) // BLOCK_N * BLOCK_N
    end = tl.minimum(S, i0 + BLOCK_M - 1 + reach)
    for j0 in tl.range(0, upper, BLOCK_N, loop_unroll_factor=UNROLL):
        acc, l_i, m_i = _plain_tile(
            acc, l_i, m_i, q, k_matrix, v_matrix, offs_m, j0, (S, None, reach), scale,
            D, BLOCK_D, BLOCK_N, PRECISION, MASKED=False,
        )  # fmt: skip
    for j0 in tl.range(upper, end, BLOCK_N):
        acc, l_i, m_i = _plain_tile(
            acc, l_i, m_i, q, k_matrix, v_matrix, offs_m, j0, (S, None, reach), scale,
            D, BLOCK_D, BLOCK_N, PRECISION, MASKED=True,
        )  # fmt: skip
    out_matrix = (head_pointer(out_ptr, stride_ob, stride_oh, b, h, ALIGNED), stride_om, T)
    store_rows(out_matrix, acc / l_i[:, None], offs_m, D, BLOCK_D)
    tl.store(lse_ptr + bh * T + offs_m, m_i + tl.log(l_i), mask=offs_m < T)


def without_position_term(forward: Launch) -> Launch:
    """The launch of the plain kernel on the inputs, tile and options of a launch of forward_kernel."""
    values = {name: forward.values[name] for name in plain_forward_kernel.arg_names}
    return Launch(plain_forward_kernel, {n: getattr(x, "base", x) for n, x in values.items()}, forward.options)
