"""A count of compilations: ``jitted`` is ``jax.jit`` that also counts how often its function was traced.

A function is traced once for every new combination of shapes and static settings, which is once per program.
Tests hold the count to the promised buckets.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax

_COUNTS: collections.Counter[str] = collections.Counter()


def jitted(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``jax.jit(function, **options)``, counted under the function's name; usable as a decorator."""
    if function is None:
        return functools.partial(jitted, **options)

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _COUNTS[function.__name__] += 1
        return function(*args, **kwargs)

    return jax.jit(counted, **options)


def compilations() -> dict[str, int]:
    """Programs compiled so far in this process, by the name of the function."""
    return dict(_COUNTS)
