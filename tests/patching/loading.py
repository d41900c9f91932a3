"""Loads the real code of packages that can't be imported as a whole here, without what that code does not use."""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from unittest import mock

import pytest


def skip_without(package: str) -> None:
    """As ``pytest.importorskip``, for what can't be imported as a whole."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (tests/patching/requirements.txt)", allow_module_level=True)


@contextlib.contextmanager
def stand_ins(*names: str, **attributes: object) -> Iterator[None]:
    """While code is imported that names them at its top, modules that can't be imported are mocks.

    Args:
        names: Dotted names, each with all its parents.
        attributes: Of each of the mocks.
    """
    added = []
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, OSError):  # OSError: a library built for another PyTorch
            sys.modules[name] = mock.MagicMock(name=name, **attributes)
            added.append(name)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def without_init(*packages: str) -> None:
    """Makes packages importable without running their ``__init__.py``, which would import much that is missing.

    Args:
        packages: Dotted names, parents first.
    """
    for name in packages:
        if name in sys.modules:
            continue
        parent, _, child = name.rpartition(".")
        package = types.ModuleType(name)
        package.__spec__ = importlib.util.find_spec(name)
        package.__path__ = package.__spec__.submodule_search_locations
        sys.modules[name] = package
        if parent:
            setattr(sys.modules[parent], child, package)
