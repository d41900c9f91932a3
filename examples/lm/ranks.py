"""The processes of one training run: each has its own columns of the batch, and the memory that belongs to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among all of them; a single one without ``torchrun``."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def columns(self, batch: int) -> slice:
        """This rank's part of the columns of a batch, in order, as even as can be."""
        return slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Sums over ranks; needs all of them, as everything below."""
        if self.size > 1:
            dist.all_reduce(values := values.clone())
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor(float(flag))) > 0) if self.size > 1 else flag

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """The tensor of every rank, all of one shape, on the CPU of the first rank; None on the others."""
        tensor = tensor.detach().cpu().contiguous()
        if self.size == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.size)] if self.first else None
        dist.gather(tensor, tensors)
        return tensors

    def wait(self) -> None:
        """Returns when all ranks are here."""
        self.any(False)


# The last to let go of a process group must be its Python object, which releases the GIL while the group's threads end.
# DDP's C++ part doesn't, so where it is the last one, torch 2.13 sometimes hangs.
_groups: list[dist.ProcessGroup] = []


@contextmanager
def started(device: str | None) -> Iterator[Ranks]:
    """Joins the processes that ``torchrun`` started, if it did.

    Args:
        device: "cpu" or "cuda", each rank has one of its own; None: GPUs where there are any.

    Raises:
        ValueError: There is no such device.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, as there is no GPU here, got cuda")
    if "LOCAL_RANK" not in os.environ:
        yield Ranks(kind)
        return
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(kind)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo")
    _groups.append(dist.group.WORLD)
    try:
        yield Ranks(kind, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
