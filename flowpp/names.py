"""Names that users write: which known name an unknown one was meant for."""

from collections.abc import Collection
from difflib import get_close_matches

_LONGEST = 100
"""Characters of a name that are compared. No known name is longer, and long names take long to compare."""

_MOST = 30
"""Known names that a message lists."""


def meant(name: str, known: Collection[str]) -> str:
    """Returns the end of a sentence about an unknown `name`: "did you mean X?", or the names that there are.

    Returns an empty string if no name is known.
    """
    if near := get_close_matches(name[:_LONGEST], known, n=1):
        return f"did you mean {near[0]}?"
    if not known:
        return ""
    more = f" and {len(known) - _MOST} more" if len(known) > _MOST else ""
    return f"there are {', '.join(list(known)[:_MOST])}{more}"
