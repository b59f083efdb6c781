"""What a device does with this project, measured in a quarter of an hour: one program, JSON lines as they come.

    python scripts/device_check.py --list
    python scripts/device_check.py --out device.jsonl --total 570 --commit 68e102f
    python scripts/device_check.py --small            # the same code at a toy's size, on any machine

Design. A table of stages, the most important first. This program is the parent: it never touches the device, starts
processes (itself, with ``--child``) that do, and writes every line that they print, with the card's name, the version
of jax, the commit and the seconds since the start, to standard output and ``--out``. A stage runs until its own limit
and is then killed with everything it started; what it said before is kept. Stages that need the same 29 GB of random
weights share a process: if one of them is killed, a new process goes on with the next. A failure is a line, never
the end. The first stage measures what the card gives at best; lines with ``tflops`` or ``gb_per_s`` get their share
of that.

A line has ``stage``, ``what``, ``value`` and ``unit``, or ``error``, or ``skipped``. Times are medians of repeated
calls after a warm-up (``device_stages/measure.py``); weights are random. All but ``commands`` import nothing beyond
jax, flax, optax, orbax, numpy and pillow.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Stage:
    """``run`` is ``module:function``, called as ``function(small)``; neighbours of one ``process`` share it, unless
    it is empty. ``seconds`` is the limit, start of the process and compilation included."""

    name: str
    run: str
    seconds: float
    gives: str
    process: str = ""


STAGES = (
    Stage(
        "ceilings",
        "device_stages.kernels:ceilings",
        25,
        "a matrix product, a copy, a matrix times few vectors",
    ),
    Stage(
        "attention",
        "device_stages.kernels:attention",
        85,
        "a packed row of 12,288 tokens, one of many documents, the tower's: every kernel, and cuDNN with and"
        " without the mask; forward and backward, checked before they are timed",
    ),
    Stage("lora", "device_stages.programs:lora", 120, "the training step with adapters, all layers"),
    Stage("decode", "device_stages.programs:decode", 90, "text, one and eight at a time", "weights"),
    Stage(
        "draw",
        "device_stages.programs:draw",
        160,
        "pictures of 1,024 and 512 pixels, one and eight",
        "weights",
    ),
    Stage(
        "nft",
        "device_stages.programs:nft",
        110,
        "rounds of stage 2 without rewards: draw and learn",
        "weights",
    ),
    Stage("full", "device_stages.programs:full", 110, "the training step of all weights, 2 and 4 layers"),
    Stage(
        "commands",
        "device_stages.commands:walk",
        150,
        "the mini model by the real commands: sft, killed, resumed; grpo, draw, convert --verify",
    ),
)


class Report:
    """Writes lines; knows the card, and what it gives at best once ``ceilings`` said so."""

    def __init__(self, out: TextIO | None, commit: str):
        self._files = [sys.stdout, *([out] if out else [])]
        self._began = time.monotonic()
        self._best: dict[str, float] = {}
        self._same: dict[str, Any] = {"card": None, "jax": None, "commit": commit}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def device(self, **known: Any) -> None:
        self._same |= known

    def line(self, stage: str, what: str, **row: Any) -> None:
        if "error" not in row and stage == "ceilings":
            self._best |= {k: max(row[k], self._best.get(k, 0)) for k in ("tflops", "gb_per_s") if k in row}
        else:
            shares = {k: row[k] / best for k, best in self._best.items() if k in row}
            row |= {f"share_of_best_{k}": share for k, share in shares.items()}
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        text = json.dumps({"stage": stage, "what": what, **row, **self._same, "at_s": round(self.seconds, 1)})
        for file in self._files:
            print(text, file=file, flush=True)


class Child:
    """A process that runs stages one after the other; ``events`` are its lines, None once it ended."""

    def __init__(self, stages: Sequence[Stage], small: bool):
        words = [sys.executable, __file__, "--child", *(f"{s.name}={s.run}" for s in stages)]
        # Of the card's memory jax takes three quarters unless it is told; the largest stages want more.
        defaults = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "PYTHONUNBUFFERED": "1"}
        path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [*words, *(["--small"] if small else [])],
            stdout=subprocess.PIPE,
            text=True,
            env=defaults | os.environ | {"PYTHONPATH": path},
            process_group=0,
        )
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            with contextlib.suppress(ValueError):  # half a line, of a process that was killed
                self.events.put(json.loads(text))
        self.events.put(None)

    def kill(self) -> int:
        """Ends it with whatever it started, and waits until the device is free; returns the exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


def run(stages: Sequence[Stage], report: Report, small: bool, total: float) -> None:
    """All stages in order, each until its limit, none beyond ``total`` seconds since the start."""
    waiting = list(stages)
    while waiting:
        if report.seconds >= total:
            for stage in waiting:
                report.line(stage.name, "stage", skipped=f"--total {total:.0f} s were over")
            return
        first = waiting[0]
        together = [s for s in waiting if s is first or (s.process and s.process == first.process)]
        done = _run_together(together, report, small, total)
        del waiting[:done]


def _run_together(stages: Sequence[Stage], report: Report, small: bool, total: float) -> int:
    """Runs stages in one process until the last, a limit or its end; returns how many are over and done with."""
    child = Child(stages, small)
    try:
        for done, stage in enumerate(stages):
            if done and report.seconds >= total:
                return done
            began = report.seconds
            until = min(began + stage.seconds, total)
            try:
                while (event := child.events.get(timeout=max(until - report.seconds, 0))) is not None:
                    if event.pop("kind") == "device":
                        report.device(**event)
                    elif "over" in event:
                        break
                    else:
                        report.line(stage.name, **event)
                else:
                    report.line(
                        stage.name, "stage", error=f"its process ended with {child.kill()}; see its output"
                    )
                    return done + 1
            except queue.Empty:
                report.line(stage.name, "stage", error=f"ended at its limit of {until - began:.0f} s")
                return done + 1
            report.line(stage.name, "stage", value=report.seconds - began, unit="s")
        return len(stages)
    finally:
        child.kill()


def child(stages: Sequence[str], small: bool) -> None:
    """Runs ``NAME=module:function`` one after the other. What others print goes to standard error."""
    from device_stages import measure

    measure.keep_stdout()
    for spec in stages:
        module, _, function = spec.partition("=")[2].partition(":")
        with measure.part("stage"):
            getattr(importlib.import_module(module), function)(small)
        measure.end()


def commit_here() -> str:
    asked = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--list", action="store_true", help="show the stages, their limits and what they give"
    )
    parser.add_argument(
        "--only", nargs="*", choices=[s.name for s in STAGES], metavar="STAGE", help="these alone"
    )
    parser.add_argument("--out", type=Path, help="file to append the lines to")
    parser.add_argument("--total", type=float, default=float("inf"), help="seconds after which nothing runs")
    parser.add_argument("--commit", help="of the code, where git does not say")
    parser.add_argument("--small", action="store_true", help="toy sizes, for any machine")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.small)
    if options.list:
        before = 0.0
        for stage in STAGES:
            before += stage.seconds
            print(
                f"{stage.name:<10} {stage.seconds:4.0f} s ({before:4.0f})  {stage.process:<8} {stage.gives}"
            )
        return None
    stages = [s for s in STAGES if options.only is None or s.name in options.only]
    if options.small:  # the limits are a GPU's
        stages = [dataclasses.replace(s, seconds=10 * s.seconds) for s in stages]
    out = options.out.open("a", encoding="utf-8") if options.out else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process on the device ends, too
    run(stages, Report(out, options.commit or commit_here()), options.small, options.total)


if __name__ == "__main__":
    main()
