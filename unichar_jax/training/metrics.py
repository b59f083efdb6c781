"""Where the numbers of a run go: ``metrics.jsonl`` in the run's directory, and one line on the terminal.

One JSON object a step, so any tool can plot it; resuming at step n first drops what an interrupted run wrote
beyond n.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np


class MetricsLog:
    """Appends metrics by step.

    Args:
      path: the JSONL file.
      steps: of the whole run, for the progress line.
      names: of vector metrics' entries, e.g. ``{"task_ce": ["dialogue", ...]}``.
      quiet: nothing on the terminal.
    """

    def __init__(
        self, path: Path, steps: int, names: dict[str, list[str]] | None = None, quiet: bool = False
    ):
        self.path, self.steps, self.names, self.quiet = path, steps, names or {}, quiet
        self._file: TextIO | None = None
        self._clock: tuple[float, int] | None = None
        self._tokens = 0.0

    def rewind(self, step: int) -> None:
        """Drops every record after ``step``."""
        if self.path.exists():
            kept = [r for r in read(self.path) if r["step"] <= step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
            os.replace(temporary, self.path)

    def add(self, step: int, values: dict[str, np.ndarray], *, show: bool) -> None:
        record: dict[str, Any] = {"step": step}
        for key, value in values.items():
            if value.ndim == 0:
                record[key] = float(value)
            else:
                names = self.names.get(key, [str(i) for i in range(len(value))])
                record |= {f"{key}/{n}": float(v) for n, v in zip(names, value, strict=True) if v}
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a")
        self._file.write(json.dumps(record) + "\n")
        self._tokens += record.get("tokens", 0.0)
        if show:
            self._file.flush()
            self._show(step, record)

    def _show(self, step: int, record: dict[str, Any]) -> None:
        now = time.monotonic()
        speed = ""
        if self._clock is not None:
            seconds = (now - self._clock[0]) / max(step - self._clock[1], 1)
            left = seconds * (self.steps - step)
            speed = f" | {seconds:.2f} s/step, {left / 60:.1f} min left"
            if self._tokens:
                speed += f", {self._tokens / (now - self._clock[0]):,.0f} tokens/s"
        self._clock, self._tokens = (now, step), 0.0
        if self.quiet:
            return
        shown = [f"{k} {record[k]:.4g}" for k in ("loss", "ce", "mse", "reward", "grad_norm") if k in record]
        print(f"step {step}/{self.steps} | {' '.join(shown)}{speed}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file; a last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
