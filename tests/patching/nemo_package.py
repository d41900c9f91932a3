"""NeMo's Conformer encoder as installed, without the rest of NeMo, whose import needs dozens of packages.

Everything that the encoder runs is NeMo's own code. Not run are the ``__init__`` of packages that gather whole models,
and four modules, mocked, that the encoder's import names for the sake of other models: their base and configurations.
"""

import sys
from importlib.machinery import ModuleSpec
from unittest import mock

from tests.patching.loading import stand_ins, without_init

ASR = "nemo.collections.asr"
GATHER_MODELS = ["nemo.collections.common", ASR]
GATHER_MODELS += [f"{ASR}.{x}" for x in ("modules", "models", "parts", "parts.mixins", "parts.utils")]
OF_OTHER_MODELS = ["nemo.core.classes.modelPT"]
OF_OTHER_MODELS += [f"{ASR}.{x}" for x in ("modules.audio_preprocessing", "modules.conv_asr")]
OF_OTHER_MODELS += [f"{ASR}.parts.submodules.ctc_decoding"]

sys.modules.update((name, mock.MagicMock(name=name)) for name in OF_OTHER_MODELS)
with stand_ins("onnx", "pandas", __spec__=ModuleSpec("stand_in", None)):  # torch looks for their specs
    without_init(*GATHER_MODELS)
    from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder
    from nemo.collections.asr.parts.submodules import multi_head_attention
    from nemo.collections.asr.parts.submodules.adapters.multi_head_attention_adapter_module import (
        MHAResidualAddAdapterStrategy,
        RelPositionMultiHeadAttentionAdapter,
    )

__all__ = [
    "ConformerEncoder",
    "MHAResidualAddAdapterStrategy",
    "RelPositionMultiHeadAttentionAdapter",
    "multi_head_attention",
]
