"""Small arithmetic of launches."""

from torch import Tensor


def padded(width: int) -> int:
    """The columns of a tile: a power of two, as Triton's matrix products want them."""
    return max(16, 1 << (width - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def strides(stride: str, dimensions: str, x: Tensor | None) -> dict[str, int]:
    """The strides of a tensor by dimension, under the names of the kernels' arguments; zeros for None."""
    values = (0,) * len(dimensions) if x is None else x.stride()
    return {f"stride_{stride}{dimension}": value for dimension, value in zip(dimensions, values, strict=False)}
