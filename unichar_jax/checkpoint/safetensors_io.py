"""The safetensors format, read through memory maps and written one tensor at a time.

``open_file`` checks a file's header against its size before any tensor is touched, so that a damaged
download is one clear error; ``TensorFile.read`` returns a view of the mapped file, which costs no
anonymous memory in any dtype (bfloat16 included, through ``ml_dtypes``). ``write_file`` writes the
header from shapes alone and then asks for one tensor after another. Nothing here knows a model: names
and layouts are the business of ``table.py``.

Format: https://github.com/huggingface/safetensors (8-byte little-endian header length, JSON header,
bytes).
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from unichar_jax import records
from unichar_jax.checkpoint.arrays import materialize
from unichar_jax.errors import UserError

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMENSIONS, _MAX_SIZE = 32, 2**48  # what numpy can address


@dataclass(frozen=True)
class TensorInfo:
    """Shape, dtype and byte range (in the file) of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    file: Path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file: its tensors by name, its metadata, and the mapped bytes."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    _bytes: Any

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the tensor in the mapped file."""
        info = self.tensors[name]
        count = math.prod(info.shape)
        if count == 0:
            return np.zeros(info.shape, info.dtype)
        flat = np.frombuffer(self._bytes, np.uint8, info.nbytes, info.start)
        return flat.view(info.dtype).reshape(info.shape)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: not a complete safetensors file: {records.printable(what)}. Download or export it again."
    )


def open_file(path: str | Path) -> TensorFile:
    """Maps a file and checks its header.

    Raises:
      UserError: the file is absent, truncated, something else (a Git-LFS pointer, a web page), or its header
        does not describe its bytes.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: file not found.")
    size = path.stat().st_size
    with path.open("rb") as f:
        if (other := records.impostor(f.read(1024))) is not None:
            raise UserError("{}: this is {}, not the weights; {}.".format(path, *other))
        f.seek(0)
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
            raise _damaged(path, f"its header asks for {length} bytes, the file has {size}")
        header = _parse(path, f.read(length))
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise _damaged(path, "the metadata in its header are not texts by name")
        tensors = {n: _info(path, n, h, 8 + length) for n, h in header.items()}
        _check_ranges(path, tensors.values(), header, 8 + length, size)
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    return TensorFile(path, tensors, metadata, mapped)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    found = records.Findings()
    text = records.decode(found, "header", raw)
    header = None if text is None else records.parse(found, "header", "", text)[1]
    record = records.Record(found, "header", "", header)
    if found.failed:
        raise _damaged(path, f"its header cannot be read ({found.all[0]})")
    return record.data


def _info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise _damaged(path, f"tensor '{name}' has the unknown dtype {records.shown(kind)} in its header")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _damaged(path, f"tensor '{name}' has no shape but {records.shown(shape)} in its header")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor '{name}' has no byte range but {records.shown(offsets)} in its header")
    return TensorInfo(name, tuple(shape), dtype, base + offsets[0], path)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _MAX_SIZE for n in value)


def _check_ranges(
    path: Path, tensors: Iterable[TensorInfo], header: dict[str, Any], base: int, size: int
) -> None:
    """The tensors must tile the body exactly: that is what tells a truncated file from a whole one."""
    at = base
    for info in sorted(tensors, key=lambda t: (t.start, t.nbytes)):
        end = base + header[info.name]["data_offsets"][1]
        if info.start != at or end - info.start != info.nbytes:
            raise _damaged(path, f"the byte range of tensor '{info.name}' is wrong in the header")
        if end > size:
            raise _damaged(path, f"tensor '{info.name}' ends at byte {end}, the file at {size} (truncated)")
        at = end
    if at != size:
        raise _damaged(path, f"its tensors end at byte {at}, the file at {size}")


def write_file(
    path: str | Path,
    specs: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
    on_write: Callable[[int], None] | None = None,
) -> None:
    """Writes a safetensors file, holding one tensor at a time.

    Args:
      path: the file; its folder exists.
      specs: ``{name: (shape, dtype)}`` in the order of the file.
      tensors: ``(name, array)`` in the same order, in any layout and dtype.
      metadata: strings to keep in the header; PyTorch loaders expect ``{"format": "pt"}``, the default.
      on_write: called with the number of bytes after each tensor (progress).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for name, (shape, dtype) in specs.items():
        end = at + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = dict(dtype=_NAMES[np.dtype(dtype)], shape=list(shape), data_offsets=[at, end])
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    expected = iter(specs.items())
    with Path(path).open("wb") as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        for name, array in tensors:
            want, (shape, dtype) = next(expected)
            if (name, array.shape) != (want, tuple(shape)):
                raise AssertionError(f"expected {want} {shape}, got {name} {array.shape}")
            data = materialize(array, dtype)
            f.write(data.reshape(-1).view(np.uint8).data)
            if on_write is not None:
                on_write(data.nbytes)
            del array, data  # before the next one is read
        if (left := next(expected, None)) is not None:
            raise AssertionError(f"tensor {left[0]} was announced and never given")


def write_tensors(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors held in memory, in the order of their names."""
    tensors = dict(sorted(tensors.items()))
    write_file(path, {name: (x.shape, x.dtype) for name, x in tensors.items()}, tensors.items())
