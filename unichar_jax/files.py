"""Files that appear whole or not at all, and digests: told here once for every floor."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
