"""The training loop of both stages: step, log one step late, save, next batch.

What a stage brings is a ``Program``: a jitted step over (state, batch) and the data it draws from. The loop
owns the order of things, because the order is what makes a resumed run the run: the checkpoint of step n
holds the state after n steps and the data's position after n batches. Metrics are fetched while the next step
runs, so the device never waits for the log; every step's metrics are checked, and a NaN stops the run before
it can reach a checkpoint.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from unichar_jax.checkpoint.manager import CheckpointManager
from unichar_jax.errors import UserError
from unichar_jax.training.metrics import MetricsLog
from unichar_jax.training.state import Layout, TrainState

PREEMPTED_EXIT_CODE = 75
"""Exit code after a checkpoint on SIGTERM: the scheduler may start the same command again (EX_TEMPFAIL)."""


class Preempted(Exception):
    """SIGTERM arrived; the state was saved."""


class Data(Protocol):
    """An endless source of device batches whose position is a small JSON tree."""

    def __next__(self) -> Any: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


Hook = Callable[[int, TrainState], None]


@dataclass(repr=False, eq=False)
class Loop:
    """One run.

    Attributes:
      step: jitted ``(state, batch) -> (state, metrics)``; may donate the state.
      layout: assembles modules for saving and for hooks.
      data: batches.
      manager: checkpoints.
      log: metrics.
      steps: how many optimiser steps the run has in all.
      save_every, log_every: in steps.
      hooks: called after a step whose number their interval divides, e.g. sample pictures.
    """

    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    layout: Layout
    data: Data
    manager: CheckpointManager
    log: MetricsLog
    steps: int
    save_every: int
    log_every: int
    hooks: Sequence[tuple[int, Hook]] = ()
    _stop: bool = field(default=False, init=False)

    def resume(self, state: TrainState) -> TrainState:
        """The latest complete checkpoint put into ``state``'s place; ``state`` itself if there is none."""
        latest = self.manager.latest
        if latest is None:
            return state
        weights, rest, ema, host = self.manager.restore(
            latest, _optimizer_item(state), ema=state.ema is not None
        )
        flat = dict(self.layout.flat(weights))
        average = None if ema is None else dict(self.layout.flat(ema))
        self.data.restore(host["data"])
        self.log.rewind(latest)
        return TrainState(
            rest["step"],
            {k: flat[k] for k in state.params},
            {k: flat[k] for k in state.frozen},
            rest["opt"],
            None if average is None else {k: average[k] for k in state.params},
        )

    def run(self, state: TrainState) -> TrainState:
        """Runs to the last step.

        Raises:
          Preempted: after SIGTERM, with everything saved.
          UserError: a metric is not finite; the last checkpoint is intact.
        """
        previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            return self._run(state)
        finally:
            signal.signal(signal.SIGTERM, previous)
            self.manager.wait()

    def _run(self, state: TrainState) -> TrainState:
        done = int(state.step)
        pending: tuple[int, Any] | None = None
        saved = done
        while done < self.steps:
            batch = next(self.data)
            state, metrics = self.step(state, batch)
            done += 1
            if pending is not None:
                self._record(*pending)
            pending = (done, metrics)
            due = done % self.save_every == 0 or done == self.steps or self._stop
            hooks = [hook for every, hook in self.hooks if every and done % every == 0]
            if due or hooks:
                self._record(*pending)
                pending = None
            if due:
                self.save(done, state)
                saved = done
            for hook in hooks:
                hook(done, state)
            if self._stop and saved == done:
                self.manager.wait()
                raise Preempted(f"SIGTERM: saved step {done} of {self.steps}")
        self.log.flush()
        return state

    def save(self, step: int, state: TrainState) -> None:
        weights = self.layout.assemble(state.params, state.frozen)
        ema = None if state.ema is None else self.layout.assemble(state.ema, state.frozen)
        host = {"data": self.data.state(), "step": step, "time": time.time()}
        self.manager.save(step, weights, _optimizer_item(state), ema, host)

    def _record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {k: np.asarray(v) for k, v in jax.device_get(metrics).items()}
        bad = [k for k, v in values.items() if not np.isfinite(v).all()]
        if bad:
            raise UserError(
                f"step {step}: {', '.join(bad)} is not finite (loss {values.get('loss')}). The last checkpoint"
                f" is step {self.manager.latest} in {self.manager.directory}; lower the learning rate or look at"
                " the batch of that step, then start the same command again."
            )
        self.log.add(step, values, show=step % self.log_every == 0 or step == self.steps)

    def _on_sigterm(self, *_: Any) -> None:
        self._stop = True


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt": state.opt}


def run_dir(path: str | Path) -> Path:
    """The run's directory, made if absent."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    return path
