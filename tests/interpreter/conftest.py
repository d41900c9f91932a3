"""Fixtures of the interpreter tests: small tiles, poisoned allocations and checked accesses."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from txl_kernels.triton_backend import call, ranges
from txl_kernels.triton_backend.launch_table import Launch
from txl_kernels.triton_backend.plans import PLANS


@pytest.fixture(autouse=True, scope="session")
def language_patched_once() -> Iterator[None]:
    """Triton's interpreter looks through all of triton.language anew for each call of each function of a kernel."""
    patch_language = interpreter._patch_lang
    scope = patch_language(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()
    yield
    interpreter._patch_lang = patch_language
    scope.restore()


@pytest.fixture(autouse=True)
def no_plan_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests change what plans are made from."""
    monkeypatch.setattr(PLANS, "most_steps", 0)


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def use_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes every kernel use tiles of this many queries by this many keys, loaded in either way."""

    def use(block_m: int, block_n: int) -> None:
        row = Launch(block_m, block_n, num_warps=4, num_stages=1, descriptors=request.param)
        monkeypatch.setattr(call, "launch_for", lambda *_: row)

    return use


@pytest.fixture
def use_ranges(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes the backward go through ranges of this many queries and, in 16 bits, pairs."""

    def use(queries: int, pairs: int) -> None:
        for name, value in {"ALIGNMENT": 16, "QUERIES": queries, "WORKSPACE": 2 * pairs}.items():
            monkeypatch.setattr(ranges, name, value)

    return use


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and the like return with NaN, so that an element left unwritten shows."""
    owners = {"empty": torch, "empty_like": torch, "empty_strided": torch, "new_empty": torch.Tensor}
    for name, owner in owners.items():
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):
            x = _original(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture(autouse=True)
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products add in the order of their inner index, as a GPU does for float32, for either operand order.

    numpy's own depends on the processor, and so would what the tests see of float32.
    """

    def dot(_builder, a, b, d, _input_precision, _max_num_imprecise_acc):
        a_data, b_data = (x.data.astype(d.data.dtype) for x in (a, b))
        products = a_data.T[:, :, None] * b_data[:, None, :]
        return interpreter.TensorHandle(products.sum(0) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def element_addresses(x: torch.Tensor) -> np.ndarray:
    """The address of every element of x, gaps between its rows left out."""
    offsets = np.zeros((), np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    return x.data_ptr() + offsets.ravel() * x.element_size()


@pytest.fixture(autouse=True)
def checked_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a kernel reads or writes an address that is no element of a tensor it was given."""
    allowed = np.zeros(0, np.int64)

    def bind(executor, args, kwargs, _original=interpreter.GridExecutor._init_args_hst):
        nonlocal allowed
        args, kwargs = _original(executor, args, kwargs)
        arguments = [x.base if isinstance(x, TensorDescriptor) else x for x in (*args, *kwargs.values())]
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        allowed = np.unique(np.concatenate([element_addresses(x) for x in tensors]))
        return args, kwargs

    def check(pointers, mask):
        used = pointers.view(np.int64)[mask]
        place = np.searchsorted(allowed, used).clip(max=len(allowed) - 1)
        assert np.array_equal(allowed[place], used), "an access outside the tensors of the kernel"

    def load(pointers, mask, other, dtype, _original=interpreter._interpreter.load):
        check(pointers, mask)
        return _original(pointers, mask, other, dtype)

    def store(pointers, values, mask, _original=interpreter._interpreter.store):
        check(pointers, mask)
        return _original(pointers, values, mask)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", bind)
    monkeypatch.setattr(interpreter, "_interpreter", SimpleNamespace(load=load, store=store))
