"""What subjects wrote and drew, kept: an output is expensive, a metric computed from it is not.

Outputs lie in a folder, one JSON object a line (``outputs*.jsonl``) with pictures as PNG files beside.
They are found again by a key of everything that they depend on: task, item, what exactly was asked, seed,
and the subject's fingerprint. So an evaluation that was interrupted goes on, processes that share the
folder share the work, new metrics need no new pictures, and outputs of another model never mix in. A line
that was cut off is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unichar_jax.errors import UserError
from unichar_jax.evaluation.items import Item
from unichar_jax.files import Journal, digest, read_journal, replacing

PICTURES = "pictures"


@dataclass(frozen=True)
class Output:
    """What a subject made of one item with one seed.

    Attributes:
      item: its question.
      seed: number of the repetition, from 0.
      data: task-dependent numbers and texts; ``picture`` is the path of a picture.
    """

    item: Item
    seed: int
    data: Mapping[str, Any]


_FORMAT = 2
"""Of what outputs hold; raised when older ones would lack something."""


def output_key(item: Item, seed: int, fingerprint: str) -> str:
    """Names an output by everything it depends on."""
    image = item.prompt.image
    asked = [item.prompt.text, item.reference, item.described_by, [list(o) for o in item.options]]
    seen = None if image is None else [image.name, image.stat().st_size]
    told = json.dumps([_FORMAT, item.task, item.character, item.key, seed, fingerprint, asked, seen])
    return digest(told)[:24]


class OutputStore:
    """Outputs in a folder.

    Args:
      folder: made if it is not there.
      writer: names this process's file; give each process that writes at the same time its own.
    """

    def __init__(self, folder: str | Path, writer: str = ""):
        self.folder = Path(folder)
        self._journal = Journal(
            self.folder / (f"outputs-{writer}.jsonl" if writer else "outputs.jsonl"), "output"
        )
        for path in sorted(self.folder.glob("outputs*.jsonl")):
            self._journal.known |= read_journal(path, "output")

    def get(self, item: Item, seed: int, fingerprint: str) -> Output | None:
        """The output, if it is there."""
        data = self._journal.known.get(output_key(item, seed, fingerprint))
        if data is None:
            return None
        if "picture" in data:
            path = self.folder / data["picture"]
            if not path.is_file():
                return None
            data = {**data, "picture": str(path)}
        return Output(item, seed, data)

    def add(
        self,
        item: Item,
        seed: int,
        fingerprint: str,
        data: Mapping[str, Any],
        picture: Image.Image | None = None,
    ) -> None:
        """Keeps an output: its picture first, then its line, so that a line always has its picture."""
        key = output_key(item, seed, fingerprint)
        data = dict(data)
        try:
            if picture is not None:
                data["picture"] = f"{PICTURES}/{key}.png"
                _save(picture, self.folder / data["picture"])
            where = {"task": item.task, "character": item.character, "item": item.key, "seed": seed}
            self._journal.add(key, data, **where, subject=fingerprint)
        except OSError as error:
            raise UserError(
                f"{self.folder}: an output cannot be written ({error}). Make room or give another folder;"
                " what is there is kept, and the same command goes on."
            ) from None


def _save(picture: Image.Image, path: Path) -> None:
    with replacing(path) as made:
        picture.save(made, format="PNG")
