"""RLlib's GTrXLNet as installed, without importing Ray; mocks stand for what it uses the types of only.

Everything that the network runs is RLlib's own code. Not run are the ``__init__`` of packages that gather all of RLlib.
"""

import contextlib

from tests.patching.loading import stand_ins, without_init

without_init(
    *("ray", "ray.util", "ray._common", "ray._private"),
    *("ray.rllib", "ray.rllib.utils", "ray.rllib.policy", "ray.rllib.core", "ray.rllib.models"),
    "ray.rllib.models.torch",
)

import ray  # noqa: E402
import ray.rllib.utils  # noqa: E402
from ray.util.debug import log_once  # noqa: E402

# defined in those __init__
ray.util.log_once = log_once
ray.rllib.utils.NullContextManager = contextlib.nullcontext

with stand_ins("gymnasium", "gymnasium.spaces", "tree"):
    from ray.rllib.models.torch.attention_net import GTrXLNet
    from ray.rllib.models.torch.modules import GRUGate, RelativeMultiHeadAttention, SkipConnection

__all__ = ["GRUGate", "GTrXLNet", "RelativeMultiHeadAttention", "SkipConnection"]
