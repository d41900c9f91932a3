"""TransfoXL of Hugging Face: as the original, but with biases of its own in each layer.

Legend as in `txl_kernels.layer`.
"""

from torch import Tensor, nn

from txl_kernels.layer_steps import output, projected_positions, weighted_values
from txl_kernels.patching.dead_rows import mean_of_values
from txl_kernels.patching.families.transformer_xl import check, kv_len, projections, visibility_of
from txl_kernels.patching.replacement import Replacement, warn_own


def attention(
    self: nn.Module,
    original,
    w: Tensor,
    r: Tensor,
    attn_mask: Tensor | None = None,
    mems: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> list[Tensor]:
    """Of `RelPartialLearnableMultiHeadAttn`: a query that sees no key gets the mean of all values."""
    visible = None
    if output_attentions or head_mask is not None:
        warn_own(self, "attention weights" if output_attentions else "a head mask")
    else:
        visible = visibility_of(self, w, attn_mask, mems)
    if visible is None:
        return original(w, r, attn_mask, mems, head_mask, output_attentions)
    positions = projected_positions(self, r, self.r_w_bias, self.r_r_bias, kv_len(w, mems))
    q, k, v = projections(self, w, mems)
    out, lse = weighted_values(self, q, k, v, positions, visible)
    if visible.attn_mask is not None:
        out = mean_of_values(out, v, lse.isneginf())
    return [output(self, w, out)]


REPLACEMENTS = {
    "RelPartialLearnableMultiHeadAttn": Replacement(
        "forward",
        attention,
        ("w", "r", "attn_mask", "mems", "head_mask", "output_attentions"),
        check,
        own="attention weights, head masks",
        head_size="d_head",
    ),
}
