"""Named steps of the kernels, shared by forward and backward so that shift and mask cannot disagree.

Notation: B batch, H heads, T queries, S keys, P rows of r, D head size; i query, j key, p row of r.
Row p of r serves the pair (i, j) when p = j - i + rel_offset, with rel_offset = first_distance - (S - T).
Query i sees the keys max(0, i + begin) <= j < min(keys, i + reach): with M = S - T and a window (left, right),
begin = M - left, or None without a limit, and reach = M + 1 + right, at most S; keys = S or fewer by key_lengths.

The kernels' q is q + u; their q_pos is q + v, or what the caller gave, or None where it is q itself. A forward of few
queries gets q and the biases and adds them.

The shift inside a tile of M queries (from i0) by N keys (from j0), N a power of two: with c = j0 - i0 + rel_offset
the tile needs the rows c + (jj - ii). Cut r into blocks of N rows, block e starting at row c - e N, and let
raw[e] = Q block(e)^T. Then for x = (jj - ii) mod N the wanted product stands in raw[(ii + x) // N][ii, x]: a select
on constants, then a rotation of every row by its own index. The kernel whose programs own keys holds its tiles
transposed, and rotates columns.

A matrix is passed as a tuple (pointer, row stride, number of rows); its columns are contiguous. What is only read may
come as a tensor descriptor of all batch elements and heads instead (TMA: the copy engine makes addresses and bounds,
which saves registers); then the tuple is (descriptor, place, number of rows), as `head_matrix` makes it.

PRECISION says how float32 operands are multiplied, "ieee" or "tf32".
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts, the first with 9 bits: its product with an exponent is exact.
LN_2_HIGH = tl.constexpr(0.693359375)
LN_2_LOW = tl.constexpr(-2.12194440054690583e-4)
# Below every score but -inf, and finite times LOG2_E: a row whose keys are all hidden keeps a sum of 0.
LOWEST = tl.constexpr(-2e38)


@triton.jit
def head_pointer(ptr, stride_b, stride_h, b, h, ALIGNED: tl.constexpr):
    """Start of one (batch, head). ALIGNED promises 16 bytes, which the unspecialised strides do not show."""
    ptr += b * stride_b + h * stride_h
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def head_matrix(source, stride_b, stride_h, stride_row, n_rows, b, h, ALIGNED: tl.constexpr, CUT: tl.constexpr = False):
    """The matrix of one (batch, head), from a pointer or a descriptor of (B, H, rows, D), (H, rows, D) or (rows, D).

    CUT: n_rows may be fewer than the rows that the descriptor has.
    """
    if isinstance(source, tl.tensor_descriptor):
        lane = (tl.cast(b, tl.int32), tl.cast(h, tl.int32))
        matrix = source, (lane[4 - len(source.block_shape) :], CUT), n_rows
    else:
        matrix = head_pointer(source, stride_b, stride_h, b, h, ALIGNED), stride_row, n_rows
    return matrix


@triton.jit
def load_rows(matrix, first, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr = True):
    """(ROWS, BLOCK_D) from row first on; rows that the matrix does not have and padding columns are 0.

    Without EDGE all rows are below its n_rows, or the matrix is not CUT.
    """
    source, place, n_rows = matrix
    rows = first + tl.arange(0, ROWS)
    if isinstance(source, tl.tensor_descriptor):
        lane, CUT = place
        tile = source.load(lane + (first, 0)).reshape(ROWS, BLOCK_D)
        if EDGE and CUT:
            tile = tl.where((rows < n_rows)[:, None], tile, 0.0)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        inside = ((rows >= 0) & (rows < n_rows))[:, None]
        if D < BLOCK_D:
            inside = inside & (offs_d < D)[None, :]
        tile = tl.load(source + rows.to(tl.int64)[:, None] * place + offs_d[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def with_bias(q, bias_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """q + bias, rounded once."""
    offs_d = tl.arange(0, BLOCK_D)
    bias = tl.load(bias_ptr + offs_d, mask=offs_d < D, other=0.0)
    return (q.to(tl.float32) + bias.to(tl.float32)[None, :]).to(q.dtype)


@triton.jit
def store_rows(matrix, x, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr = False):
    """Stores x (len(rows), BLOCK_D), cast to the pointer's type, into the rows that exist, or adds it to them."""
    ptr, stride_row, n_rows = matrix
    offs_d = tl.arange(0, BLOCK_D)
    inside = (rows < n_rows)[:, None]
    if D < BLOCK_D:
        inside = inside & (offs_d < D)[None, :]
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride_row + offs_d[None, :]
    if ADD:
        x += tl.load(ptrs, mask=inside, other=0.0)
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_row(ptr, x, D: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr):
    """Stores the first D elements of x (BLOCK_D,), or adds them to what is there."""
    offs_d = tl.arange(0, BLOCK_D)
    if ADD:
        x += tl.load(ptr + offs_d, mask=offs_d < D, other=0.0)
    tl.store(ptr + offs_d, x, mask=offs_d < D)


@triton.jit
def store_scores(matrix, x, row, column, EDGE: tl.constexpr):
    """Stores a transposed tile (COLUMNS, ROWS) from a row and a multiple of 16 columns on.

    Columns are in whole tiles; at the EDGE some rows may not exist.
    """
    ptr, stride_row, n_rows = matrix
    rows, columns = tl.arange(0, x.shape[1])[None, :], tl.arange(0, x.shape[0])[:, None]
    ptrs = ptr + row * stride_row + column + (rows * stride_row + columns)
    if EDGE:
        tl.store(ptrs, x, mask=row + rows < n_rows)
    else:
        tl.store(ptrs, x)


@triton.jit
def scores_matrix(source, stride_row, n_rows, slot):
    """The matrix of scores in one slot of the workspace, from a pointer or a descriptor (slots, n_rows, columns)."""
    if isinstance(source, tl.tensor_descriptor):
        matrix = source, slot, n_rows
    else:
        matrix = source + slot.to(tl.int64) * n_rows * stride_row, stride_row, n_rows
    return matrix


@triton.jit
def load_scores(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of what `store_scores` stored, from a multiple of 16 columns on; rows it does not have are 0.

    Where nobody sees a key nothing has been stored: such places hold anything.
    """
    source, place, n_rows = matrix
    if isinstance(source, tl.tensor_descriptor):
        tile = source.load((place, row, column)).reshape(ROWS, COLUMNS)
    else:
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        tile = tl.load(source + rows[:, None] * place + columns[None, :], mask=(rows < n_rows)[:, None], other=0.0)
    return tile


@triton.jit
def load_raw_scores(matrix, row, p0, shift, bounds, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """(ROWS, COLUMNS) of scores by row of r from p0 on, those of the keys j = p + i - shift: rows one element longer.

    Without MASKED all of them are visible; else those that are not, and rows that the matrix does not have, are 0.
    """
    ptr, stride_row, n_rows = matrix
    ptr += row * (stride_row + 1) + p0 - shift
    ptrs = (ptr + tl.arange(0, ROWS)[:, None] * (stride_row + 1)) + tl.arange(0, COLUMNS)[None, :]
    if MASKED:
        offs_m = row + tl.arange(0, ROWS)[:, None]
        offs_n = p0 - shift + offs_m + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(ptrs, mask=(offs_m < n_rows) & visible_mask(offs_m, offs_n, bounds), other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def load_row_bias(r_bias_ptr, rows, n_rows):
    """The bias of the given rows of r in float32, 0 outside the table; (len(rows),)."""
    return tl.load(r_bias_ptr + rows, mask=(rows >= 0) & (rows < n_rows), other=0.0).to(tl.float32)


@triton.jit
def key_count(lengths_ptr, b, S):
    """How many keys batch element b has: S, or lengths[b] clamped to [0, S]."""
    keys = S
    if lengths_ptr is not None:
        keys = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), S).to(tl.int32)
    return keys


@triton.jit
def position_block(
    q,
    table,
    first,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):
    """raw[ii, x] = q_ii . r[first + x] and the bias of the row, (M, ROWS); or its transpose.

    table is what depends on the relative position, the matrix of r and the row bias; the pointer of each may be None.
    """
    matrix, r_bias_ptr = table
    raw = tl.zeros((ROWS, q.shape[0]) if TRANSPOSED else (q.shape[0], ROWS), tl.float32)
    if matrix[0] is not None:
        r = load_rows(matrix, first, ROWS, D, BLOCK_D)
        if TRANSPOSED:
            raw = tl.dot(r, tl.trans(q), input_precision=PRECISION)
        else:
            raw = tl.dot(q, tl.trans(r), input_precision=PRECISION)
    if r_bias_ptr is not None:
        bias = load_row_bias(r_bias_ptr, first + tl.arange(0, ROWS), matrix[2])
        raw += bias[:, None] if TRANSPOSED else bias[None, :]
    return raw


@triton.jit
def block_of(ii, x, BLOCK_N: tl.constexpr):
    """The number of the block of r that holds column x of query ii; the two index arrays broadcast."""
    return (ii + x) // BLOCK_N


@triton.jit
def select_block(blocks, e):
    """blocks[e], element by element, of a tuple of blocks with the shape of e."""
    selected = blocks[0]
    for g in tl.static_range(1, len(blocks)):
        selected = tl.where(e == g, blocks[g], selected)
    return selected


@triton.jit
def rotate_right(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y[ii, jj] = x[ii, (jj - ii) mod N]: from rows of r to keys."""
    columns = tl.arange(0, BLOCK_N)[None, :] - tl.arange(0, BLOCK_M)[:, None]
    return tl.gather(x, columns & (BLOCK_N - 1), axis=1)


@triton.jit
def rotate_down(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """rotate_right of the transposed tile: y[jj, ii] = x[(jj - ii) mod N, ii]."""
    rows = tl.arange(0, BLOCK_N)[:, None] - tl.arange(0, BLOCK_M)[None, :]
    return tl.gather(x, rows & (BLOCK_N - 1), axis=0)


@triton.jit
def visible_mask(offs_m, offs_n, bounds):
    """True where query i may attend to key j; the two index arrays broadcast against each other."""
    keys, begin, reach = bounds
    visible = (offs_n >= 0) & (offs_n < tl.minimum(offs_m + reach, keys))
    if begin is not None:
        visible = visible & (offs_n >= offs_m + begin)
    return visible


@triton.jit
def edge_tile(edge, lower, upper):
    """The number of a tile at either edge, with the tiles [lower, upper) between them left out."""
    return tl.where(edge < lower, edge, edge + upper - lower)


@triton.jit
def shift_in(raw, pending, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """bd of a key tile from its newest block, with what this block leaves for the tiles after it.

    Query ii takes the block of ii // N tiles ago, and from column N - ii mod N on the one it took a tile before.
    pending is what was taken for the last tile, and what the queries further on take g tiles ahead, g = 1, 2, ...
    (Whole blocks handed on unchanged would keep Triton from pipelining the loop.)
    """
    ii, x = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    taken = raw
    if len(pending) > 1:
        taken = tl.where(ii // BLOCK_N == 0, raw, pending[1])
    bd = rotate_right(tl.where(x < BLOCK_N - ii % BLOCK_N, taken, pending[0]), BLOCK_M, BLOCK_N)
    later = (taken,)
    for g in tl.static_range(2, len(pending)):
        later = later + (tl.where(ii // BLOCK_N == g - 1, raw, pending[g]),)
    if len(pending) > 1:
        later = later + (raw,)
    return bd, later


@triton.jit
def exp(x, dtype: tl.constexpr):
    """e^x for x <= 0, NaN kept, as exact as inputs of this dtype deserve.

    2^(x log2 e) has a relative error that grows with |x|, since the product is rounded; so for float32 the
    whole number of powers of two is taken off first (Cody and Waite 1980). tl.exp does neither: it adds instructions
    for results that underflow anyway.
    """
    if dtype == tl.float32:
        x = tl.where(x < -150.0, -150.0, x)
        n = tl.floor(x * LOG2_E + 0.5)
        remainder = (x - n * LN_2_HIGH) - n * LN_2_LOW
        y = tl.exp2(n) * tl.exp2(remainder * LOG2_E)
    else:
        y = tl.exp2(x * LOG2_E)
    return y


@triton.jit
def exp_difference(x, y, dtype: tl.constexpr, EXACT: tl.constexpr):
    """e^(x - y) for x <= y, y log2 e finite. EXACT subtracts first, which numbers as large as a mask's need.

    In 16 bits x log2 e - y log2 e is one fused multiply-add for every x, and scores are rounded more than that rounds.
    """
    return exp(x - y, dtype) if EXACT or dtype == tl.float32 else tl.exp2(x * LOG2_E - y * LOG2_E)


@triton.jit
def load_row_stats(stats, offs_m, T):
    """Log-sum-exp, what float32 lost of it, and delta of the given queries; queries beyond T have p = ds = 0.

    stats is (pointers to the three, the second None where nothing was lost, and the place of query 0).
    """
    lse_ptr, rest_ptr, delta_ptr, first = stats
    lse = tl.load(lse_ptr + first + offs_m, mask=offs_m < T, other=float("inf"))
    delta = tl.load(delta_ptr + first + offs_m, mask=offs_m < T, other=0.0)
    rest = tl.zeros_like(delta)
    if rest_ptr is not None:
        rest = tl.load(rest_ptr + first + offs_m, mask=offs_m < T, other=0.0)
    return lse, rest, delta
