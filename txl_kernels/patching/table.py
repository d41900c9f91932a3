"""Which class is handled by which family file, and in which versions of its package.

A family file is imported only once a model has a module of one of its classes, whose package is imported by then.
"""

import importlib
import importlib.metadata
from typing import NamedTuple

from txl_kernels.patching.replacement import Replacement


class Family(NamedTuple):
    """Some classes of one module of a package.

    Attributes:
        file: Its file in `txl_kernels.patching.families`, whose REPLACEMENTS has a `Replacement` for each class.
        classes: Their names.
        package: Name of the distribution, or None for code that is copied about: then the signature decides.
        versions: The first version and the first that is too new, as in ("5.0", "6"); "" where there is none.
    """

    file: str
    classes: tuple[str, ...]
    package: str | None = None
    versions: tuple[str, str] = ("", "")


# module that defines the classes -> family; "*" is any module
FAMILIES: dict[str, Family] = {
    "transformers.models.parakeet.modeling_parakeet": Family(
        "parakeet", ("ParakeetEncoderAttention", "ParakeetEncoder"), "transformers", ("5.0", "6")
    ),
    "transformers.models.xlnet.modeling_xlnet": Family(
        "xlnet", ("XLNetRelativeAttention", "XLNetModel"), "transformers", ("5.0", "6")
    ),
    # in transformers 4.38 its models stopped running, in 5.0 they were removed
    "transformers.models.deprecated.transfo_xl.modeling_transfo_xl": Family(
        "transfo_xl", ("RelPartialLearnableMultiHeadAttn",), "transformers", ("4.36", "4.38")
    ),
    "transformers.models.gemma3n.modeling_gemma3n": Family(
        "gemma_audio", ("Gemma3nAudioAttention",), "transformers", ("5.0", "6")
    ),
    "transformers.models.gemma4.modeling_gemma4": Family(
        "gemma_audio", ("Gemma4AudioAttention", "Gemma4AudioModel"), "transformers", ("5.0", "6")
    ),
    "*": Family("transformer_xl", ("RelPartialLearnableMultiHeadAttn", "RelLearnableMultiHeadAttn")),
}

# classes of users -> replacement
_registered: dict[type, Replacement] = {}


def register(cls: type, replacement: Replacement) -> None:
    """Makes `patch` know a class of one's own.

    Args:
        cls: A subclass of `torch.nn.Module`.
        replacement: What takes the place of its method.

    Raises:
        TypeError: cls is not a class, or replacement is not a `Replacement`.
        ValueError: cls has no such method.
    """
    if not isinstance(cls, type):
        raise TypeError(f"cls: expected a class, got {cls!r}")
    if not isinstance(replacement, Replacement):
        raise TypeError(f"replacement: expected a Replacement, got {type(replacement).__name__}")
    if not callable(getattr(cls, replacement.method, None)):
        raise ValueError(f"replacement: expected a method of {cls.__name__}, got {replacement.method!r}")
    _registered[cls] = replacement


def known_classes() -> tuple[str, ...]:
    """Names of all classes in the table."""
    names = [name for family in FAMILIES.values() for name in family.classes]
    return tuple(dict.fromkeys(names + [cls.__name__ for cls in _registered]))


def find(cls: type) -> tuple[type, Replacement | str] | None:
    """The first known class among cls and its bases, with its replacement or the reason why it can't be replaced."""
    for base in cls.__mro__:
        if base in _registered:
            return base, _registered[base]
        if base.__module__.startswith("txl_kernels."):
            return None  # fused as it is, whatever its name
        for module in (base.__module__, "*"):
            family = FAMILIES.get(module)
            if family is not None and base.__qualname__ in family.classes:
                return base, _wrong_version(family) or _load(family).REPLACEMENTS[base.__qualname__]
    return None


def _load(family: Family):
    return importlib.import_module(f"txl_kernels.patching.families.{family.file}")


def _wrong_version(family: Family) -> str | None:
    if family.package is None:
        return None
    try:
        version = importlib.metadata.version(family.package)
    except importlib.metadata.PackageNotFoundError:
        return f"{family.package} is imported, but its version is not known"
    first, stop = family.versions
    if (first and _key(version) < _key(first)) or (stop and _key(version) >= _key(stop)):
        wanted = " and ".join(filter(None, (first and f"from {first}", stop and f"below {stop}")))
        return f"{family.package}: expected a version {wanted}, got {version}"
    return None


def _key(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (5, 23, 0) of "5.23.0.dev0"."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
