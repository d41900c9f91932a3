"""The shapes that are measured, by name: those of the original training and evaluation scripts."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Shape:
    """Attention, causal by default, of T queries over S = M + T keys, for B sequences and H heads of size D."""

    B: int
    H: int
    T: int
    M: int
    D: int
    is_causal: bool = True

    @property
    def visible_pairs(self) -> int:
        """Query-key pairs of one head and sequence; at distance >= 0 if causal."""
        if not self.is_causal:
            return self.T * (self.M + self.T)
        return self.T * self.M + self.T * (self.T + 1) // 2

    def flop(self, backward: bool) -> int:
        """Useful floating-point operations: AC, BD, PV, and the backward's eight products."""
        return (22 if backward else 6) * self.B * self.H * self.D * self.visible_pairs


# Full size, for a GPU. Training batches are the original scripts' (Dai et al. 2019), evaluation batches those
# of NVIDIA's published figures; 128 + 3800 has half of that.
SHAPES = {
    "wt103_base": Shape(B=60, H=10, T=150, M=150, D=41),
    "wt103_large": Shape(B=128, H=16, T=384, M=384, D=64),
    "enwik8_base": Shape(B=22, H=8, T=512, M=512, D=64),
    "enwik8_large": Shape(B=64, H=8, T=768, M=768, D=128),
    "square_512": Shape(B=16, H=8, T=512, M=512, D=64),
    "square_1024": Shape(B=8, H=8, T=1024, M=1024, D=64),
    "long_4096": Shape(B=4, H=8, T=4096, M=4096, D=64),
    "eval_64_640": Shape(B=32, H=10, T=64, M=640, D=41),
    "eval_128_1600": Shape(B=32, H=16, T=128, M=1600, D=64),
    "eval_128_3800": Shape(B=16, H=8, T=128, M=3800, D=128),
    "one_token_1600": Shape(B=32, H=16, T=1, M=1599, D=64),
}
TRAINED = [name for name in SHAPES if not name.startswith(("eval", "one_token"))]

# For the comparison with peers: by length, then the short ones, and one token against a long memory.
LENGTHS, HEAD_SIZES = (128, 256, 512, 1024, 2048, 4096), (64, 128)
PEER_SHAPES = {f"length_{n}x{D}": Shape(B=8, H=8, T=n, M=n, D=D) for D in HEAD_SIZES for n in LENGTHS} | {
    "wt103_base": SHAPES["wt103_base"],
    "conformer": Shape(B=32, H=8, T=200, M=0, D=128, is_causal=False),
    "one_token_1600": SHAPES["one_token_1600"],
    "one_token_3800": Shape(B=16, H=8, T=1, M=3799, D=128),
}
GPU_ONLY = [f"length_{n}x{D}" for D in HEAD_SIZES for n in LENGTHS if n > 1024 or D > 64]

# What keeps a run on two cores within minutes; T, M and D stay. At full size a tensor of scores takes 16 MiB to
# 4 GiB. malloc hands small ones (up to 32 MiB with glibc) out again and again, but returns large ones to the system,
# which clears every page anew, and the reference feels it. So training and evaluation batches stay large enough for
# 50 MiB of scores or more; square_512 alone shows the other side, a batch of one.
CPU_CHANGES = {
    "wt103_base": {},
    "wt103_large": {"B": 4},
    "enwik8_base": {"B": 4},
    "enwik8_large": {"B": 2},
    "square_512": {"B": 1},
    "square_1024": {"B": 2},
    "long_4096": {"B": 1, "H": 2},
    "eval_64_640": {},
    "eval_128_1600": {"B": 5},
    "eval_128_3800": {"B": 4},
    "one_token_1600": {"B": 1},
    **{f"length_{n}x64": {"B": 1} for n in LENGTHS},
    "conformer": {"B": 4},
    "one_token_3800": {"B": 1},
}


def shape_for(name: str, device: torch.device, smoke: bool) -> Shape:
    """The named shape at the size for this device; tiny, to see that the benchmark runs, in smoke mode."""
    shape = (SHAPES | PEER_SHAPES)[name]
    if smoke:
        return replace(shape, B=1, H=2, T=min(shape.T, 33), M=min(shape.M, 40))
    return shape if device.type == "cuda" else replace(shape, **CPU_CHANGES[name])
