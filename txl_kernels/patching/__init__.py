"""One line for the models that people already have: `patch`, its report, and how to add a class of one's own."""

from txl_kernels.patching.patch import PatchError, patch, unpatch
from txl_kernels.patching.replacement import Replacement, warn_own
from txl_kernels.patching.report import Entry, Report
from txl_kernels.patching.table import register

__all__ = ["Entry", "PatchError", "Replacement", "Report", "patch", "register", "unpatch", "warn_own"]
