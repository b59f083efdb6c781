"""Checkpoints of a training run, with Orbax.

``<run>/checkpoints/<step>/`` holds the items ``weights`` (layers spelled out under the names of
``checkpoint/table.py``: what inference reads, and nothing else), ``optimizer`` (step and optimiser state)
and, if kept, ``ema`` (same layout as ``weights``). The data iterator's state and the run's clock travel in
the checkpoint's metadata, so a checkpoint is either complete or not there: Orbax writes beside and renames at
the end. Saving is asynchronous; the arrays are copied to the host before ``save`` returns.

Restoring diffs the stored metadata against the run first and lists every difference, because Orbax's own
messages do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from unichar_jax.checkpoint import store
from unichar_jax.checkpoint.remote import is_remote
from unichar_jax.errors import UserError, listed
from unichar_jax.models import params

WEIGHTS, OPTIMIZER, EMA = "weights", "optimizer", "ema"


class CheckpointManager:
    """Saves and restores ``(weights module, optimiser tree, ema module, host state)`` by step."""

    def __init__(self, run_dir: str | Path, declared: Any, *, keep: int = 2, mesh: Mesh | None = None):
        """Args:
        run_dir: the run's directory; may be in a bucket (``gs://``).
        declared: the model as declarations: shapes, names, sharding.
        keep: how many of the latest checkpoints stay.
        mesh: where restored arrays go.
        """
        home = epath.Path(run_dir)
        self.directory = (home if is_remote(run_dir) else home.absolute()) / "checkpoints"
        self.declared, self.mesh = declared, mesh
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._unstack = jax.jit(lambda module: store.unstack(declared, module))

    @property
    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(c.step for c in self._orbax.checkpoints)

    @property
    def latest(self) -> int | None:
        return self.steps[-1] if self.steps else None

    def save(self, step: int, weights: Any, optimizer: Any, ema: Any | None, host: dict[str, Any]) -> None:
        """Starts saving; ``host`` is a small JSON tree (data iterator, clock)."""
        items = {WEIGHTS: self._unstack(weights), OPTIMIZER: optimizer}
        if ema is not None:
            items[EMA] = self._unstack(ema)
        self._orbax.save_checkpointables_async(step, items, force=True, overwrite=True, custom_metadata=host)

    def restore(self, step: int, optimizer: Any, *, ema: bool) -> tuple[Any, Any, Any | None, dict[str, Any]]:
        """Restores ``(weights, optimizer, ema, host)`` of a step onto this run's mesh.

        Args:
          step: a complete checkpoint.
          optimizer: a tree like the saved optimiser state (arrays or structs with shardings).
          ema: whether the run keeps one.
        """
        flat = store.flat_abstract(self.declared, self.mesh)
        targets: dict[str, Any] = {WEIGHTS: flat, OPTIMIZER: jax.tree.map(_struct, optimizer)}
        if ema:
            targets[EMA] = flat
        self._refuse_mismatch(step, targets)
        items = self._orbax.load_checkpointables(step, targets)
        stack = jax.jit(
            lambda arrays: store.stack_flat(self.declared, arrays),
            out_shardings=None if self.mesh is None else params.shardings(self.declared, self.mesh),
        )
        average = stack(items.pop(EMA)) if ema else None
        host = self._orbax.metadata(step).custom_metadata or {}
        return stack(items.pop(WEIGHTS)), items[OPTIMIZER], average, host

    def _refuse_mismatch(self, step: int, targets: dict[str, Any]) -> None:
        stored = self._orbax.checkpointables_metadata(step).metadata
        problems = []
        for item, target in targets.items():
            if item not in stored:
                problems.append(f"item '{item}' is missing")
                continue
            have, want = _shapes(stored[item]), _shapes(target)
            problems += [f"{item}: {k} is missing" for k in sorted(want.keys() - have.keys())]
            problems += [f"{item}: {k} is unexpected" for k in sorted(have.keys() - want.keys())]
            problems += [
                f"{item}: {k} has shape {have[k]}, this run expects {want[k]}"
                for k in sorted(want.keys() & have.keys())
                if have[k] != want[k]
            ]
        if problems:
            raise UserError(
                f"checkpoint {self.directory / str(step)} does not fit this run:{listed(problems, 40)}\n"
                "Use the configuration the run was started with (run.json in the run), or a new run_dir."
            )

    def wait(self) -> None:
        """Blocks until the last save is complete, and raises what it raised."""
        self._orbax.wait()

    def close(self) -> None:
        self._orbax.close()


def _struct(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(np.shape(leaf) or leaf.shape) for name, leaf in params.named_leaves(tree)}
