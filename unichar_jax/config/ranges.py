"""What the fields of settings may be: a table of words and tests for each dataclass, and one message for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from unichar_jax.errors import UserError

Rule = tuple[str, Callable[[Any], bool]]
"""What is expected, in words, and whether a value is it."""

POSITIVE: Rule = "a positive number", lambda x: x > 0


def at_least(least: int, what: str = "") -> Rule:
    return f"at least {least}{what}", lambda x: x >= least


def check(config: Any, table: str, **rules: Rule) -> None:
    """Holds fields of ``config`` to their rules; ``table`` begins their names in messages, such as ``"save."``."""
    for name, (expected, holds) in rules.items():
        if not holds(value := getattr(config, name)):
            raise UserError(f"{table}{name}: expected {expected}, got {value}.")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_multiple(what: str, value: int, of: str, factor: int, why: str = "") -> None:
    """``value``, called ``what``, must be a multiple of ``factor``, called ``of``."""
    require(value % factor == 0, f"{what} {value} is not a multiple of {of}{why}; change one of the two.")
