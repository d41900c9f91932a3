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


_ESPNET = ("espnet", ("202301", "202700"))
_NEMO = ("nemo_toolkit", ("1.23", "4"))
_HF = "transformers.models"
_HF_5 = ("transformers", ("5.0", "6"))
_HF_5_20 = ("transformers", ("5.20", "6"))

# module that defines the classes -> family; "*" is any module
FAMILIES: dict[str, Family] = {
    "*": Family("transformer_xl", ("RelPartialLearnableMultiHeadAttn", "RelLearnableMultiHeadAttn")),
    # in transformers 4.38 its models stopped running, in 5.0 they were removed
    f"{_HF}.deprecated.transfo_xl.modeling_transfo_xl": Family(
        "transfo_xl", ("RelPartialLearnableMultiHeadAttn",), "transformers", ("4.36", "4.38")
    ),
    f"{_HF}.xlnet.modeling_xlnet": Family("xlnet", ("XLNetRelativeAttention", "XLNetModel"), *_HF_5),
    f"{_HF}.parakeet.modeling_parakeet": Family("parakeet", ("ParakeetEncoderAttention", "ParakeetEncoder"), *_HF_5),
    f"{_HF}.nemotron_asr_streaming.modeling_nemotron_asr_streaming": Family(
        "nemotron",
        ("NemotronAsrStreamingEncoderAttention", "NemotronAsrStreamingEncoder"),
        "transformers",
        ("5.15", "6"),
    ),
    f"{_HF}.wav2vec2_conformer.modeling_wav2vec2_conformer": Family(
        "wav2vec2_conformer", ("Wav2Vec2ConformerSelfAttention", "Wav2Vec2ConformerEncoder"), *_HF_5_20
    ),
    f"{_HF}.wav2vec2_bert.modeling_wav2vec2_bert": Family(
        "wav2vec2_conformer", ("Wav2Vec2BertSelfAttention", "Wav2Vec2BertEncoder"), *_HF_5_20
    ),
    f"{_HF}.seamless_m4t.modeling_seamless_m4t": Family(
        "wav2vec2_conformer", ("SeamlessM4TConformerSelfAttention", "SeamlessM4TConformerEncoder"), *_HF_5_20
    ),
    f"{_HF}.fastspeech2_conformer.modeling_fastspeech2_conformer": Family(
        "fastspeech2", ("FastSpeech2ConformerAttention", "FastSpeech2ConformerEncoder"), *_HF_5
    ),
    f"{_HF}.gemma3n.modeling_gemma3n": Family("gemma_audio", ("Gemma3nAudioAttention",), *_HF_5),
    f"{_HF}.gemma4.modeling_gemma4": Family("gemma_audio", ("Gemma4AudioAttention", "Gemma4AudioModel"), *_HF_5),
    "nemo.collections.asr.parts.submodules.multi_head_attention": Family(
        "nemo", ("RelPositionMultiHeadAttention", "RelPositionMultiHeadAttentionLongformer"), *_NEMO
    ),
    "nemo.collections.asr.parts.submodules.adapters.multi_head_attention_adapter_module": Family(
        "nemo", ("RelPositionMultiHeadAttentionAdapter",), *_NEMO
    ),
    "nemo.collections.asr.modules.conformer_encoder": Family("nemo", ("ConformerEncoder",), *_NEMO),
    "espnet.nets.pytorch_backend.transformer.attention": Family(
        "espnet", ("RelPositionMultiHeadedAttention", "LegacyRelPositionMultiHeadedAttention"), *_ESPNET
    ),
    "espnet2.asr.encoder.conformer_encoder": Family("espnet", ("ConformerEncoder",), *_ESPNET),
    "espnet2.asr.encoder.multiconvformer_encoder": Family("espnet", ("MultiConvConformerEncoder",), *_ESPNET),
    "espnet2.asr.encoder.branchformer_encoder": Family("espnet", ("BranchformerEncoder",), *_ESPNET),
    "espnet2.asr.encoder.e_branchformer_encoder": Family("espnet", ("EBranchformerEncoder",), *_ESPNET),
    "espnet2.asr.encoder.e_branchformer_ctc_encoder": Family("espnet", ("EBranchformerCTCEncoder",), *_ESPNET),
    "espnet2.slu.postencoder.conformer_postencoder": Family("espnet", ("ConformerPostEncoder",), *_ESPNET),
    "espnet2.asr_transducer.encoder.modules.attention": Family(
        "espnet_transducer", ("RelPositionMultiHeadedAttention",), *_ESPNET
    ),
    "speechbrain.nnet.attention": Family("speechbrain", ("RelPosMHAXL",), "speechbrain", ("1.0", "2")),
    "fairseq.modules.espnet_multihead_attention": Family(
        "fairseq", ("RelPositionMultiHeadedAttention",), "fairseq", ("0.12", "0.13")
    ),
    "ding.torch_utils.network.gtrxl": Family("ding", ("AttentionXL",), "DI-engine", ("0.4", "0.6")),
    "ray.rllib.models.torch.modules.relative_multi_head_attention": Family(
        "rllib", ("RelativeMultiHeadAttention",), "ray", ("2.0", "3")
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
        if base.__module__.startswith("txl_kernels."):
            continue  # fused as it is, whatever its name
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
