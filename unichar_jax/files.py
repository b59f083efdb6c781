"""Files that appear whole or not at all, files that are only added to, and digests: once for every floor."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a new name beside ``path`` to write a file under, which then takes the place of ``path``.

    The folder is made. Any number of threads and processes may write one file. If the block raises, what it
    wrote is gone and ``path`` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        yield made
        os.replace(made, path)


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file, completely or not at all."""
    with replacing(path) as made:
        made.write_text(text, encoding="utf-8")


def digest(*parts: str | bytes) -> str:
    """SHA-256 in hexadecimal of the parts, one after the other; texts count as UTF-8."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() if isinstance(part, str) else part)
    return whole.hexdigest()


class Journal:
    """Values by key in a JSON-lines file that is only added to, so that what was paid for outlives its process.

    A line that a killed process left unfinished is passed over, and the next one begins on a line of its own.

    Args:
      path: the file; made, with its folder, by the first value.
      field: of a line, that holds the value.

    Attributes:
      known: value of each key, those of the file and those added.
    """

    def __init__(self, path: str | Path, field: str):
        self.path, self._field, self._lock = Path(path), field, threading.Lock()
        self.known: dict[str, Any] = read_journal(self.path, field) if self.path.is_file() else {}

    def add(self, key: str, value: Any, **more: Any) -> None:
        """Keeps a value; ``more`` is written beside it, for readers."""
        line = (
            json.dumps({"key": key, **more, self._field: value}) + "\n"
        )  # ASCII holds half a character, too
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else f"\n{line}"
                file.write(line.encode())
            self.known[key] = value


def read_journal(path: Path, field: str) -> dict[str, Any]:
    """Values by key of a journal's file."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # texts hold other separators
        try:
            record = json.loads(line)
            found[record["key"]] = record[field]
        except (ValueError, KeyError, TypeError):  # cut off when a process was killed
            continue
    return found
