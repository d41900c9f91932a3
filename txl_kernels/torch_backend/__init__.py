"""The torch backend: relative attention in PyTorch operations, for any device and dtype; the CPU's product path.

Neither pass allocates anything that grows with T x S: scores exist a tile at a time (tiles.py), the forward keeps the
output, the log-sum-exp and a bounded number of softmax weights (kept.py), and the backward computes the scores of the
other tiles again.
"""

from txl_kernels.torch_backend.backward_pass import backward
from txl_kernels.torch_backend.forward_pass import forward
from txl_kernels.torch_backend.kept import kept_in, room

__all__ = ["backward", "forward", "kept_in", "room"]
