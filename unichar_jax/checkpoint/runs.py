"""Where the weights of a run are: from what a user names to a directory that ``checkpoint.store`` reads."""

from __future__ import annotations

from pathlib import Path

from unichar_jax.checkpoint.remote import fetched
from unichar_jax.config import presets
from unichar_jax.errors import UserError, did_you_mean


def is_run(path: Path) -> bool:
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def complete_steps(run: Path) -> list[int]:
    """Steps whose checkpoint is complete, oldest first (an unfinished one has another name or no marker)."""
    folders = [p for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
    return sorted(int(p.name) for p in folders if (p / "_CHECKPOINT_METADATA").is_file())


def find(name: str | Path) -> Path:
    """What a user names as a model (a run, a directory of any kind, a folder in a bucket, a model that ships), as
    ``resolve`` gives it.

    Raises:
      UserError: nothing has that name.
    """
    given = fetched(str(name))
    folder = given if given.is_dir() else presets.folder_or_shipped(name)
    if not folder.is_dir():
        shipped = [p.name for p in folder.parent.iterdir() if p.is_dir()]
        raise UserError(
            f"{name}: not a directory{did_you_mean(str(name), shipped)}. Expected a run, a model directory, a BAGEL"
            f" directory, or a model that ships: {', '.join(shipped)}."
        )
    return resolve(folder)


def resolve(path: str | Path) -> Path:
    """A model directory, a BAGEL directory or a step as it is; a run's latest complete step.

    Raises:
      UserError: nothing is there, or the run has no complete checkpoint yet.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(f"{path}: not a directory. Expected a run, a model directory or a BAGEL directory.")
    if not is_run(path):
        return path
    steps = complete_steps(path)
    if not steps:
        raise UserError(
            f"{path}: the run has no complete checkpoint yet; start its training command again and let it reach a save."
        )
    return path / "checkpoints" / str(steps[-1])


def weights_item(step: Path) -> str | None:
    """The item to infer with: the averaged weights where a training step keeps them."""
    return "ema" if (step / "ema").is_dir() else None
