"""The file format: what the safetensors library writes is read, and what is written here it reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from unichar_jax.checkpoint.arrays import copy_into, materialize
from unichar_jax.checkpoint.safetensors_io import open_file, write_file
from unichar_jax.errors import UserError

from .conftest import write_tensors

EXAMPLE = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "c": np.array(7, np.int64),
    "d": np.zeros((0, 4), np.float16),
}


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, x in left.items():
        assert (x.dtype, x.shape) == (right[name].dtype, right[name].shape), name
        assert x.tobytes() == right[name].tobytes(), name


def test_library_reads_what_we_write(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", EXAMPLE)
    assert_same(EXAMPLE, load_file(tmp_path / "x.safetensors"))


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    save_file(EXAMPLE, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = open_file(tmp_path / "x.safetensors")
    assert_same(EXAMPLE, {n: file.read(n) for n in file.tensors})
    assert file.metadata == {"format": "pt"}


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16, np.int8, np.bool_]),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, shape, dtype, seed) -> None:
    x = np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    write_tensors(path, {"x": x, "y": x.T})
    file = open_file(path)
    assert_same({"x": x, "y": x.T.copy(order="C")}, {n: file.read(n) for n in file.tensors})


def test_reads_are_views(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", EXAMPLE)
    view = open_file(tmp_path / "x.safetensors").read("b")
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_write_refuses_what_was_not_announced(tmp_path: Path) -> None:
    specs = {"x": ((2,), np.dtype(np.float32))}
    with pytest.raises(AssertionError, match="expected x"):
        write_file(tmp_path / "x", specs, [("y", np.zeros(2, np.float32))])
    with pytest.raises(AssertionError, match="never given"):
        write_file(tmp_path / "x", specs, [])


def _header(text: dict, body: bytes) -> bytes:
    encoded = json.dumps(text).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def _tensor(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x01",
        struct.pack("<Q", 1000) + b"{}",
        struct.pack("<Q", 7) + b"not json",
        struct.pack("<Q", 4) + b"[12]",
        _header({"x": {"dtype": "F32"}}, b""),
        _header({"x": _tensor(0, 8, [2], "F7")}, bytes(8)),
        _header({"x": _tensor(0, 8, [2])}, bytes(7)),
        _header({"x": _tensor(0, 8, [2])}, bytes(9)),
        _header({"x": _tensor(0, 8, [3])}, bytes(8)),
        _header({"x": _tensor(0, 8, [2]), "y": _tensor(4, 12, [2])}, bytes(12)),
        _header({"x": _tensor(4, 12, [2])}, bytes(12)),
    ],
    ids=[
        "empty",
        "shorter than its length",
        "header cut off",
        "header not JSON",
        "header not an object",
        "entry without a range",
        "unknown dtype",
        "body cut off",
        "bytes after the end",
        "range and shape disagree",
        "ranges overlap",
        "range begins late",
    ],
)
def test_damage_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.safetensors: not a complete safetensors file"):
        open_file(path)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="file not found"):
        open_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_tiles_cover_a_transposed_matrix(dtype) -> None:
    x = np.random.default_rng(0).standard_normal((700, 1030), np.float32)
    expected = np.ascontiguousarray(x.T).astype(dtype)
    assert materialize(x.T, dtype).tobytes() == expected.tobytes()
    target = np.zeros((1030, 700), dtype)
    copy_into(target, x.astype(dtype).T)
    assert target.tobytes() == expected.tobytes()
    assert materialize(expected) is expected
