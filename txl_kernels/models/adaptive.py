"""Adaptive input and output: the vocabulary, sorted by frequency, in clusters of decreasing width.

Input: Baevski and Auli 2019 (arXiv 1809.10853), section 3. Output: Grave et al. 2017 (arXiv 1609.04309), section 4.
The Transformer-XL uses both (Dai et al. 2019, section 4.1).

Cutoffs c1 < c2 < ... < n_token split the tokens into clusters: 0 ... c1 - 1 (the head), c1 ... c2 - 1, and so on.
Cluster i has width d_embed // div_val**i and, where its width isn't that of the hidden states, a projection.

Legend: N tokens, C width of the hidden states (d_proj).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def cluster_ends(n_token: int, cutoffs: Sequence[int]) -> list[int]:
    """[0, *cutoffs, n_token]; ValueError where that does not increase."""
    ends = [0, *cutoffs, n_token]
    if any(left >= right for left, right in pairwise(ends)):
        raise ValueError(f"cutoffs: expected 0 < c1 < c2 < ... < n_token = {n_token}, got {list(cutoffs)}")
    return ends


def cluster_widths(d_embed: int, div_val: int, clusters: int) -> list[int]:
    """Width of each cluster; ValueError where one has none."""
    widths = [d_embed // div_val**i for i in range(clusters)] if div_val >= 1 else [0]
    if not all(widths):
        raise ValueError(f"div_val: expected 1 <= div_val**{clusters - 1} <= d_embed = {d_embed}, got {div_val}")
    return widths


def init_parameters(module: nn.Module) -> None:
    """Draws the parameters of module as the original's training script does by default.

    Projections normal(0, 0.01), LayerNorm weights normal(1, 0.02), biases of linear maps, LayerNorms and distances 0,
    and all others, among them the paper's u and v, normal(0, 0.02).
    """
    for name, parameter in module.named_parameters():
        *owners, kind = name.split(".")
        if kind in ("bias", "r_bias", "cluster_bias"):
            nn.init.zeros_(parameter)
        elif "layer_norm" in owners:
            nn.init.normal_(parameter, 1.0, 0.02)
        else:
            nn.init.normal_(parameter, 0.0, 0.01 if {"emb_projs", "out_projs"} & {*owners} else 0.02)


class AdaptiveEmbedding(nn.Module):
    """Word embeddings, projected to the width of the hidden states and scaled by its square root.

    With ``div_val`` 1 all clusters have the same width, and share one table.

    Args:
        n_token: Size of the vocabulary.
        d_embed: Width of the first cluster.
        d_proj: Width C of the hidden states.
        cutoffs: First tokens of the clusters after the first, increasing.
        div_val: Each cluster is narrower than the one before by this factor.

    Raises:
        ValueError: cutoffs do not increase, or a cluster has no width.
    """

    def __init__(self, n_token: int, d_embed: int, d_proj: int, cutoffs: Sequence[int], div_val: int = 1) -> None:
        super().__init__()
        self.cutoff_ends = cluster_ends(n_token, cutoffs)
        self.emb_scale = d_proj**0.5
        self.d_proj = d_proj
        if div_val == 1:
            sizes = [(n_token, d_embed)]
        else:
            tokens = [right - left for left, right in pairwise(self.cutoff_ends)]
            sizes = list(zip(tokens, cluster_widths(d_embed, div_val, len(tokens)), strict=True))
        self.emb_layers = nn.ModuleList(nn.Embedding(*size) for size in sizes)
        self.emb_projs = nn.ParameterList()
        if div_val != 1 or d_proj != d_embed:
            self.emb_projs.extend(torch.empty(d_proj, width) for _, width in sizes)
        init_parameters(self)

    def forward(self, inp: Tensor) -> Tensor:
        """Tokens of any shape, int64, to embeddings (*shape, C); zeros for what is in no cluster of several."""
        if len(self.emb_layers) == 1:
            return self._embed(0, inp) * self.emb_scale
        tokens = inp.flatten()
        out = self.emb_layers[0].weight.new_zeros(tokens.shape[0], self.d_proj)
        for i, (left, right) in enumerate(pairwise(self.cutoff_ends)):
            chosen = ((tokens >= left) & (tokens < right)).nonzero()[:, 0]
            out = out.index_copy(0, chosen, self._embed(i, tokens[chosen] - left).to(out.dtype))
        return out.view(*inp.shape, self.d_proj) * self.emb_scale

    def _embed(self, cluster: int, tokens: Tensor) -> Tensor:
        embedded = self.emb_layers[cluster](tokens)
        return nn.functional.linear(embedded, self.emb_projs[cluster]) if self.emb_projs else embedded


class ProjectedAdaptiveLogSoftmax(nn.Module):
    """Negative log-likelihood of each target token, by cluster.

    The head decides between its own tokens and the clusters; a token of a cluster then costs the cluster and, within
    it, itself. Without cutoffs this is the ordinary softmax. The logarithm is taken in float32 at least, and losses
    are float32 where the hidden states have 16 bits.

    Deviation from the original: losses come in the order of the tokens. There they are grouped by cluster when there
    are cutoffs (unless ``keep_order``, which its language model doesn't ask for); sum and mean are the same.

    Args:
        n_token: Size of the vocabulary.
        d_embed: Width of the first cluster.
        d_proj: Width C of the hidden states.
        cutoffs: First tokens of the clusters after the first, increasing.
        div_val: Each cluster is narrower than the one before by this factor; 1: all share one table.

    Raises:
        ValueError: cutoffs do not increase, or a cluster has no width.
    """

    def __init__(self, n_token: int, d_embed: int, d_proj: int, cutoffs: Sequence[int], div_val: int = 1) -> None:
        super().__init__()
        self.cutoff_ends = cluster_ends(n_token, cutoffs)
        self.n_clusters = len(self.cutoff_ends) - 2
        self.div_val = div_val
        if self.n_clusters:
            self.cluster_weight = nn.Parameter(torch.empty(self.n_clusters, d_embed))
            self.cluster_bias = nn.Parameter(torch.empty(self.n_clusters))
        widths = cluster_widths(d_embed, div_val, self.n_clusters + 1)
        if div_val == 1:
            sizes = [(d_embed, n_token)]
        else:
            tokens = [right - left for left, right in pairwise(self.cutoff_ends)]
            sizes = list(zip(widths, tokens, strict=True))
        self.out_layers = nn.ModuleList(nn.Linear(*size) for size in sizes)
        self.out_projs = nn.ParameterList()
        if div_val != 1 or d_proj != d_embed:
            self.out_projs.extend(torch.empty(d_proj, width) for width in widths)
        init_parameters(self)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Losses in nats.

        Args:
            hidden: Hidden states, (N, C).
            target: Tokens to predict, (N,), int64.

        Returns:
            Losses (N,), in the order of target.

        Raises:
            ValueError: hidden and target differ in length.
        """
        if hidden.shape[:1] != target.shape:
            raise ValueError(f"target: expected ({hidden.shape[0]},) as hidden, got {tuple(target.shape)}")
        head = self._logits(0, hidden)
        if not self.n_clusters:
            return _losses(head, target)
        inner_ends = torch.tensor(self.cutoff_ends[1:-1], device=target.device)
        cluster = torch.bucketize(target, inner_ends, right=True)
        losses = _losses(head, target.where(cluster == 0, head.shape[1] - cluster))
        for i in range(1, self.n_clusters + 1):
            chosen = (cluster == i).nonzero()[:, 0]
            within = _losses(self._logits(i, hidden[chosen]), target[chosen] - self.cutoff_ends[i])
            losses = losses.index_add(0, chosen, within)
        return losses

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of every token, in nats.

        Args:
            hidden: Hidden states, (N, C).

        Returns:
            (N, n_token), float32 at least, minus what `forward` gives for each token as target.
        """
        head = self._logits(0, hidden).log_softmax(-1)
        n = self.n_clusters
        tails = [head[:, -i, None] + self._logits(i, hidden).log_softmax(-1) for i in range(1, n + 1)]
        return torch.cat([head[:, : head.shape[1] - n], *tails], dim=1)

    def _logits(self, cluster: int, hidden: Tensor) -> Tensor:
        """Logits (N, tokens) of a cluster's tokens; behind those of the head, of the clusters, the last one first."""
        weight, bias = self._table(cluster)
        if cluster == 0 and self.n_clusters:
            weight, bias = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        if self.out_projs:
            hidden = hidden @ self.out_projs[cluster]
        logits = nn.functional.linear(hidden, weight, bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _table(self, cluster: int) -> tuple[Tensor, Tensor]:
        """Weight (tokens, width) and bias (tokens,) of a cluster's own tokens."""
        if self.div_val != 1:
            return self.out_layers[cluster].weight, self.out_layers[cluster].bias
        tokens = slice(*self.cutoff_ends[cluster : cluster + 2])
        return self.out_layers[0].weight[tokens], self.out_layers[0].bias[tokens]


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, target, reduction="none")
