"""What a printed command begins with, so that it runs from where the user stands."""

from __future__ import annotations

import os
import shlex

VARIABLE = "UNICHAR_COMMAND"
"""Set by a launcher that made an environment of its own, which is not on the user's PATH."""


def called(*words: object) -> str:
    """``unichar WORDS`` as the user can type it."""
    program = os.environ.get(VARIABLE, "unichar")
    return shlex.join([program, *map(str, words)])
