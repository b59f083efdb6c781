"""What a run keeps of its characters, so that it can be met wherever the run is copied: who they are, small copies
of their training pictures, things to say and to draw.

The words are in the run's ``run.json``, the pictures in ``characters/`` of the run. A run of version 0.1.0 kept
nothing: its characters are read from the folder that it was trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unichar_jax.checkpoint import runs
from unichar_jax.config.data import DataConfig
from unichar_jax.data.character import Character
from unichar_jax.data.images import open_image
from unichar_jax.data.rolescape import find_characters, read_character, short_name

FOLDER = "characters"
SIDE = 512
"""Longer side of a picture that is kept, in pixels."""

MOST_PICTURES = 24
MOST_LINES = 4


@dataclass(frozen=True)
class Portrait:
    """One character.

    Attributes:
      name, description, opening: the persona.
      folder: name of its folder in the data.
      pictures: training pictures (paths) and their captions.
      greetings: things to say, from the training scenes.
      ideas: things to draw, from the training captions.
    """

    name: str
    description: str
    opening: str
    folder: str
    pictures: tuple[tuple[Path, str], ...] = ()
    greetings: tuple[str, ...] = ()
    ideas: tuple[str, ...] = ()

    @property
    def persona(self) -> dict[str, str]:
        """What ``character.json`` beside adapters says."""
        return {"name": self.name, "description": self.description, "opening": self.opening}

    @classmethod
    def of(cls, character: Character) -> Portrait:
        captions = {c.image.id: c.text for c in character.captions}
        return cls(
            character.name,
            character.description,
            character.opening,
            character.dir_name,
            tuple((i.path, captions.get(i.id, f"Picture {i.id}")) for i in character.images[:MOST_PICTURES]),
            tuple(dict.fromkeys(s.user for s in character.scenes))[:MOST_LINES],
            tuple(dict.fromkeys(c.text for c in character.captions))[:MOST_LINES],
        )


def chosen(cfg: DataConfig) -> list[Portrait]:
    """The characters of a training."""
    names = set(cfg.characters)
    folders = find_characters(Path(cfg.path).expanduser(), "train")
    return [Portrait.of(read_character(f)) for f in folders if not names or names & {short_name(f), f.name}]


def keep(run: Path, portraits: Sequence[Portrait]) -> tuple[dict[str, Any], ...]:
    """Writes the pictures into a run; returns what its ``run.json`` is to say."""
    told = []
    for portrait in portraits:
        home = Path(FOLDER, portrait.folder)
        (run / home).mkdir(parents=True, exist_ok=True)
        pictures = []
        for source, caption in portrait.pictures:
            small = home / f"{source.stem}.jpg"
            if not (run / small).is_file():
                image = open_image(source)
                image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                image.save(run / small, quality=90)
            pictures.append((small.as_posix(), caption))
        told.append(dataclasses.asdict(dataclasses.replace(portrait, pictures=pictures)))  # type: ignore[arg-type]
    return tuple(told)


def kept(run: Path) -> list[Portrait]:
    """The characters that a run keeps, or else those of the folder that it was trained on; none where neither is."""
    info = runs.read_info(run)
    if info.characters:
        return [_read(run, told) for told in info.characters]
    root, names = trained_on(info)
    if root is None or not root.is_dir():
        return []
    return chosen(DataConfig(path=str(root), characters=names))


def _read(run: Path, told: dict[str, Any]) -> Portrait:
    pictures = tuple((run / path, caption) for path, caption in told["pictures"])
    lines = {name: tuple(told[name]) for name in ("greetings", "ideas")}
    return Portrait(**{**told, **lines, "pictures": pictures})


def trained_on(info: runs.RunInfo) -> tuple[Path | None, tuple[str, ...]]:
    """The data folder of a run, and its characters; (None, ()) if that is not known."""
    for settings in info.lineage:
        data = settings.get("data") or {}
        if data.get("path"):
            return info.path(data["path"]), tuple(data.get("characters") or ())
    return None, ()
