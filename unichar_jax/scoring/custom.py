"""A user's own reward: a function in a file of theirs, named in the config as ``path/to/file.py:function``.

The function is called as ``function(images, context)`` with ``images`` a numpy array ``[N, H, W, 3]`` in
[0, 1] and ``context`` a ``ScoreContext``, and returns N numbers, larger is better. It may call anything
(another model, a service). Whatever it does wrong, raising, hanging or returning nonsense, ends the run with
one message that names the file and the line; the run's last checkpoint is untouched, because nothing is
written while rewards are computed.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from unichar_jax.errors import UserError, did_you_mean
from unichar_jax.scoring.base import ScoreContext, checked_scores


class CustomScorer:
    """See the module's docstring.

    Args:
      spec: ``path/to/file.py:function``; a relative path is relative to the working directory.
      timeout: seconds that one call may take.
      name: what weights and curves call it; by default the function's name.

    Raises:
      UserError: no such file or function, or the file cannot be imported.
    """

    def __init__(self, spec: str, *, timeout: float = 300.0, name: str | None = None):
        path, colon, function = spec.rpartition(":")
        if not colon or not path.endswith(".py") or not function.isidentifier():
            raise UserError(f"custom reward '{spec}': expected path/to/file.py:function.")
        self._path = Path(path).expanduser().resolve()
        self._function = _load(self._path, function)
        self._timeout = timeout
        self.name = name or function

    def __call__(self, images: jax.Array, context: ScoreContext) -> np.ndarray:
        scores = self._run(np.asarray(images, np.float32), context)
        return checked_scores(f"{self.name} ({self._path})", scores, context)

    def _run(self, images: np.ndarray, context: ScoreContext) -> Any:
        outcome: dict[str, Any] = {}

        def call() -> None:
            try:
                outcome["scores"] = self._function(images, context)
            except BaseException as error:  # whatever a user's code raises belongs in the message
                outcome["error"] = error

        # A daemon thread: Python cannot stop a hanging function, but the run may end without it.
        thread = threading.Thread(target=call, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(self._timeout)
        if thread.is_alive():
            raise UserError(
                f"custom reward {self._path}: '{self.name}' took longer than {self._timeout:g} s for"
                f" {len(images)} pictures. Make it faster, or raise its timeout."
            )
        if error := outcome.get("error"):
            raise UserError(
                f"custom reward {self._path}{_line(error, self._path)}: '{self.name}' raised"
                f" {type(error).__name__}: {error}"
            ) from error
        return outcome["scores"]


def _load(path: Path, function: str) -> Any:
    if not path.is_file():
        raise UserError(f"custom reward: {path}: file not found.")
    module = _import(path)
    found = getattr(module, function, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(f"custom reward: {path} has no function '{function}'{did_you_mean(function, names)}.")
    return found


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"unichar_custom_{path.stem}", path)
    assert spec is not None  # it is a .py file
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # so that the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"custom reward: {path}{_line(error, path)} cannot be imported ({type(error).__name__}: {error})."
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _line(error: BaseException, path: Path) -> str:
    """``", line 12"``: the last line of the user's file that the error passed through."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""
