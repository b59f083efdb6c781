"""What all stages of the device check share: saying a line, keeping a failure to its part, timing a call."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

_lines = sys.stdout


def keep_stdout() -> None:
    """Standard output is for lines alone from here on; what anything else prints there goes to standard error."""
    global _lines
    _lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def _send(**event: Any) -> None:
    print(json.dumps(event), file=_lines, flush=True)


def say(what: str, value: float | None = None, unit: str | None = None, **more: Any) -> None:
    """One line: a value with its unit, or ``error=`` or ``skipped=``."""
    row = {"what": what, "value": value, "unit": unit, **more}
    _send(kind="line", **{k: v for k, v in row.items() if v is not None})


def say_device(card: str, jax: str) -> None:
    """Names the device for this line and all that follow."""
    _send(kind="device", card=card, jax=jax)


def end() -> None:
    """The stage is over."""
    _send(kind="end", over=True)


@contextlib.contextmanager
def part(what: str) -> Iterator[None]:
    """A failure inside is a line, and its trace goes to standard error."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        say(what, error=f"{type(error).__name__}: {str(error)[:400]}")


def peak_gib() -> float | None:
    """The most that this process held of the device's memory so far, where the device tells."""
    import jax

    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30


def clock(f: Callable[[], Any]) -> float:
    """Seconds of one call, until its result is there."""
    import jax

    began = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - began


def seconds(f: Callable[..., Any], *args: Any, least: float = 0.1, rounds: int = 5) -> float:
    """Of one call: the median over rounds of calls in a row, each of ``least`` seconds at the least.

    The first call, which compiles, and a second one are not counted.
    """
    import jax

    jax.block_until_ready(f(*args))
    once = clock(lambda: f(*args))
    count = max(1, min(100, int(least / max(once, 1e-6))))
    if once > 1:
        rounds = 2
    return statistics.median(
        clock(lambda: [f(*args) for _ in range(count)][-1]) / count for _ in range(rounds)
    )
