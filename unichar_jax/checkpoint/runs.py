"""What is known of a run from its folder: whether it is one, its weights, and what it says of itself.

A run's folder is a model directory: configs and tokenizer of its base keep their names in it. What the run itself
has to say, its settings above all, is in ``run.json`` (``RunInfo``), and everything that asks for it comes here.
Version 0.1.0 kept the settings alone, as ``config.json``; such runs are read as well.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath

from unichar_jax.checkpoint.remote import fetched
from unichar_jax.config import presets
from unichar_jax.errors import UserError, did_you_mean
from unichar_jax.files import write_text

INFO_FILE = "run.json"
OLD_FILE = "config.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class RunInfo:
    """What a run says of itself; empty for a directory that is no run.

    Attributes:
      stage: "sft" or "grpo"; "" if it is not known.
      settings: the resolved configuration, as JSON has it.
      before: settings of the runs that it started from, the latest first.
      transforms: how pictures are prepared (``data.transforms``); {} in runs of version 0.1.0.
      characters: who was trained (``data.portraits``).
      base_weights: fingerprint of the weights that it started from; "" for random ones.
      directory: where training was started: relative paths in the settings start there.
      global_batch: rows of a step over all devices and micro-batches; 0 where that is no setting.
      format_version: of the file.
    """

    stage: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    before: tuple[dict[str, Any], ...] = ()
    transforms: dict[str, Any] = field(default_factory=dict)
    characters: tuple[dict[str, Any], ...] = ()
    base_weights: str = ""
    directory: str = ""
    global_batch: int = 0
    format_version: int = FORMAT_VERSION

    @property
    def lineage(self) -> tuple[dict[str, Any], ...]:
        """Settings of the run and of those before it, the latest first."""
        return (self.settings, *self.before) if self.settings else ()

    def path(self, given: str) -> Path:
        """A path of the settings, where it is now."""
        path = Path(given).expanduser()
        return path if path.exists() else Path(self.directory, path)


def read_info(run: str | Path) -> RunInfo:
    """What the run says of itself, or ``RunInfo()`` for a directory that is no run.

    Raises:
      UserError: the file is not JSON of a known format.
    """
    run = Path(run)
    path = run / INFO_FILE
    if not path.is_file():
        return _old_info(run)
    content = _read_json(path)
    known = {f.name for f in dataclasses.fields(RunInfo)}
    version = content.get("format_version")
    if version != FORMAT_VERSION or not known >= content.keys():
        raise UserError(
            f"{path}: expected format version {FORMAT_VERSION} with {', '.join(sorted(known))}, got version"
            f" {version} with {', '.join(sorted(content))}. Install the version of unichar-jax that wrote it."
        )
    lists = {name: tuple(content.get(name, ())) for name in ("before", "characters")}
    return RunInfo(**{**content, **lists})


def write_info(run: Path, info: RunInfo) -> None:
    """Writes it, at once; and what is left of version 0.1.0's file goes."""
    write_text(run / INFO_FILE, json.dumps(dataclasses.asdict(info), indent=2, ensure_ascii=False) + "\n")
    if is_settings(run / OLD_FILE):
        (run / OLD_FILE).unlink()


def is_settings(path: Path) -> bool:
    """Whether a ``config.json`` is not BAGEL's but the settings of a run of version 0.1.0."""
    return path.name == OLD_FILE and path.is_file() and "run_dir" in _read_json(path)


def _old_info(run: Path) -> RunInfo:
    found: list[dict[str, Any]] = []
    seen: set[Path] = set()
    while is_run(run) and run.resolve() not in seen and not (run / INFO_FILE).is_file():
        found.append(_read_json(run / OLD_FILE))
        seen.add(run.resolve())
        run = Path(str(found[-1].get("base", "")))
        run = run.parent.parent if run.parent.name == "checkpoints" else run  # a step of a run
    if not found:
        return RunInfo()
    later = read_info(run).lineage if (run / INFO_FILE).is_file() else ()
    return RunInfo("grpo" if "rollout" in found[0] else "sft", found[0], (*found[1:], *later))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def is_run(path: Path) -> bool:
    return (path / "checkpoints").is_dir() and any((path / n).is_file() for n in (INFO_FILE, OLD_FILE))


def complete_steps(run: epath.Path | Path) -> list[int]:
    """Steps whose checkpoint is complete, oldest first (an unfinished one has another name or no marker)."""
    home = run / "checkpoints"
    folders = [p for p in home.iterdir() if p.name.isdigit()] if home.is_dir() else []
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
