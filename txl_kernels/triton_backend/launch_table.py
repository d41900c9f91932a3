"""Tile sizes, warps and pipeline stages of every kernel, by pass, GPU generation, head size and element size.

Looked up at call time: no autotuning, so that lengths never trigger a recompile or a retune.
"""

from typing import NamedTuple


class Launch(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys (or rows of r) a tile; both powers of two, at least 16."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def launch_for(kernel: str, arch: str, block_d: int, itemsize: int) -> Launch:
    return Launch(64, 32 if kernel in ("forward","dq") else 64, 4, 2) if block_d<=64 and itemsize==2 else Launch(32,32,4,1)
