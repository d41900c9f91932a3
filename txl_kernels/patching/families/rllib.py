"""`RelativeMultiHeadAttention` of RLlib, the attention of its GTrXLNet, batch first."""

from torch import Tensor, cat, nn

from txl_kernels.functional import rel_attention
from txl_kernels.patching.replacement import Replacement


def attention(self: nn.Module, original, inputs: Tensor, memory: Tensor | None = None) -> Tensor:
    """Of `RelativeMultiHeadAttention`: inputs (B, T, C), memory (B, M, C), which gets no gradient and is all seen."""
    if memory is None:
        return original(inputs)  # its own error
    T = inputs.shape[1]
    states = cat((memory.detach(), inputs), dim=1)
    if self._input_layernorm is not None:
        states = self._input_layernorm(states)
    q, k, v = (_heads(self, x) for x in self._qkv_layer(states).chunk(3, dim=-1))
    r = _heads(self, self._pos_proj(self._rel_pos_embedding(states.shape[1])).transpose(0, 1))[0]
    out = rel_attention(q[:, :, -T:], k, v, r, self._uvar, self._vvar)
    return self._linear_layer(out.transpose(1, 2).flatten(2))


def _heads(self: nn.Module, x: Tensor) -> Tensor:
    """(B, n, H * D) as (B, H, n, D)."""
    return x.unflatten(-1, (self._num_heads, self._head_dim)).transpose(1, 2)


REPLACEMENTS = {
    "RelativeMultiHeadAttention": Replacement("forward", attention, ("inputs", "memory"), head_size="_head_dim")
}
