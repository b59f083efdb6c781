"""The rows of the published ``processed/*.jsonl`` files, derived as training samples are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from unichar_jax.data.character import Character, ImageFile
from unichar_jax.data.tasks import T2I_TASKS, _drawings, _exchanges


def processed_rows(character: Character, task: str) -> list[dict[str, Any]]:
    """The rows of ``processed/{t2i,vlm}/<NAME>_<task>.jsonl``, in order."""
    rows = _t2i_rows if task in T2I_TASKS else _vlm_rows
    return list(rows(character, task))


def _image_row(character: Character, image: ImageFile) -> str:
    return f"personalized_data/{character.split}/{character.dir_name}/{image.id}.png"


def _t2i_rows(character: Character, task: str) -> Iterator[dict[str, Any]]:
    for scene_id, image, text in _drawings(character, task):
        yield {
            "text": text,
            "image": _image_row(character, image),
            "character": character.name,
            "scene_id": scene_id,
        }


def _vlm_rows(character: Character, task: str) -> Iterator[dict[str, Any]]:
    for exchange in _exchanges(character, task):
        row: dict[str, Any] = {"id": exchange.id}
        if exchange.image:
            row["image"] = _image_row(character, exchange.image)
        row["conversations"] = [
            {"from": "human", "value": exchange.human},
            {"from": "gpt", "value": exchange.reply},
        ]
        if exchange.qa_type:
            row["qa_type"] = exchange.qa_type
        yield row
