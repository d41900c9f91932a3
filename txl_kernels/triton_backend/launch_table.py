"""Tile sizes, warps and pipeline stages of every kernel, by pass, GPU generation, head size and element size.

Looked up at call time, with no autotuning: lengths never trigger a recompile or a retune. The rows were chosen by
`python -m benchmarks.tune --static` (shared memory within the limit, products that overlap, then least spilling, then
fewest instructions a score); none is tuned by timing on a GPU yet, which the same command without --static does.
"""

import functools
from typing import NamedTuple

import torch
import triton


class Launch(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys (or rows of r) a tile, both powers of two from 16, with warps and stages.

    The main loop takes `unroll` tiles a pass: what one tile hands on to the next then needs no move. With `descriptors`
    the copy engine loads tiles (TMA, from sm_90 on), where strides allow.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    unroll: int = 1
    descriptors: bool = False


# "few" is the forward of at most FEW_QUERIES, as in generation: memory-bound, if no product is made for absent rows.
FEW_QUERIES = 16
# Where rows that do not start on 16 bytes are worth a copy that the copy engine can load from.
COPY_ENGINE = ("sm_90",)
# Generation -> pass -> {largest padded head size: launch}, for 16-bit elements.
_HALF = {
    "sm_80": {
        "forward": {64: Launch(64, 32, 4, 2), 128: Launch(32, 32, 4, 2), 256: Launch(32, 32, 8, 1)},
        "few": {64: Launch(16, 64, 4, 2), 128: Launch(16, 64, 4, 2), 256: Launch(16, 32, 4, 1)},
        "dq": {64: Launch(128, 64, 8, 2), 128: Launch(128, 64, 8, 2), 256: Launch(128, 64, 8, 2)},
        "dkv": {64: Launch(32, 32, 4, 2), 128: Launch(32, 32, 4, 2), 256: Launch(16, 32, 8, 1)},
        "dr": {64: Launch(64, 64, 4, 2), 128: Launch(64, 64, 8, 2), 256: Launch(64, 64, 8, 2)},
    },
    "sm_90": {
        "forward": {
            64: Launch(64, 32, 4, 2, 2),
            128: Launch(64, 32, 4, 2, 1, True),
            256: Launch(64, 32, 8, 2, 1, True),
        },
        "few": {64: Launch(16, 64, 4, 3), 128: Launch(16, 64, 4, 2), 256: Launch(16, 32, 4, 2)},
        "dq": {
            64: Launch(64, 64, 4, 3, 1, True),
            128: Launch(64, 64, 4, 3, 1, True),
            256: Launch(64, 64, 8, 2, 1, True),
        },
        "dkv": {
            64: Launch(32, 64, 4, 2, 1, True),
            128: Launch(32, 64, 4, 2, 1, True),
            256: Launch(64, 64, 8, 1, 1, True),
        },
        "dr": {
            64: Launch(64, 64, 4, 2, 1, True),
            128: Launch(64, 64, 4, 2, 1, True),
            256: Launch(64, 64, 8, 2, 1, True),
        },
    },
    "sm_100": {
        "forward": {
            64: Launch(64, 64, 8, 2, 1, True),
            128: Launch(64, 64, 8, 2, 1, True),
            256: Launch(64, 32, 8, 1),
        },
        "few": {64: Launch(16, 64, 4, 3), 128: Launch(16, 64, 4, 2), 256: Launch(16, 32, 4, 2)},
        "dq": {
            64: Launch(128, 64, 8, 2, 1, True),
            128: Launch(128, 64, 8, 2, 1, True),
            256: Launch(64, 64, 8, 2, 1, True),
        },
        "dkv": {
            64: Launch(64, 64, 8, 2, 1, True),
            128: Launch(64, 64, 8, 1, 1, True),
            256: Launch(64, 64, 8, 1, 1, True),
        },
        "dr": {
            64: Launch(64, 64, 8, 2, 1, True),
            128: Launch(64, 64, 8, 2, 1, True),
            256: Launch(64, 64, 8, 2, 1, True),
        },
    },
    "gfx942": {
        "forward": {64: Launch(128, 32, 4, 1), 128: Launch(64, 32, 4, 1), 256: Launch(32, 32, 4, 1)},
        "few": {64: Launch(16, 64, 4, 1), 128: Launch(16, 64, 4, 1), 256: Launch(16, 32, 4, 1)},
        "dq": {64: Launch(64, 64, 4, 1), 128: Launch(64, 64, 4, 1), 256: Launch(64, 64, 4, 1)},
        "dkv": {64: Launch(32, 64, 4, 1), 128: Launch(32, 64, 4, 1), 256: Launch(16, 32, 4, 1)},
        "dr": {64: Launch(64, 64, 4, 1), 128: Launch(64, 64, 4, 1), 256: Launch(64, 64, 4, 1)},
    },
}
# float32 elements: one row for every generation, sized for the smallest shared memory.
_FLOAT = {
    "forward": {64: Launch(32, 32, 8, 1), 128: Launch(32, 32, 8, 1), 256: Launch(16, 16, 4, 1)},
    "few": {64: Launch(16, 32, 4, 1), 128: Launch(16, 32, 4, 1), 256: Launch(16, 16, 4, 1)},
    "dq": {64: Launch(32, 32, 8, 1), 128: Launch(16, 16, 4, 1), 256: Launch(16, 16, 4, 1)},
    "dkv": {64: Launch(32, 32, 8, 1), 128: Launch(16, 16, 4, 1), 256: Launch(16, 16, 4, 1)},
    "dr": {64: Launch(32, 32, 8, 1), 128: Launch(16, 16, 4, 1), 256: Launch(16, 16, 4, 1)},
}


# Before 3.7 Triton fences tiles that come by pointers off from Hopper's asynchronous products in front of the loop that
# loads them, not in it (tests/emulator shows it). For Blackwell's some still have no fence in 3.7, as their PTX shows:
# cp.async.wait_group, bar.sync, tcgen05.mma. What the copy engine loads has barriers.
_FENCES_IN_LOOPS = {"sm_90": tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7), "sm_100": False}


def is_fenced(row: Launch, kernel: str, generation: str, itemsize: int) -> bool:
    """Whether products of a pass with this row see all of the tiles that they multiply."""
    asynchronous = generation in _FENCES_IN_LOOPS and itemsize == 2 and kernel != "few"
    return not asynchronous or _FENCES_IN_LOOPS[generation] or row.descriptors or row.num_stages == 1


def launch_for(kernel: str, generation: str, block_d: int, itemsize: int, describable: bool = True) -> Launch:
    """The row for a pass (forward, few, dq, dkv, dr, dmask), generation, padded head size and element size.

    describable: whether the copy engine can load the tiles.
    """
    if kernel == "dmask":  # the same products, less what they feed, of tiles by pointers
        kernel, describable = "dkv", False
    rows = _HALF[generation][kernel] if itemsize == 2 else _FLOAT[kernel]
    row = rows[max(64, block_d)]
    if is_fenced(row._replace(descriptors=row.descriptors and describable), kernel, generation, itemsize):
        return row
    return row._replace(descriptors=True) if describable else row._replace(num_stages=1)


@functools.cache
def generation_of(device: torch.device) -> str:
    """The newest generation of the table that is not newer than the GPU; sm_80 for the interpreter."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # sm_86, sm_89 and sm_120 have the shared memory of neither the A100 nor the B200: sm_80 rows stay within theirs.
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
