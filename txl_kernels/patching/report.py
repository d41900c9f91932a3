"""What `patch` found in a model and did with it."""

from collections import Counter
from typing import NamedTuple


class Entry(NamedTuple):
    """One module, or a class that was patched itself.

    Attributes:
        name: As in ``model.named_modules()``; "" for the model itself or for a class.
        class_name: Name of its class.
        action: "patched", "already patched" or "left alone".
        reason: Why it was left alone; of a patched one, the requests that its own method still serves, or "".
    """

    name: str
    class_name: str
    action: str
    reason: str


class Report(NamedTuple):
    """Every module that `patch` knows; `str` gives a line for each kind.

    Attributes:
        entries: In the order of ``model.named_modules()``.
        looked_for: Names of the classes that `patch` knows.
    """

    entries: tuple[Entry, ...]
    looked_for: tuple[str, ...]

    @property
    def patched(self) -> tuple[str, ...]:
        """Names of the modules that run on `rel_attention` now."""
        return tuple(entry.name for entry in self.entries if entry.action != "left alone")

    @property
    def left_alone(self) -> tuple[Entry, ...]:
        """The modules that do not, with the reasons."""
        return tuple(entry for entry in self.entries if entry.action == "left alone")

    def __str__(self) -> str:
        if not self.entries:
            return f"txl_kernels.patch: no known attention; looked for {', '.join(self.looked_for)}"
        lines = [f"txl_kernels.patch: {len(self.patched)} of {len(self.entries)} modules"]
        kinds = Counter((entry.class_name, entry.action, entry.reason) for entry in self.entries)
        for (class_name, action, reason), count in kinds.items():
            names = [
                entry.name
                for entry in self.entries
                if (entry.class_name, entry.action, entry.reason) == (class_name, action, reason)
            ]
            where = names[0] if count == 1 else f"{names[0]} ... {names[-1]}"
            why = f": {reason}" if action == "left alone" else f"; its own method serves {reason}" if reason else ""
            lines.append(f"  {count} x {class_name} ({where or 'itself'}): {action}{why}")
        return "\n".join(lines)
