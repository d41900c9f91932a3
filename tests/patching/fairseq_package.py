"""fairseq as installed.

Its configurations have other configurations as defaults, which dataclasses refuse since Python 3.11 unless they can be
hashed: while it is imported, they can. Mocks stand for what it imports for other things.
"""

import dataclasses
from unittest import mock

from tests.patching.loading import stand_ins

_dataclass = dataclasses.dataclass


def _hashable(cls=None, **options):
    if cls is None:
        return lambda cls: _hashable(cls, **options)
    if cls.__module__.startswith("fairseq."):
        options = {"unsafe_hash": True} | options
    return _dataclass(cls, **options)


with mock.patch.object(dataclasses, "dataclass", _hashable), stand_ins("bitarray", "sacrebleu", __version__="1.0"):
    from fairseq.models.speech_to_text.s2t_conformer import S2TConformerEncoder
    from fairseq.modules.espnet_multihead_attention import (
        ESPNETMultiHeadedAttention,
        RelPositionMultiHeadedAttention,
        RotaryPositionMultiHeadedAttention,
    )
    from fairseq.modules.positional_encoding import RelPositionalEncoding

__all__ = [
    "ESPNETMultiHeadedAttention",
    "RelPositionMultiHeadedAttention",
    "RelPositionalEncoding",
    "RotaryPositionMultiHeadedAttention",
    "S2TConformerEncoder",
]
