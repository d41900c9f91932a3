"""The parts of RLlib's GTrXLNet as installed, without importing Ray; mocks stand for what they use types of only."""

from tests.patching.loading import stand_ins, without_init

without_init(
    *("ray", "ray.util", "ray._common", "ray.rllib", "ray.rllib.utils", "ray.rllib.models", "ray.rllib.models.torch"),
    "ray.rllib.models.torch.modules",
)

import ray  # noqa: E402
from ray.util.debug import log_once  # noqa: E402

ray.util.log_once = log_once

with stand_ins("gymnasium", "gymnasium.spaces", "tree"):
    from ray.rllib.models.torch.misc import SlimFC
    from ray.rllib.models.torch.modules.gru_gate import GRUGate
    from ray.rllib.models.torch.modules.relative_multi_head_attention import RelativeMultiHeadAttention
    from ray.rllib.models.torch.modules.skip_connection import SkipConnection

__all__ = ["GRUGate", "RelativeMultiHeadAttention", "SkipConnection", "SlimFC"]
