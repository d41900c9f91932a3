"""GTrXL of DI-engine as installed, without importing all of that."""

from tests.patching.loading import without_init

without_init("ding.torch_utils", "ding.torch_utils.network")

from ding.torch_utils.network.gtrxl import AttentionXL, GTrXL  # noqa: E402

__all__ = ["AttentionXL", "GTrXL"]
