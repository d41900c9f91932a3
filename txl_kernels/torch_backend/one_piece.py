"""Small problems on a CPU in one piece: all queries against all keys, without the cost of cutting tiles.

One query (generation) of any length of memory, or so few that one tile would hold all scores. Only the right edge of
the window, and for one query the left, may hide keys, so that every query has a key; each key in use has a row of r,
shared by the batch (a future that wraps has too few). Raw coordinates are those of positions.py.
"""

import torch
from torch import Tensor

from txl_kernels.arguments import Inputs, Options
from txl_kernels.torch_backend import tiles
from txl_kernels.torch_backend.kept import Kept
from txl_kernels.torch_backend.terms import needed
from txl_kernels.torch_backend.tiles import cast, product_dtype

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_softmax_backward = torch.ops.aten._softmax_backward_data.out


class OnePiece:
    """A problem that can be done in one piece.

    Attributes:
        k, v: (B, Hk, n, D), the n keys in use.
        q_content, q_position: (B, H, T, D or Dr), the queries with their biases, not scaled.
        r: (1|H, p, Dr), the rows in use.
        position_queries: the name of the input that q_position comes from.
        row: which row of the inputs' r the first of them is.
    """

    def __init__(self, inputs: Inputs, options: Options, first: int, row: int, end: int) -> None:
        q, k, v, r = inputs[:4]
        self.scale, self.row = options.scale, row
        self.k, self.v = (k[:, :, first:], v[:, :, first:]) if first else (k, v)
        self.r = r[0] if end == r.shape[2] else r[0, :, row : row + end]
        self.position_queries = "q" if inputs.q_pos is None else "q_pos"
        self.q_content = _sum(q, inputs.content_bias)
        self.q_position = _sum(q if inputs.q_pos is None else inputs.q_pos, inputs.position_bias)
        self.shape = *q.shape[:3], self.k.shape[2]
        self._columns, self._end = self.k.shape[2] + q.shape[2] - 1, end

    def rows_of_r(self, x: Tensor) -> Tensor:
        """x (B, H, T, Dr) as what r is multiplied with: (1|H, H|1 * T * B, Dr)."""
        return x.permute(1, 2, 0, 3).reshape(self.r.shape[0], -1, x.shape[3])

    def shifted(self, raw: Tensor) -> Tensor:
        """raw (1|H, H|1 * T * B, columns), dense, by query and key: (B, H, T, n)."""
        (B, H, T, n), columns = self.shape, self._columns
        return raw.as_strided((B, H, T, n), (columns, T * B * columns, B * columns - 1, 1), T - 1)

    def position_scores(self) -> Tensor:
        """scale * BD, -inf where hidden, in the dtype of sums: (B, H, T, n)."""
        B, H, T, n = self.shape
        if self.r.dtype is torch.bfloat16:
            raw = _scores_of_one(self.rows_of_r(self.q_position)[None], self.r[None]).float().mul_(self.scale)
        else:
            raw = torch.bmm(self.rows_of_r(self.q_position * self.scale), self.r.mT)
        if T == 1:
            return raw.view(H, B, 1, n).transpose(0, 1)
        if self._end < self._columns:
            raw = torch.constant_pad_nd(raw, (0, self._columns - self._end), -torch.inf)
        return self.shifted(raw)

    def scores(self, place: Tensor | None = None) -> Tensor:
        """scale * (AC + BD), -inf where hidden: (B * H, T, n), in a place of that shape or a new one."""
        scores = self.position_scores()
        scores = scores.contiguous() if place is None else place.view(self.shape).copy_(scores)
        scores, k = scores.flatten(0, 1), self.k.flatten(0, 1)
        return torch.baddbmm(scores, self.q_content.flatten(0, 1), k.mT, alpha=self.scale, out=scores)

    def to_raw(self, dscores: Tensor) -> Tensor:
        """dscores (B * H, T, n) by row of r: (1|H, H|1 * T * B, p)."""
        B, H, T, _ = self.shape
        raw = dscores.new_zeros((self.r.shape[0], H * T * B // self.r.shape[0], self._columns))
        self.shifted(raw).copy_(dscores.view(self.shape))
        return raw[..., : self._end]


def one_piece(inputs: Inputs, options: Options, for_backward: bool = False) -> OnePiece | None:
    """The problem in one piece, or None where it must be cut into tiles."""
    q, r = inputs.q, inputs.r
    (B, H, T, _), S, (left, right) = q.shape, inputs.k.shape[2], options[:2]
    if q.device.type != "cpu" or r is None or r.shape[0] > 1 or inputs.r_bias is not None or needed(inputs, options):
        return None
    if inputs.key_lengths is not None or q.dtype != product_dtype(inputs, options):
        return None
    small = T <= 2 * tiles.MAX_ROWS and B * H * T * S <= tiles.TILE_SCORES and q.dtype is not torch.bfloat16
    if T > 1 and (not small or 0 <= left < S - 1):
        return None
    first = max(S - 1 - left, 0) if left >= 0 else 0
    if for_backward and (first or inputs.k.shape[1] < H or q.dtype is torch.bfloat16):
        return None
    row = options.first_distance - (S - 1) + first
    columns = S - first + T - 1
    end = columns if right < 0 else min(S - first + right, columns)
    return OnePiece(inputs, options, first, row, end) if 0 <= row <= r.shape[2] - end else None


def forward(piece: OnePiece, q: Tensor, kept: Kept | None) -> tuple[Tensor, Tensor]:
    """out, laid out as q, and the log-sum-exp."""
    (B, H, T, n), Hk, scale = piece.shape, piece.k.shape[1], piece.scale
    if kept is not None and (p := kept.take((B * H, T, n))[0]) is not None:
        lse, _ = tiles.softmax(piece.scores(p))
        out = torch.bmm(p, piece.v.flatten(0, 1))
        return _laid_out_as(q, out.view(q.shape)), lse.view(B, H, T)
    bd, q_content, k, v = piece.position_scores(), piece.q_content, piece.k, piece.v
    if Hk < H:  # query heads of one key head as rows of one product
        rows = H // Hk * T
        q_content, bd = q_content.reshape(B, Hk, rows, -1), bd.reshape(B, Hk, rows, n)
    if q.dtype is torch.bfloat16:  # PyTorch's fused attention is 9 times slower here than in float32
        p = bd.add_(_scores_of_one(q_content, k), alpha=scale)
        lse, _ = tiles.softmax(p)
        out = _values_of_one(p.to(q.dtype), v)
    else:
        out, lse = _fused(q_content, k, v, attn_mask=bd, scale=scale)
    out, lse = out.reshape(q.shape), lse.reshape(B, H, T).contiguous()
    return _laid_out_as(q, out), lse


def backward(
    piece: OnePiece, dout: Tensor, dlse: Tensor | None, wanted: dict[str, Tensor], kept: Kept | None
) -> dict[str, Tensor]:
    """The gradients of what is wanted, as in backward_pass.py."""
    (B, H, T, n), scale = piece.shape, piece.scale
    v, dout = piece.v.flatten(0, 1), dout.flatten(0, 1)
    p = None if kept is None else kept.take((B * H, T, n))[0]
    if p is None:
        p = piece.scores()
        torch.softmax(p, -1, out=p)
    grads = {}
    if "v" in wanted:
        grads["v"] = torch.bmm(p.mT, dout).view(B, H, n, -1)
    if wanted.keys() != {"v"}:
        # scale * dP, so that all further products are of scale * dS and unscaled inputs.
        ds = dout.new_empty(p.shape)
        torch.baddbmm(ds, dout, v.mT, beta=0, alpha=scale, out=ds)
        _softmax_backward(ds, p, -1, p.dtype, grad_input=ds)
        if dlse is not None:
            ds.addcmul_(p, dlse.reshape(B * H, T, 1), value=scale)
        grads |= _through_scores(piece, ds, wanted)
    return {name: _laid_out_as(x, grads[name]) for name, x in wanted.items()}


def _through_scores(piece: OnePiece, ds: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of all but v from scale * dS (B * H, T, n)."""
    (B, H, T, n), queries, grads = piece.shape, piece.position_queries, {}
    if "k" in wanted:
        grads["k"] = torch.bmm(ds.mT, piece.q_content.flatten(0, 1)).view(B, H, n, -1)
    if "q" in wanted or "content_bias" in wanted:
        grads["q"] = torch.bmm(ds, piece.k.flatten(0, 1)).view(B, H, T, -1)
    if "content_bias" in wanted:
        grads["content_bias"] = grads["q"].sum((0, 2))

    if wanted.keys() & {"r", "position_bias", queries}:
        ds = piece.to_raw(ds)
    if "r" in wanted:
        dr, rows = torch.bmm(ds.mT, piece.rows_of_r(piece.q_position)), wanted["r"].shape[2]
        after = rows - piece.row - dr.shape[1]
        grads["r"] = (torch.constant_pad_nd(dr, (0, 0, piece.row, after)) if dr.shape[1] < rows else dr)[None]
    if wanted.keys() & {"position_bias", queries}:
        dq_position = torch.bmm(ds, piece.r).view(H, T, B, -1).permute(2, 0, 1, 3)
        if "position_bias" in wanted:
            grads["position_bias"] = dq_position.sum((0, 2))
        if queries == "q_pos":
            grads["q_pos"] = dq_position
        elif "q" in wanted:
            grads["q"] = torch.add(grads["q"], dq_position, out=torch.empty_like(wanted["q"]))
    return grads


def _laid_out_as(x: Tensor, result: Tensor) -> Tensor:
    """result in the dense layout and the dtype of x."""
    same_layout = result.stride() == x.stride() or (result.is_contiguous() and x.is_contiguous())
    if same_layout and result.dtype is x.dtype:
        return result
    return torch.empty_like(x).copy_(result)


def _sum(queries: Tensor, bias: Tensor | None) -> Tensor:
    """queries + bias (H, D), in the dtype of the queries."""
    return queries if bias is None else cast(queries + bias.unsqueeze(1), queries.dtype)


def _scores_of_one(queries: Tensor, keys: Tensor) -> Tensor:
    """queries @ keys^T in bfloat16, (b, h, m, n), for few rows m and many keys of any layout.

    Keys with the heads of a row side by side, as a time-major cache has them, are read in order: all heads in one
    product with a block-diagonal matrix of the queries. That is h times the arithmetic and up to 1.7 times as fast, but
    not as a batched product, which PyTorch does 14 times slower.
    """
    b, h, m, D = queries.shape
    if keys.stride(1) != D:  # with the many on the left, up to 20 times faster
        return torch.matmul(keys, queries.mT).mT
    blocks = queries.new_zeros((b, h, m, h, D))
    blocks.diagonal(0, 1, 3).copy_(queries.movedim(1, -1))
    return _products(blocks.view(b, h * m, h * D), keys.transpose(1, 2).flatten(2).mT).view(b, h, m, -1)


def _values_of_one(weights: Tensor, values: Tensor) -> Tensor:
    """weights @ values in bfloat16, (b, h, m, D), for few rows m and many values of any layout.

    PyTorch's batched product first copies values whose heads stand side by side. Read in order, all heads are one
    product, of which a diagonal of blocks is wanted: 1.4 times as fast out of the cache, 0.9 in it.
    """
    b, h, m, n = weights.shape
    if values.stride(1) != values.shape[3]:
        return torch.matmul(weights, values)
    products = _products(weights.reshape(b, h * m, n), values.transpose(1, 2).flatten(2))
    return products.view(b, h, m, h, -1).diagonal(0, 1, 3).movedim(-1, 1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, one after the other."""
    products = a.new_empty((*a.shape[:2], b.shape[2]))
    for x, y, product in zip(a, b, products, strict=True):
        torch.mm(x, y, out=product)
    return products
