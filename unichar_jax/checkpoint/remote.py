"""Paths in a bucket (``gs://``), through etils' epath.

Checkpoints are written to the bucket directly, by Orbax. Everything else of a run is small and is written to a
local folder that mirrors the run's directory: ``push`` copies up what changed, ``pull`` copies down what a
start needs. So the code that reads and writes those files only knows local ones, and a bucket never has to
append to a file. Models and data are copied down once (``fetched``).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from unichar_jax.errors import UserError
from unichar_jax.files import digest, replacing

CHECKPOINTS = "checkpoints"
_NOT_NEEDED = "optimizer"  # the item of a checkpoint that only the run itself reads
_COMPLETE = "_CHECKPOINT_METADATA"


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def _local_name(path: str) -> Path:
    """Where the local copy of a remote folder is."""
    home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return (
        Path(home) / "unichar_jax" / "remote" / f"{digest(path)[:12]}-{path.rstrip('/').rsplit('/', 1)[-1]}"
    )


def _files(folder: epath.Path, parts: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Names below a folder, by parts."""
    for path in folder.iterdir():
        name = path.name.rstrip("/")
        if path.is_dir():
            yield from _files(path, (*parts, name))
        else:
            yield (*parts, name)


def _copy(source: epath.Path, target: epath.Path) -> None:
    """One file, so that a copy that was interrupted is not taken for the file."""
    if is_remote(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.copy(target, overwrite=True)  # a bucket shows an object when it is whole
        return
    with replacing(target) as made:
        source.copy(made, overwrite=True)


def fetched(path: str) -> Path:
    """A local copy of a model, a run or a data folder; a local path as it is.

    A copy that is there already is taken, so a changed folder needs a new name. Of a run, only its latest
    complete checkpoint is copied, without the optimiser's state.

    Raises:
      UserError: there is nothing at ``path``, or it cannot be read.
    """
    if not is_remote(path):
        return Path(path)
    local = _local_name(path)
    done = local.with_name(f"{local.name}.done")
    if done.exists():
        return local
    source = _open(path)
    try:
        if not source.is_dir():
            raise UserError(f"{path}: nothing is there. Expected a folder in a bucket.")
        steps = source / CHECKPOINTS
        found = [s for s in steps.iterdir() if (s / _COMPLETE).exists()] if steps.is_dir() else []
        latest = max((s.name for s in found), key=int, default="")
        for parts in _files(source):
            if parts[0] == CHECKPOINTS and (parts[1] != latest or _NOT_NEEDED in parts):
                continue
            _copy(source.joinpath(*parts), epath.Path(local.joinpath(*parts)))
    except OSError as error:
        raise UserError(f"{path}: cannot be copied to this host ({error}).") from None
    done.touch()
    return local


class RunFolder:
    """A run's directory.

    Attributes:
      local: where its files are read and written.
      checkpoints: what the checkpoint manager is given: the bucket's path, or the local one.
    """

    def __init__(self, run_dir: str):
        self._remote = _open(run_dir) if is_remote(run_dir) else None
        self.local = Path(run_dir) if self._remote is None else _local_name(run_dir)
        self.checkpoints = str(self.local) if self._remote is None else run_dir
        self._pushed: dict[tuple[str, ...], tuple[int, int]] = {}

    @property
    def is_shared(self) -> bool:
        """Whether all hosts see ``local``; if not, one pushes and the others pull."""
        return self._remote is None

    def pull(self) -> None:
        """Makes ``local`` what the bucket has; nothing for a local run."""
        if self._remote is None:
            return
        shutil.rmtree(self.local, ignore_errors=True)
        self.local.mkdir(parents=True)
        if self._remote.is_dir():
            for parts in _files(self._remote):
                if parts[0] != CHECKPOINTS:
                    _copy(self._remote.joinpath(*parts), epath.Path(self.local.joinpath(*parts)))

    def push(self) -> None:
        """Copies up what is new or changed since the last push; nothing for a local run."""
        if self._remote is None:
            return
        for parts in _files(epath.Path(self.local)):
            path = self.local.joinpath(*parts)
            stat = path.stat()
            state = (stat.st_size, stat.st_mtime_ns)
            if self._pushed.get(parts) != state and not path.name.startswith("."):
                _copy(epath.Path(path), self._remote.joinpath(*parts))
                self._pushed[parts] = state

    def remove(self) -> None:
        """Removes the run with all it holds."""
        shutil.rmtree(self.local, ignore_errors=True)
        if self._remote is not None and self._remote.exists():
            self._remote.rmtree()


def _open(path: str) -> epath.Path:
    try:
        return epath.Path(path)
    except ImportError as error:
        raise UserError(
            f"{path}: reading buckets needs a package more ({error}): pip install 'unichar-jax[gcs]'."
        ) from None
