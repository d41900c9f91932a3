"""Plans: what a pass works out once for all calls that are laid out alike.

Sizes, strides and options decide all that kernels are given but the tensors. Working it out anew, and looking through
every argument for the compiled variant as Triton does, would take the host longer than a GPU needs for a short call.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Plan(Protocol):
    """What `Plans` keeps."""

    n_steps: int  # launches that it has prepared


P = TypeVar("P", bound=Plan)


def layout_of(tensors: Iterable[Tensor | None]) -> tuple:
    """All that a plan may depend on of tensors, hashable: shapes, strides, dtypes, and who starts on 16 bytes."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for x in tensors])


class Plans:
    """The plans of the latest layouts, as many as have no more than `most_steps` together. With 0 none is found."""

    def __init__(self, most_steps: int) -> None:
        self.most_steps = most_steps
        self._plans: dict[tuple, Plan] = {}
        self._lock = threading.Lock()

    def find(self, make: Callable[..., P], key: tuple, *arguments: object) -> P:
        """make(*arguments), or what it made when it was last asked for this key."""
        plan = self._plans.get((make, key)) if self.most_steps else None
        if plan is None:
            plan = make(*arguments)
            with self._lock:
                self._plans[make, key] = plan
                while sum(x.n_steps for x in self._plans.values()) > self.most_steps:
                    del self._plans[next(iter(self._plans))]
        return plan


# A step takes about 2 kB; a backward over long sequences has three for each of its ranges.
PLANS = Plans(most_steps=4096)


class Step:
    """A launch of a kernel that lacks only its tensors.

    Args:
        kernel, grid: as in kernel[grid](...).
        arguments: of the kernel (or not) by name, with num_warps and num_stages. In the place of tensors and
            descriptors stand some that are laid out like them; they are not kept.
    """

    def __init__(self, kernel: triton.runtime.KernelInterface, grid: tuple[int, ...], arguments: dict) -> None:
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
        self._values, self._tensors, self._descriptors = [], [], []
        for place, name in enumerate(kernel.arg_names):
            value = arguments[name]
            if isinstance(value, Tensor):
                self._tensors.append((place, name))
                value = None
            elif isinstance(value, TensorDescriptor):
                self._descriptors.append((place, name, vars(value) | {"base": None}))
                value = None
            self._values.append(value)
        self._compiled = None

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        """Launches the kernel with these tensors, by the names of its arguments."""
        values = self._values.copy()
        for place, name in self._tensors:
            values[place] = tensors[name]
        for place, name, fields in self._descriptors:
            values[place] = descriptor = object.__new__(TensorDescriptor)  # whose checks are done
            vars(descriptor).update(fields, base=tensors[name])
        if self._compiled is None:
            # The variant that Triton chooses for these arguments; the interpreter returns nothing.
            self._compiled = self._kernel[self._grid](*values, **self._options)
        else:
            self._compiled[self._grid](*values)


class Buffer:
    """A tensor that each call allocates anew: `sample`, on the meta device, says how."""

    def __init__(self, sample: Tensor, zeros: bool = False) -> None:
        self.sample, self._zeros = sample, zeros
        self._layout = sample.shape, sample.stride()

    def allocate(self, device: torch.device) -> Tensor:
        x = torch.empty_strided(*self._layout, dtype=self.sample.dtype, device=device)
        return x.zero_() if self._zeros else x
