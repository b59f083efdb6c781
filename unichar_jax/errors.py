"""The one exception family for mistakes that a user can mend.

A ``UserError`` says what is wrong, where, what was expected, what was found, and the command or edit
that mends it. The command line prints its message without a stack trace and exits with code 1;
anything else that escapes is a bug and keeps its trace.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import Any


class UserError(Exception):
    """A mistake in input, configuration or environment, with its remedy in the message."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the closest option, or the empty string."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def listed(lines: Sequence[Any], most: int = 20) -> str:
    """What a message lists, each on a line of its own: the first ones, and how many more there are."""
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in [*lines[:most], *more])


def require_known(
    what: str, name: str, options: Collection[str], expected: str = "one of", more: str = ""
) -> None:
    """Raises a ``UserError`` unless ``name`` is among the options: what it is, the closest one, and all of them."""
    if name not in options:
        raise UserError(
            f"{what} '{name}' is unknown{did_you_mean(name, options)}; expected {expected} {', '.join(options)}{more}."
        )
