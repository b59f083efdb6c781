"""Where the numbers of a run go: files in its directory, the terminal, and writers such as TensorBoard.

``metrics.jsonl`` has one JSON object a step and nothing that depends on the machine, so that the curve of a
resumed run can be compared bit by bit; resuming at step n first drops what an interrupted run wrote beyond n.
``speed.jsonl`` has what does depend on it, one object for each log line: seconds, tokens/s, the share of the
devices' peak that useful work takes, memory. Only process 0 writes.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unichar_jax.files import write_text
from unichar_jax.parallel.chips import peak_flops
from unichar_jax.training.writers import Writer

SPEED = "speed.jsonl"
USEFUL = "useful_flops"
"""Metric of a step: the floating-point operations that its batch asks for, over all devices."""


class MetricsLog:
    """Appends metrics by step.

    Args:
      path: the JSONL file.
      steps: of the whole run, for the progress bar.
      names: of vector metrics' entries, e.g. ``{"task_ce": ["dialogue", ...]}``.
      quiet: nothing on the terminal.
      writers: also told everything.
      publish: called whenever the files are to be safe, such as to copy them to a bucket.
    """

    def __init__(
        self,
        path: Path,
        steps: int,
        names: dict[str, list[str]] | None = None,
        quiet: bool = False,
        writers: Sequence[Writer] = (),
        publish: Callable[[], None] = lambda: None,
    ):
        self._active = jax.process_index() == 0
        self.path, self.steps, self.names = path, steps, names or {}
        self.quiet, self.writers = quiet or not self._active, writers if self._active else ()
        self._publish = publish
        self._file: TextIO | None = None
        self._clock: tuple[float, int] | None = None
        self._sums = {"tokens": 0.0, USEFUL: 0.0}
        self._bar: _Bar | None = None

    def rewind(self, step: int) -> None:
        """Drops every record after ``step``."""
        if self._active:
            for path in (self.path, self.path.with_name(SPEED)):
                if path.exists():
                    rewrite(path, [r for r in read(path) if r["step"] <= step])

    def add(self, step: int, values: Mapping[str, np.ndarray], *, show: bool) -> None:
        """Records a step; ``show``: also on the terminal, with the speed since the last one shown."""
        if not self._active:
            return
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
        self._tell(record)
        for key in self._sums:
            self._sums[key] += record.get(key, 0.0)
        if show:
            self._file.flush()
            self._show(step, record)
        if self._bar is not None:
            self._bar.at(step)

    def side(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Records what is measured now and then, such as a validation: into ``<name>.jsonl``, in the place of
        a line that an interrupted run wrote for the same step."""
        if self._active:
            path = self.path.with_name(f"{name}.jsonl")
            kept = [r for r in read(path) if r["step"] < step] if path.exists() else []
            rewrite(path, [*kept, {"step": step, **values}])
            self._tell({"step": step, **{f"{name}/{key}": value for key, value in values.items()}})
            self.say(f"{name}, step {step}: " + " ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        """Hands a picture, uint8 ``[H, W, 3]``, to the writers."""
        for writer in self.writers:
            writer.picture(step, name, picture)

    def restart_clock(self, step: int) -> None:
        """Measures the speed from here on: saving, drawing and validating are no part of it."""
        if self._clock is not None:
            self._clock, self._sums = (time.monotonic(), step), dict.fromkeys(self._sums, 0.0)

    def say(self, text: str) -> None:
        """A line on the terminal, above the progress bar if there is one."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Everything recorded so far is in the file, whatever happens to this process or machine."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._active:
            self._publish()

    def close(self) -> None:
        """Ends the files, the bar and the writers; the next record opens the file again."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for writer in self.writers:
            writer.close()
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _show(self, step: int, record: Mapping[str, Any]) -> None:
        speed = self._speed(step)
        if speed:
            with self.path.with_name(SPEED).open("a") as file:
                file.write(json.dumps({"step": step, **speed}) + "\n")
            self._tell({"step": step, **{f"speed/{key}": value for key, value in speed.items()}})
        if not self.quiet and self._bar is None and sys.stderr.isatty():
            self._bar = _Bar(self.steps)
        shown = [f"{k} {record[k]:.4g}" for k in ("loss", "ce", "mse", "reward", "grad_norm") if k in record]
        self.say(f"step {step}/{self.steps} | {' '.join(shown)}{self._in_words(speed, step)}")

    def _speed(self, step: int) -> dict[str, float]:
        """Of the steps since the last line; empty for the first, which waited for compilation."""
        now, before, sums = time.monotonic(), self._clock, self._sums
        self._clock, self._sums = (now, step), dict.fromkeys(sums, 0.0)
        if before is None or step <= before[1]:
            return {}
        passed = max(now - before[0], 1e-9)
        speed = {"seconds_per_step": passed / (step - before[1])}
        if sums["tokens"]:
            speed["tokens_per_s"] = sums["tokens"] / passed
        peak = peak_flops()
        if sums[USEFUL] and peak:
            speed["mfu"] = sums[USEFUL] / passed / peak
        return speed | memory()

    def _in_words(self, speed: Mapping[str, float], step: int) -> str:
        if not speed:
            return ""
        left = speed["seconds_per_step"] * (self.steps - step)
        words = f" | {speed['seconds_per_step']:.2f} s/step, {left / 60:.1f} min left"
        if "tokens_per_s" in speed:
            words += f", {speed['tokens_per_s']:,.0f} tokens/s"
        if "mfu" in speed:
            words += f", {100 * speed['mfu']:.1f} % useful MFU"
        where = "device" if "device_gib" in speed else "host"
        return words + f", {where} {speed[f'{where}_gib']:.1f} GiB"

    def _tell(self, record: Mapping[str, Any]) -> None:
        values = {key: value for key, value in record.items() if key != "step"}
        for writer in self.writers:
            writer.scalars(record["step"], values)


class _Bar:
    """A progress bar on the terminal; lines printed through ``console`` stay above it."""

    def __init__(self, steps: int):
        self.console = Console(stderr=True)
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console, transient=True)
        self._task = self._progress.add_task("training", total=steps)
        self._progress.start()

    def at(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def stop(self) -> None:
        self._progress.stop()


def memory() -> dict[str, float]:
    """Peaks so far in GiB: of the fullest local device, where the platform tells, and of this process."""
    in_use = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    known = [b for b in in_use if b]
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return ({"device_gib": max(known) / 2**30} if known else {}) | {"host_gib": host}


def rewrite(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Replaces a JSONL file, completely or not at all."""
    write_text(path, "".join(json.dumps(r) + "\n" for r in records))


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file; a last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
