"""SpeechBrain as installed; torchaudio and scipy, which it imports for other things, may be missing."""

import sys

from tests.patching.loading import stand_ins

with stand_ins("torchaudio", "torchaudio.transforms", "scipy", "scipy.stats"):
    from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder
    from speechbrain.lobes.models.transformer.TransformerASR import EncoderWrapper, TransformerASR
    from speechbrain.nnet.attention import RelPosEncXL, RelPosMHAXL
    from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
    from speechbrain.utils.importutils import LazyModule

# Hypothesis asks every module for its file; a lazy one would import what is missing.
for _module in list(sys.modules.values()):
    if isinstance(_module, LazyModule):
        _module.__file__ = None

__all__ = ["ConformerEncoder", "DynChunkTrainConfig", "EncoderWrapper", "RelPosEncXL", "RelPosMHAXL", "TransformerASR"]
