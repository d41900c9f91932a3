"""The language model of the original Transformer-XL: segments that read, and leave, a memory of hidden states.

Legend: B batch, H heads, T segment length, M memory length, S = M + T, D head size, C width (d_model).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from txl_kernels.layer_steps import last_rows
from txl_kernels.models.adaptive import AdaptiveEmbedding, ProjectedAdaptiveLogSoftmax, init_parameters
from txl_kernels.models.cache import Cache
from txl_kernels.models.decoder import (
    DecoderLayer,
    PositionalEmbedding,
    RelLearnableDecoderLayer,
    RelPartialLearnableDecoderLayer,
)
from txl_kernels.models.validation import check_counts, check_mems, check_segment, plain_arguments


class MemTransformerLM(nn.Module):
    """The Transformer-XL language model (Dai et al. 2019, arXiv 1901.02860, section 3).

    ``attn_type`` chooses the attention: 0 that of the Transformer-XL (section 3.3), 1 a learned vector and bias for
    every distance (Shaw et al. 2018), 2 absolute sinusoids (Vaswani et al. 2017), 3 learned absolute positions,
    added in front of every layer (Al-Rfou et al. 2018). 0 and 1 run on the fused attention.

    Carry the memory from segment to segment; without it a call starts afresh::

        mems = []
        for data, target in segments:
            losses, *mems = model(data, target, *mems)
            losses.mean().backward()

    Deviations from the original:

    - Parameters are drawn here, as its training script does by default; there they are uninitialised until then.
    - Losses come in token order also with cutoffs, see `ProjectedAdaptiveLogSoftmax`.
    - The memory handed in is left as it is; there attn_type 2 and 3 add positions to it in place. The new memory is
      the same: what attn_type 2 and 3 keep holds positions, and gets them again each time it is read.
    - attn_type 2 works with a memory that is still empty. Sampled softmax, which can't run there, is refused.

    Args:
        n_token: Size of the vocabulary.
        n_layer: Number of layers.
        n_head: Number of heads H.
        d_model: Width C of the hidden states.
        d_head: Head size D.
        d_inner: Inner width of the feed-forward nets.
        dropout: Probability on embeddings, sinusoids, attention output, in the feed-forward nets and on the output.
        dropatt: Probability on the attention probabilities.
        tie_weight: Whether input and output share the embeddings.
        d_embed: Width of the embeddings, or of the first cluster's; None: d_model.
        div_val: Each cluster's embeddings are narrower than those of the one before by this factor.
        tie_projs: For each cluster, whether input and output share the projection, if there is one.
        pre_lnorm: LayerNorm in front of attention and feed-forward net instead of behind them.
        tgt_len: Tokens of a segment that are predicted.
        ext_len: Tokens of a segment that the next one repeats as extended context.
        mem_len: Largest number of hidden states kept for the next segment, per layer; 0: no memory.
        cutoffs: First tokens of the clusters after the first, increasing; empty: one cluster.
        adapt_inp: Accepted as in the original, not used.
        same_length: Every token sees the nearest mem_len tokens only, itself included.
        attn_type: 0 to 3, see above.
        clamp_len: Distances beyond this one look like it (attn_type 0 and 2; in 1 like the one before it; not in 3);
            <= 0: none do.
        sample_softmax: Accepted as in the original, must be <= 0.
        untie_r: Whether each layer has a content and a position bias of its own (attn_type 0; 1 has them anyway).
        gradient_checkpointing: Recompute the inside of each layer in the backward pass instead of keeping it.
        zero_memory: The memory before the first segment is mem_len states of zeros, which are attended to, as in
            Hugging Face's implementation; else it is empty, as in the original.

    Raises:
        ValueError: A size, a length, attn_type, cutoffs, div_val or tie_projs does not fit.
        NotImplementedError: sample_softmax > 0.
    """

    def __init__(
        self,
        n_token: int,
        n_layer: int,
        n_head: int,
        d_model: int,
        d_head: int,
        d_inner: int,
        dropout: float,
        dropatt: float,
        tie_weight: bool = True,
        d_embed: int | None = None,
        div_val: int = 1,
        tie_projs: Sequence[bool] = (False,),
        pre_lnorm: bool = False,
        tgt_len: int | None = None,
        ext_len: int | None = None,
        mem_len: int | None = None,
        cutoffs: Sequence[int] = (),
        adapt_inp: bool = False,
        same_length: bool = False,
        attn_type: int = 0,
        clamp_len: int = -1,
        sample_softmax: int = -1,
        *,
        untie_r: bool = False,
        gradient_checkpointing: bool = False,
        zero_memory: bool = False,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._arguments = arguments = plain_arguments(arguments)
        tie_projs, cutoffs, clamp_len = (arguments[name] for name in ("tie_projs", "cutoffs", "clamp_len"))
        d_embed = d_model if d_embed is None else d_embed
        sizes = {"n_token": n_token, "n_layer": n_layer, "n_head": n_head, "d_model": d_model}
        check_counts(1, sizes | {"d_head": d_head, "d_inner": d_inner, "d_embed": d_embed})
        if attn_type not in (0, 1, 2, 3):
            raise ValueError(f"attn_type: expected 0, 1, 2 or 3, got {attn_type}")
        if attn_type == 3 and n_head * d_head != d_model:
            raise ValueError(f"attn_type 3: expected n_head * d_head = d_model, got {n_head} * {d_head} and {d_model}")
        if untie_r and attn_type != 0:
            raise ValueError(f"untie_r: expected attn_type 0, whose layers share biases, got attn_type {attn_type}")
        if sample_softmax > 0:
            raise NotImplementedError(
                f"sample_softmax: expected <= 0 (full softmax, adaptive with cutoffs), got {sample_softmax}: "
                "sampled softmax is not implemented"
            )
        if len(tie_projs) > len(cutoffs) + 1:
            raise ValueError(f"tie_projs: expected at most {len(cutoffs) + 1}, one a cluster, got {list(tie_projs)}")
        self.n_token, self.n_layer, self.d_model, self.attn_type = n_token, n_layer, d_model, attn_type
        self.same_length, self.clamp_len = same_length, clamp_len
        self.gradient_checkpointing, self.zero_memory = gradient_checkpointing, zero_memory
        self.reset_length(tgt_len, ext_len, mem_len)
        self._trainings = 0  # how often training began, which a cache may not outlive

        self.word_emb = AdaptiveEmbedding(n_token, d_embed, d_model, cutoffs, div_val)
        self.drop = nn.Dropout(dropout)
        layer = (RelPartialLearnableDecoderLayer, RelLearnableDecoderLayer, DecoderLayer, DecoderLayer)[attn_type]
        self.layers = nn.ModuleList(
            layer(n_head, d_model, d_head, d_inner, dropout, dropatt, pre_lnorm=pre_lnorm) for _ in range(n_layer)
        )
        self.crit = ProjectedAdaptiveLogSoftmax(n_token, d_embed, d_model, cutoffs, div_val)
        if tie_weight:
            for output, embedding in zip(self.crit.out_layers, self.word_emb.emb_layers, strict=True):
                output.weight = embedding.weight
        for i, tie in enumerate(tie_projs):
            if tie and self.crit.out_projs:
                self.crit.out_projs[i] = self.word_emb.emb_projs[0 if div_val == 1 else i]

        bias, rows = (n_head, d_head), tgt_len + ext_len + mem_len
        if attn_type in (0, 2):
            self.pos_emb = PositionalEmbedding(d_model)
        else:
            self.r_emb = nn.Parameter(torch.empty(n_layer, rows, *bias))
        if attn_type in (0, 1):
            per_layer = untie_r or attn_type == 1
            self.r_w_bias = nn.Parameter(torch.empty(n_layer, *bias) if per_layer else torch.empty(bias))
        if attn_type == 0:
            self.r_r_bias = nn.Parameter(torch.empty_like(self.r_w_bias))
        if attn_type == 1:
            self.r_bias = nn.Parameter(torch.empty(n_layer, rows, n_head))
        init_parameters(self)

    def train(self, mode: bool = True) -> "MemTransformerLM":
        """As of any module; a `Cache` made before a return to training is not used after it."""
        self._trainings += mode
        return super().train(mode)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make such a model anew, with the lengths, switches and dropout that it has now.

        Learned positions (attn_type 1 and 3) keep the rows they were made with, whatever the lengths are now.
        """
        now = {name: getattr(self, name, value) for name, value in self._arguments.items()}
        return plain_arguments(now | {"dropout": self.drop.p, "dropatt": self.layers[0].dec_attn.dropatt.p})

    def reset_length(self, tgt_len: int, ext_len: int, mem_len: int) -> None:
        """Sets the lengths for the segments to come; learned positions keep the number of rows they were made with.

        Raises:
            ValueError: tgt_len < 1, ext_len < 0 or mem_len < 0, or not an int.
        """
        check_counts(1, {"tgt_len": tgt_len})
        check_counts(0, {"ext_len": ext_len, "mem_len": mem_len})
        self.tgt_len, self.ext_len, self.mem_len = tgt_len, ext_len, mem_len

    def init_mems(self, bsz: int | None = None) -> list[Tensor] | None:
        """The memory before the first segment: n_layer + 1 tensors, None if mem_len is 0.

        Args:
            bsz: Batch size B, needed with ``zero_memory``, where the tensors are zeros (mem_len, B, C); without it
                their length is 0.

        Raises:
            ValueError: No bsz with ``zero_memory``.
        """
        if not self.mem_len:
            return None
        if self.zero_memory and bsz is None:
            raise ValueError("bsz: expected the batch size, with zero_memory, got None")
        shape = (self.mem_len, bsz, self.d_model) if self.zero_memory else (0,)
        return [self.word_emb.emb_layers[0].weight.new_zeros(shape) for _ in range(self.n_layer + 1)]

    def forward(self, data: Tensor, target: Tensor, *mems: Tensor) -> list[Tensor]:
        """Losses of a segment, and the memory for the next.

        Args:
            data: Tokens (T, B), int64.
            target: For each of the last tokens of data, the token that follows it, (T', B) with 1 <= T' <= T, int64.
            mems: The memory that the call for the segment before returned: n_layer + 1 tensors (M, B, C), any M.
                None at all: an empty memory, see `init_mems`.

        Returns:
            [losses, *memory]: losses (T', B) in nats; memory, for the embedding and every layer's output, without
            gradient, none with mem_len 0 (or of length 0, where mems were given).

        Raises:
            TypeError: data or target is not int64.
            ValueError: A shape or the number of mems does not fit; a token is not in the vocabulary (seen on CPU
                only); same_length with mem_len 0, where no token would see any.
        """
        check_segment(self, data, target, mems)
        hidden, new_mems = self._forward(data, list(mems) or self.init_mems(data.shape[1]))
        losses = self.crit(hidden[-target.shape[0] :].flatten(0, 1), target.flatten())
        return [losses.view(target.shape), *(new_mems or [])]

    @torch.no_grad()
    def init_cache(self, batch_size: int, *mems: Tensor) -> Cache:
        """What `losses` and `log_probs` keep from segment to segment, before the first one.

        It holds keys, values and projected r of every layer in place of the hidden states that `forward` hands on,
        so that they are projected once. The numbers are those of `forward` to rounding, in eval mode.

        Args:
            batch_size: B.
            mems: Memory to start with, as `forward` returned it, M <= mem_len. None at all: that of `init_mems`.

        Raises:
            ValueError: attn_type is 2 or 3, ext_len isn't 0, the model is in training mode (what is kept has no
                dropout), or mems do not fit.
        """
        check_counts(0, {"batch_size": batch_size})
        check_mems(self, mems, batch_size, at_most=self.mem_len)
        return Cache(self, batch_size, mems or self.init_mems(batch_size) or ())

    @torch.no_grad()
    def losses(self, data: Tensor, target: Tensor, cache: Cache) -> Tensor:
        """Losses of a segment, without gradient; `forward` for evaluation.

        Args:
            data: Tokens (T, B), int64, any T.
            target: For each of the last tokens of data, the token that follows it, (T', B) with 1 <= T' <= T, int64.
            cache: From `init_cache`; the segment is added to it.

        Returns:
            Losses (T', B) in nats.

        Raises:
            TypeError: data or target is not int64.
            ValueError: As `forward`; or the model is in training mode; or the cache was made for another model, batch
                size, dtype or length, or before the weights changed.
        """
        check_segment(self, data, target)
        hidden = cache.extend(self, data)
        return self.crit(hidden[-target.shape[0] :].flatten(0, 1), target.flatten()).view(target.shape)

    @torch.no_grad()
    def log_probs(self, data: Tensor, cache: Cache) -> Tensor:
        """Log-probabilities of the token that follows the last of data, (B, n_token), without gradient.

        Arguments and errors as in `losses`.
        """
        check_segment(self, data)
        return self.crit.log_probs(cache.extend(self, data)[-1])

    def _forward(self, dec_inp: Tensor, mems: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor] | None]:
        """Hidden states (T, B, C) of the tokens (T, B), and the new memory."""
        T, M = dec_inp.shape[0], mems[0].shape[0] if mems else 0
        read = [*mems] if mems else [None] * (self.n_layer + 1)
        window = self.window
        h = self.word_emb(dec_inp)
        if self.attn_type == 2:
            read[0], h = _with_positions(self._sinusoids(M + T, h.device), read[0], h)
        h = self.drop(h)
        positions = self._positions(M + T, h.device)
        hids = []
        for i, layer in enumerate(self.layers):
            if self.attn_type == 3:
                rows = last_rows(self.r_emb[i], M + T).flatten(1)[:, None]
                read[i], h = _with_positions(rows, read[i], h)
            hids.append(h)
            call = partial(checkpoint, layer, use_reentrant=False) if self.gradient_checkpointing else layer
            h = call(h, *positions[i], mems=read[i], window=window)
        hids.append(h)
        return self.drop(h), self._update_mems(hids, read) if mems else None

    def _positions(self, S: int, device: torch.device) -> list[tuple[Tensor, ...]]:
        """What the attention of each layer takes beside hidden states, mask and memory."""
        if self.attn_type == 0:
            r = self.drop(self._sinusoids(S, device))
            u, v = (bias.expand(self.n_layer, *bias.shape[-2:]) for bias in (self.r_w_bias, self.r_r_bias))
            return [(r, *biases) for biases in zip(u, v, strict=True)]
        if self.attn_type == 1:
            rows = slice(-self.clamp_len, None) if self.clamp_len > 0 else slice(None)
            return list(zip(self.r_emb[:, rows], self.r_w_bias, self.r_bias[:, rows], strict=True))
        return [()] * self.n_layer

    def _sinusoids(self, S: int, device: torch.device) -> Tensor:
        """Rows (S, 1, C) for the distances S - 1 ... 0, clamped."""
        distances = torch.arange(S - 1, -1, -1, device=device)
        return self.pos_emb(distances.clamp(max=self.clamp_len) if self.clamp_len > 0 else distances)

    @property
    def window(self) -> tuple[int, int] | None:
        """What ``same_length`` leaves to a token, as in `rel_attention`; None: all of its past."""
        if not self.same_length:
            return None
        if not self.mem_len:
            raise ValueError("mem_len: expected >= 1 with same_length, where a token sees mem_len tokens, got 0")
        return self.mem_len - 1, -1

    def _update_mems(self, hids: list[Tensor], mems: list[Tensor]) -> list[Tensor]:
        """The memory for the next segment (section 3.2), without gradient: cat(memory, states)[beg:end] per layer.

        end = T + max(0, M - ext_len) is what the original computes: it hands over the two lengths in the wrong order.
        Its comment means M + max(0, T - ext_len), the same for ext_len = 0.

        Args:
            hids: Hidden states of the segment, (T, B, C) each.
            mems: Memory read by the segment, (M, B, C) each or of length 0.
        """
        T, M = hids[0].shape[0], mems[0].shape[0]
        end = T + max(0, M - self.ext_len)
        beg = max(0, end - self.mem_len)
        # only what is kept is copied, so that the new memory does not hold on to the old
        kept = slice(max(0, beg - M), max(0, end - M))
        return [torch.cat([m.detach()[beg:end], h.detach()[kept]]) for m, h in zip(mems, hids, strict=True)]


def _with_positions(rows: Tensor, memory: Tensor | None, states: Tensor) -> tuple[Tensor | None, Tensor]:
    """Adds the rows (S, 1, C) to memory, if there is any, and hidden states."""
    M = rows.shape[0] - states.shape[0]
    return memory + rows[:M] if M else memory, states + rows[M:]
