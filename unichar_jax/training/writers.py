"""Optional places for a run's numbers and pictures: TensorBoard and Weights & Biases.

``metrics.jsonl`` is always written; a writer is told the same. Each library is imported when its writer is
asked for, and each is an extra of this package.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from unichar_jax.errors import UserError, require_known


class Writer(Protocol):
    """Is told scalars by step, in order of steps, and pictures uint8 ``[H, W, 3]``."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, picture: np.ndarray) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``<run>/tensorboard``, without TensorFlow; what a resumed run repeats is hidden."""

    def __init__(self, run_dir: Path):
        try:
            import tensorboardX
        except ImportError:
            raise UserError(
                "run.writers: tensorboard needs a package more: pip install 'unichar-jax[tensorboard]'."
            ) from None
        self._make = lambda step: tensorboardX.SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=step, write_to_disk=True
        )
        self._writer: Any = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._at(step).add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._at(step).add_image(name, picture, step, dataformats="HWC")

    def _at(self, step: int) -> Any:
        if self._writer is None:
            self._writer = self._make(step)
        return self._writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases:
    """A run of the library's own project and mode settings (``WANDB_PROJECT``, ``WANDB_MODE``).

    A resumed run goes on in the same one: its name is kept in ``<run>/wandb-id``.
    """

    def __init__(self, run_dir: Path, config: Any):
        try:
            import wandb
        except ImportError:
            raise UserError(
                "run.writers: wandb needs a package more: pip install 'unichar-jax[wandb]'."
            ) from None
        self._wandb = wandb
        known = run_dir / "wandb-id"
        if not known.exists():
            known.write_text(uuid.uuid4().hex[:12])
        self._run: Any = wandb.init(
            id=known.read_text(),
            resume="allow",
            name=run_dir.name,
            dir=str(run_dir),
            config=dataclasses.asdict(config),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()


def make_writers(names: Sequence[str], run_dir: Path, config: Any) -> list[Writer]:
    """The writers of that name, on the process that writes; none on the others.

    Raises:
      UserError: a writer is unknown, or its package is not installed.
    """
    makers = {"tensorboard": lambda: TensorBoard(run_dir), "wandb": lambda: WeightsAndBiases(run_dir, config)}
    for name in names:
        require_known("run.writers:", name, makers, "some of")
    return [makers[name]() for name in names] if jax.process_index() == 0 else []
