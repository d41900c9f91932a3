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
    "transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer": Family(
        "wav2vec2_conformer",
        ("Wav2Vec2ConformerSelfAttention", "Wav2Vec2ConformerEncoder"),
        "transformers",
        ("5.20", "6"),
    ),
    "transformers.models.wav2vec2_bert.modeling_wav2vec2_bert": Family(
        "wav2vec2_conformer", ("Wav2Vec2BertSelfAttention", "Wav2Vec2BertEncoder"), "transformers", ("5.20", "6")
    ),
    "transformers.models.seamless_m4t.modeling_seamless_m4t": Family(
        "wav2vec2_conformer",
        ("SeamlessM4TConformerSelfAttention", "SeamlessM4TConformerEncoder"),
        "transformers",
        ("5.20", "6"),
    ),
    "transformers.models.fastspeech2_conformer.modeling_fastspeech2_conformer": Family(
        "fastspeech2", ("FastSpeech2ConformerAttention", "FastSpeech2ConformerEncoder"), "transformers", ("5.0", "6")
    ),
    "transformers.models.nemotron_asr_streaming.modeling_nemotron_asr_streaming": Family(
        "nemotron",
        ("NemotronAsrStreamingEncoderAttention", "NemotronAsrStreamingEncoder"),
        "transformers",
        ("5.15", "6"),
    ),
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
