"""The one exception that means: the user can put this right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PerturbZooError(ValueError):
    """A user's mistake, said in one line: what is wrong, where, and what would be right.

    The command line prints the message alone and exits with status 2; from Python it is an ordinary ``ValueError``.
    """


def near_matches(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return ``"; did you mean 'x' or 'y'?"`` for the names most like `name`, or an empty string.

    Parameters
    ----------
    name
        What the user wrote.
    candidates
        What exists.
    count
        How many names to suggest at the most.
    """
    lowered = {str(candidate).lower(): str(candidate) for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.6)
    if not close:
        return ""
    return "; did you mean " + " or ".join(f"'{lowered[match]}'" for match in close) + "?"


def shortened(names: Iterable[str], count: int = 5) -> str:
    """Join the first `count` names with commas, and say how many more there are."""
    listed = [str(name) for name in names]
    text = ", ".join(listed[:count])
    return text if len(listed) <= count else f"{text} and {len(listed) - count} more"


class PerturbZooWarning(UserWarning):
    """Something the user may want to know, in one line; the work goes on."""
