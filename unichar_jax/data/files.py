"""Text and JSON files of a data folder, read through ``records``; nothing outside of the folder is ever read."""

from __future__ import annotations

from pathlib import Path

from unichar_jax.data.images import ImageError, resolve_inside
from unichar_jax.records import Findings, Record, decode, parse

MAX_TEXT_BYTES = 64 * 2**20
"""Largest text file that is read."""


def read_text(found: Findings, folder: Path, name: str) -> str | None:
    """A UTF-8 text file inside ``folder``; ``None`` if absent or faulty (then it is logged)."""
    try:
        path = resolve_inside(folder, name)
        if not path.exists():
            return None
        if not path.is_file():
            found.error(name, "", "", "a regular file", "something else", "replace it by the file")
            return None
        if path.stat().st_size > MAX_TEXT_BYTES:
            found.error(name, "", "", f"at most {MAX_TEXT_BYTES} bytes", "more", "split or shorten it")
            return None
        raw = path.read_bytes()
    except ImageError as error:
        found.error(name, "", "", "a file inside this folder", "a path out of it", str(error))
        return None
    except OSError as error:
        got = error.strerror or "an error of the system"
        found.error(name, "", "", "a file that can be read", got, "change its permissions or its name")
        return None
    return decode(found, name, raw)


def read_json(found: Findings, folder: Path, name: str) -> Record | None:
    """The object in a JSON file inside ``folder``; ``None`` if absent or faulty (then logged)."""
    text = read_text(found, folder, name)
    if text is None:
        return None
    good, value = parse(found, name, "", text)
    if not good:
        return None
    record = Record(found, name, "", value)
    return record if record.ok else None


def read_jsonl(found: Findings, folder: Path, name: str) -> list[Record]:
    """The objects in a JSON-lines file, one per line; empty lines are noted and skipped."""
    text = read_text(found, folder, name)
    if text is None:
        return []
    records = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        place = f"line {number}"
        if not line.strip():
            if number < len(lines):
                found.note(name, place, "", "one object per line", "an empty line", "it is skipped")
            continue
        good, value = parse(found, name, place, line)
        if good:
            records.append(Record(found, name, place, value))
    return records
