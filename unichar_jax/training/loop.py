"""The training loop of both stages: step, log one step late, save, next batch.

What a stage brings is a ``Program``: a jitted step over (state, batch) and the data it draws from. The loop
owns the order of things, because the order is what makes a resumed run the run: the checkpoint of step n
holds the state after n steps and the data's position after n batches. Metrics are fetched while the next step
runs, so the device never waits for the log; every step's metrics are checked, and a NaN stops the run before
it can reach a checkpoint. On several hosts every process runs the same loop; process 0 writes the log, all of
them write the checkpoint, and a SIGTERM to any of them stops all at the same step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

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


@dataclass
class ProfileWindow:
    """Traces the steps ``first`` to ``last`` with JAX's profiler, into ``folder`` (TensorBoard and Perfetto read
    it)."""

    folder: Path
    first: int
    last: int
    _running: bool = field(default=False, init=False)

    def before(self, step: int) -> None:
        if self.first <= step <= self.last and not self._running:
            jax.profiler.start_trace(self.folder)
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        if step >= self.last and self._running:
            jax.block_until_ready(metrics)
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


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
      profile: steps to trace.
      allow_changes: go on where the data is no longer what the checkpoint's position is of, from its beginning.
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
    profile: ProfileWindow | None = None
    allow_changes: bool = False
    _stop: bool = field(default=False, init=False)

    def resume(self, state: TrainState) -> TrainState:
        """The latest complete checkpoint put into ``state``'s place; ``state`` itself if there is none.

        Shapes with shardings do in place of arrays, where there is a checkpoint.
        """
        latest = self.manager.latest
        self.log.rewind(latest or 0)
        if latest is None:
            return state
        weights, rest, ema, host = self.manager.restore(
            latest, _optimizer_item(state), ema=state.ema is not None
        )
        flat = dict(self.layout.flat(weights))
        average = None if ema is None else dict(self.layout.flat(ema))
        try:
            self.data.restore(host["data"])
        except UserError as error:
            if not self.allow_changes:
                raise
            self.log.say(f"note: {error} It goes on with the data from its beginning.")
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
        alone = jax.process_count() == 1  # else JAX's preemption service catches the signal (_preempted)
        previous = signal.signal(signal.SIGTERM, self._on_sigterm) if alone else None
        try:
            return self._run(state)
        finally:
            if alone:
                signal.signal(signal.SIGTERM, previous)
            if self.profile is not None:
                self.profile.stop()
            self.log.close()
            self.manager.wait()

    def _run(self, state: TrainState) -> TrainState:
        done = int(state.step)
        pending: tuple[int, Any] | None = None
        saved = done
        while done < self.steps:
            batch = next(self.data)
            if self.profile is not None:
                self.profile.before(done + 1)
            state, metrics = self.step(state, batch)
            done += 1
            if self.profile is not None:
                self.profile.after(done, metrics)
            self._stop = self._stop or _preempted(done)
            if pending is not None:
                self._record(*pending)
            pending = (done, metrics)
            due = done % self.save_every == 0 or done == self.steps or self._stop
            hooks = [hook for every, hook in self.hooks if every and done % every == 0]
            # A step that was waited for (a round of stage 2) is recorded at its own end, not a step late.
            if due or hooks or _is_ready(metrics):
                self._record(*pending)
                pending = None
            if due:
                self.log.flush()  # a checkpoint never knows of steps that its log does not
                self.save(done, state)
                saved = done
            for hook in hooks:
                hook(done, state)
            if due or hooks:
                self.log.restart_clock(done)
            if self._stop and saved == done:
                self.manager.wait()
                raise Preempted(f"SIGTERM: saved step {done} of {self.steps}")
        return state

    def verify_checkpoint(self, state: TrainState) -> None:
        """Reads the last checkpoint back and compares it with ``state``, bit by bit; uses ``state`` up.

        Raises:
          UserError: they differ.
        """
        wanted, like = _bits(state), jax.tree.map(struct, state)
        for x in jax.tree.leaves(state):
            x.delete()  # a device that is full of one state has no room for two
        found = _bits(self.resume(like))
        wrong = [k for k in wanted if wanted[k] != found.get(k)]
        if wrong or not wanted:
            raise UserError(
                f"step {self.manager.latest} in {self.manager.directory} does not read back as it was written:"
                f" {len(wrong)} of {len(wanted)} arrays differ ({', '.join(wrong[:3])}, ...). Look at that file"
                " system before you train."
            )

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


def _is_ready(metrics: dict[str, Any]) -> bool:
    """Whether reading them waits for nothing."""
    return all(x.is_ready() for x in jax.tree.leaves(metrics) if isinstance(x, jax.Array))  # type: ignore[attr-defined]


def _preempted(step: int) -> bool:
    """Whether all processes of several are to stop after this step, because one of them had a SIGTERM."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@jax.jit
def _sums_of_bits(tree: Any) -> Any:
    """For each array the sum of its bits as integers, mod 2^32: the same on any mesh, whatever the order."""

    def total(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        return words.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(total, tree)


def _bits(state: TrainState) -> dict[str, int]:
    leaves = jax.tree_util.tree_leaves_with_path(_sums_of_bits(state))
    return {jax.tree_util.keystr(path): int(x) for path, x in leaves}


def struct(x: jax.Array) -> jax.ShapeDtypeStruct:
    """An array's shape and place without its contents."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt": state.opt}
