"""The decoder layers of the original Transformer-XL: attention, then a position-wise feed-forward net.

Legend: B batch, H heads, T segment length, M memory length, S = M + T, P rows of r, D head size, C width (d_model).
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from txl_kernels.layer import RelLearnableMultiHeadAttn, RelPartialLearnableMultiHeadAttn
from txl_kernels.validation import has_values


class PositionalEmbedding(nn.Module):
    """Sinusoids of a position or distance (Vaswani et al. 2017, section 3.5; R in Dai et al. 2019, section 3.3).

    All sines come first, then all cosines, as in the original. In a 16-bit module, whose buffer can't tell large
    positions apart, angles are computed in float32 all the same.

    Args:
        demb: Width C of the rows, even.

    Raises:
        ValueError: demb is odd.
    """

    def __init__(self, demb: int) -> None:
        super().__init__()
        if demb % 2:
            raise ValueError(f"demb: expected an even width (half sines, half cosines), got {demb}")
        self.demb = demb
        self.register_buffer("inv_freq", self._frequencies())

    def forward(self, pos_seq: Tensor, bsz: int | None = None) -> Tensor:
        """Rows for the positions pos_seq (P,): (P, 1, C), or (P, bsz, C) as a view, in the dtype of the module."""
        narrow = self.inv_freq.dtype.itemsize < 4
        angle = pos_seq[:, None] * (self._frequencies(pos_seq.device) if narrow else self.inv_freq)
        rows = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.inv_freq.dtype)[:, None]
        return rows if bsz is None else rows.expand(-1, bsz, -1)

    def _frequencies(self, device: torch.device | None = None) -> Tensor:
        return 1 / 10000 ** (torch.arange(0, self.demb, 2, device=device, dtype=torch.float32) / self.demb)


class PositionwiseFF(nn.Module):
    """Two linear maps with a ReLU between them, residual and LayerNorm (Vaswani et al. 2017, section 3.3).

    Args:
        d_model: Width C of the hidden states.
        d_inner: Width between the two maps.
        dropout: Probability after the ReLU and after the second map.
        pre_lnorm: Normalise the input instead of the sum.
    """

    def __init__(self, d_model: int, d_inner: int, dropout: float, pre_lnorm: bool = False) -> None:
        super().__init__()
        self.CoreNet = nn.Sequential(
            *(nn.Linear(d_model, d_inner), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            *(nn.Linear(d_inner, d_model), nn.Dropout(dropout)),
        )
        self.layer_norm = nn.LayerNorm(d_model)
        self.pre_lnorm = pre_lnorm

    def forward(self, inp: Tensor) -> Tensor:
        """Hidden states (..., C) to hidden states (..., C)."""
        if self.pre_lnorm:
            return inp + self.CoreNet(self.layer_norm(inp))
        return self.layer_norm(inp + self.CoreNet(inp))


class MultiHeadAttn(nn.Module):
    """Attention without relative positions (Vaswani et al. 2017, section 3.2), over memory and segment.

    As in the original, ``pre_lnorm`` normalises what keys and values are made from, not the queries. Deviations
    from the original: ``attn_mask=None`` means causal, and a query that sees no key attends to nothing instead of
    being NaN. Both as in `RelPartialLearnableMultiHeadAttn`.

    Args:
        n_head: Number of heads H.
        d_model: Width C of the hidden states.
        d_head: Head size D.
        dropout: Probability on the output of the last projection.
        dropatt: Probability on the attention probabilities.
        pre_lnorm: Normalise memory and segment before the projections instead of the sum after them.
    """

    def __init__(
        self, n_head: int, d_model: int, d_head: int, dropout: float, dropatt: float = 0.0, pre_lnorm: bool = False
    ) -> None:
        super().__init__()
        self.n_head, self.d_model, self.d_head, self.pre_lnorm = n_head, d_model, d_head, pre_lnorm
        self.q_net = nn.Linear(d_model, n_head * d_head, bias=False)
        self.kv_net = nn.Linear(d_model, 2 * n_head * d_head, bias=False)
        self.drop = nn.Dropout(dropout)
        self.dropatt = nn.Dropout(dropatt)
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False)
        self.layer_norm = nn.LayerNorm(d_model)
        self.scale = d_head**-0.5

    def forward(
        self,
        h: Tensor,
        attn_mask: Tensor | None = None,
        mems: Tensor | None = None,
        *,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attends from the segment to memory and segment.

        Args:
            h: Hidden states of the segment, (T, B, C).
            attn_mask: None (causal), or (T, S, 1), (T, S, B) or (S, B), bool or uint8, True or 1 = hidden.
            mems: Memory (M, B, C), or None or a tensor of length 0 for M = 0.
            window: As in `rel_attention`; None with a mask.

        Returns:
            Hidden states (T, B, C).

        Raises:
            ValueError: A shape does not fit, or there are a mask and a window.
        """
        if attn_mask is not None and window is not None:
            raise ValueError(f"window: expected None with attn_mask, got {window}")
        if h.ndim != 3 or h.shape[2] != self.d_model:
            raise ValueError(f"h: expected (T, B, d_model) with d_model = {self.d_model}, got {tuple(h.shape)}")
        T, B, C = h.shape
        if mems is not None and mems.shape[0] and mems.shape[1:] != (B, C):
            raise ValueError(f"mems: expected (M, B, d_model) = (M, {B}, {C}) as h, got {tuple(mems.shape)}")
        states = h if mems is None or not mems.shape[0] else torch.cat([mems, h])
        S = states.shape[0]
        keys_from = self.layer_norm(states) if self.pre_lnorm else states
        q, k, v = (
            x.unflatten(-1, (self.n_head, self.d_head)).permute(1, 2, 0, 3)
            for x in (self.q_net(h), *self.kv_net(keys_from).chunk(2, dim=-1))
        )
        if window is not None:
            every = torch.ones(T, S, dtype=torch.bool, device=h.device)
            visible = every.tril(S - T)
            visible = visible.triu(S - T - window[0]) if window[0] >= 0 else visible
        elif attn_mask is None and has_values(h):  # what traces can't make one
            visible = causal_lower_right(T, S)
        elif attn_mask is None:
            visible = torch.ones(T, S, dtype=torch.bool, device=h.device).tril(S - T)
        elif attn_mask.shape not in ((T, S, 1), (T, S, B), (S, B)):
            raise ValueError(
                f"attn_mask: expected ({T}, {S}, 1), ({T}, {S}, {B}) or ({S}, {B}), got {tuple(attn_mask.shape)}"
            )
        else:
            hidden = attn_mask[None] if attn_mask.ndim == 2 else attn_mask
            visible = hidden.logical_not().permute(2, 0, 1)[:, None]
        dropout_p = self.dropatt.p if self.training else 0.0
        out = nn.functional.scaled_dot_product_attention(q, k, v, visible, dropout_p, scale=self.scale)
        out = h + self.drop(self.o_net(out.permute(2, 0, 1, 3).flatten(2)))
        return out if self.pre_lnorm else self.layer_norm(out)


class DecoderLayer(nn.Module):
    """A layer without relative positions (``attn_type`` 2 and 3): `MultiHeadAttn`, then `PositionwiseFF`.

    Args:
        n_head: Number of heads H.
        d_model: Width C of the hidden states.
        d_head: Head size D.
        d_inner: Inner width of the feed-forward net.
        dropout: Probability on the output of the attention and in the feed-forward net.
        dropatt: Probability on the attention probabilities.
        pre_lnorm: LayerNorm in front of attention and feed-forward net instead of behind them.
    """

    def __init__(
        self,
        n_head: int,
        d_model: int,
        d_head: int,
        d_inner: int,
        dropout: float,
        dropatt: float = 0.0,
        pre_lnorm: bool = False,
    ) -> None:
        super().__init__()
        self.dec_attn = MultiHeadAttn(n_head, d_model, d_head, dropout, dropatt, pre_lnorm)
        self.pos_ff = PositionwiseFF(d_model, d_inner, dropout, pre_lnorm)

    def forward(
        self,
        dec_inp: Tensor,
        dec_attn_mask: Tensor | None = None,
        mems: Tensor | None = None,
        *,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """Hidden states (T, B, C) to (T, B, C); mask, memory and window as in `MultiHeadAttn`."""
        return self.pos_ff(self.dec_attn(dec_inp, dec_attn_mask, mems, window=window))


class _RelDecoderLayer(nn.Module):
    """What both layers with relative positions share; arguments as `DecoderLayer`, lengths accepted but not used."""

    _attention: type[nn.Module]

    def __init__(
        self,
        n_head: int,
        d_model: int,
        d_head: int,
        d_inner: int,
        dropout: float,
        dropatt: float = 0.0,
        tgt_len: int | None = None,
        ext_len: int | None = None,
        mem_len: int | None = None,
        pre_lnorm: bool = False,
    ) -> None:
        super().__init__()
        lengths = (tgt_len, ext_len, mem_len)
        self.dec_attn = self._attention(n_head, d_model, d_head, dropout, dropatt, *lengths, pre_lnorm)
        self.pos_ff = PositionwiseFF(d_model, d_inner, dropout, pre_lnorm)


class RelPartialLearnableDecoderLayer(_RelDecoderLayer):
    """A layer of the Transformer-XL (``attn_type`` 0; Dai et al. 2019, section 3.3, the equations at its end)."""

    _attention = RelPartialLearnableMultiHeadAttn

    def forward(
        self,
        dec_inp: Tensor,
        r: Tensor,
        r_w_bias: Tensor,
        r_r_bias: Tensor,
        dec_attn_mask: Tensor | None = None,
        mems: Tensor | None = None,
        *,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """Hidden states (T, B, C) to (T, B, C); the rest as in `RelPartialLearnableMultiHeadAttn`."""
        return self.pos_ff(self.dec_attn(dec_inp, r, r_w_bias, r_r_bias, dec_attn_mask, mems, window=window))


class RelLearnableDecoderLayer(_RelDecoderLayer):
    """A layer with a learned vector and bias for every distance (``attn_type`` 1; Shaw et al. 2018, as adapted)."""

    _attention = RelLearnableMultiHeadAttn

    def forward(
        self,
        dec_inp: Tensor,
        r_emb: Tensor,
        r_w_bias: Tensor,
        r_bias: Tensor,
        dec_attn_mask: Tensor | None = None,
        mems: Tensor | None = None,
        *,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """Hidden states (T, B, C) to (T, B, C); the rest as in `RelLearnableMultiHeadAttn`."""
        return self.pos_ff(self.dec_attn(dec_inp, r_emb, r_w_bias, r_bias, dec_attn_mask, mems, window=window))
