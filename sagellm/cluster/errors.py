"""What goes wrong with a cluster file."""

import difflib
from collections.abc import Iterable


class ClusterFileError(ValueError):
    """A cluster file that cannot be used. The message is one sentence for its author."""


def suggestion(value: str, known: Iterable[str]) -> str:
    """What would be right in place of ``value``: the closest known name, or all of them."""
    names = sorted(known)
    by_folded_name = {name.casefold(): name for name in names}
    matches = difflib.get_close_matches(value.casefold(), by_folded_name, n=1, cutoff=0.6)
    if matches:
        return f"did you mean {by_folded_name[matches[0]]!r}?"
    return f"known are {', '.join(names)}"
