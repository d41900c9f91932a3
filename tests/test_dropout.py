"""The dropout mask as a hash: its arithmetic, and that it looks random."""

import pytest
import torch

from txl_kernels import dropout


def keep(p, B=2, H=3, T=200, S=300, seed=1234567890123):
    where = (slice(0, n) for n in (B, H, T, S))
    return dropout.kept(torch.tensor(seed), *where, H, p)


def test_dropout_hash():
    """The 32-bit arithmetic, against Python's integers."""
    M = 2**32 - 1

    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D & M
        x = (x ^ x >> 15) * 0x846CA68B & M
        return x ^ x >> 16

    def kept(seed, lane, i, j, p):
        key = mix((seed & M) ^ mix((seed >> 32) ^ mix(lane)))
        x = mix(key + i * 0x9E3779B9 & M) + mix((key ^ 0x85EBCA6B) + j * 0xC2B2AE35 & M)
        x = x * 0x7FEB352D & M
        x = (x ^ x >> 15) * 0x846CA68B & M
        return x - (x >> 31 << 32) < round((1 - p) * 2**32) - 2**31

    for seed in (0, 2**62 - 1, 123456789012345678):
        got = dropout.kept(torch.tensor(seed), slice(1, 3), slice(2, 5), slice(3, 9), slice(70, 90), 5, 0.3)
        wanted = [
            kept(seed, b * 5 + h, i, j, 0.3)
            for b in (1, 2)
            for h in (2, 3, 4)
            for i in range(3, 9)
            for j in range(70, 90)
        ]
        assert got.flatten().tolist() == wanted


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share(p):
    """Overall and by query, key and lane, within 5 standard deviations."""
    kept = keep(p).double()
    for dims in ((0, 1, 2, 3), (0, 1, 3), (0, 1, 2), (2, 3)):
        share = kept.mean(dims)
        n = kept.numel() / share.numel()
        assert (share - (1 - p)).abs().max() < 5 * (p * (1 - p) / n) ** 0.5, dims


def test_dropout_of_neighbours_is_independent():
    """No correlation between adjacent queries, keys, diagonals, lanes or seeds, within 5 standard deviations."""
    x = keep(0.3).double().sub_(0.7).div_((0.3 * 0.7) ** 0.5)
    y = keep(0.3, seed=1234567890124).double().sub_(0.7).div_((0.3 * 0.7) ** 0.5)
    pairs = {
        "queries": (x[:, :, 1:], x[:, :, :-1]),
        "keys": (x[..., 1:], x[..., :-1]),
        "diagonal": (x[:, :, 1:, 1:], x[:, :, :-1, :-1]),
        "rectangle": (x[:, :, 1:, 1:] * x[:, :, :-1, :-1], x[:, :, 1:, :-1] * x[:, :, :-1, 1:]),
        "heads": (x[:, 1:], x[:, :-1]),
        "batches": (x[1:], x[:-1]),
        "seeds": (x, y),
    }
    for name, (a, b) in pairs.items():
        deviation = (a.square() * b.square()).mean().sqrt() / a.numel() ** 0.5
        assert (a * b).mean().abs() < 5 * deviation, name
