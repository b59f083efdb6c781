"""Whatever lies in the place of a weights file or its index, reading it ends well or in one clear error."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unichar_jax.checkpoint import convert, torch_files
from unichar_jax.checkpoint.safetensors_io import open_file
from unichar_jax.errors import UserError

from .conftest import tensors_of, write_tensors

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 29000000000\n"
PAGE = "\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


def stored(header: str | bytes | dict, body: bytes) -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded + body


def tensor(shape=(2,), offsets=(0, 8), dtype="F32", **more) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({"x": tensor(offsets=[])}, 8, r"no byte range but \[\]"),  # IndexError before
        ({"x": tensor(offsets=[0])}, 8, r"no byte range but \[0\]"),
        ({"x": tensor(offsets=[0, 4, 8])}, 8, "no byte range"),
        ({"x": tensor(offsets=[0.0, 8.0])}, 8, "no byte range"),
        ({"x": tensor(offsets=["0", "8"])}, 8, "no byte range"),
        ({"x": tensor(offsets=[8, 0])}, 8, "the byte range of tensor 'x' is wrong"),
        ({"x": tensor(offsets=[-8, 0])}, 8, "no byte range"),
        ({"x": tensor(offsets=None)}, 8, "no byte range but None"),
        ({"x": tensor(offsets=[0, 2**80])}, 8, "no byte range"),
        ({"x": tensor(offsets=[0, 1000])}, 8, "is wrong in the header"),
        ({"x": tensor(), "y": tensor(offsets=[4, 12])}, 12, "the byte range of tensor 'y'"),
        ({"x": tensor(shape=[-2])}, 8, r"no shape but \[-2\]"),
        ({"x": tensor(shape=[-1, -2])}, 8, "no shape"),
        ({"x": tensor(shape=[2.0])}, 8, "no shape"),
        ({"x": tensor(shape=[True, 2])}, 8, "no shape"),
        ({"x": tensor(shape=["2"])}, 8, "no shape"),
        ({"x": tensor(shape=2)}, 8, "no shape but 2"),
        ({"x": tensor(shape=None)}, 8, "no shape but None"),
        ({"x": tensor(shape=[1] * 70 + [2])}, 8, "no shape"),
        ({"x": tensor(shape=[0, 2**70], offsets=[0, 0])}, 0, "no shape"),
        ({"x": tensor(dtype=None)}, 8, "unknown dtype None"),
        ({"x": tensor(dtype=["F32"])}, 8, r"unknown dtype \['F32'\]"),
        ({"x": tensor(dtype="F4")}, 8, "unknown dtype 'F4'"),
        ({"x": None}, 8, "unknown dtype None"),
        ({"x": []}, 8, "unknown dtype None"),
        ({"x\ud800": tensor(shape=None)}, 8, r"tensor 'x\\ud800'"),
        ({"__metadata__": [1], "x": tensor()}, 8, "metadata"),
        ({"__metadata__": {"format": 1}, "x": tensor()}, 8, "metadata"),
        ('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "x": 1}', 8, "each key once"),
        (
            '{"x": {"dtype": "F32", "shape": [2], "shape": [1], "data_offsets": [0, 8]}}',
            8,
            "'shape': expected each key once",
        ),
        ("[" * 100_000, 8, "recursion"),
        ("[]", 8, "expected an object"),
        ("null", 0, "expected an object"),
        ("", 0, "expected JSON"),
        (b"\xff\xfe{}", 0, "UTF-8"),
        ("9" * 5_000, 0, "cannot be read"),
    ],
)
def test_a_faulty_header_is_one_error(tmp_path: Path, header, body: int, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(stored(header, bytes(body)))
    with pytest.raises(UserError, match=rf"(?s)x\.safetensors: not a complete safetensors file.*{message}"):
        open_file(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good file of two tensors in which values, keys, or bytes are replaced."""
    header = {"__metadata__": {"format": "pt"}, "x": tensor(), "y": tensor([3, 1], [8, 14], "F16")}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(["__metadata__", "x", "y"]))
        value = header.get(name)
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "format", None]))
        if key is None or not isinstance(value, dict):
            header[draw(st.sampled_from([name, "z"]))] = draw(JSON)
        elif isinstance(value.get(key), list | tuple) and draw(st.booleans()):
            value[key] = [
                draw(st.integers(-3, 2**66) | JSON) if draw(st.booleans()) else v for v in value[key]
            ]
        else:
            value[key] = draw(JSON)
    data = bytearray(stored(header, bytes(14)))
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@settings(max_examples=600, deadline=None)
@given(content=mutated() | st.binary(max_size=64))
def test_no_header_ends_in_anything_but_a_user_error(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        file = open_file(path)
    except UserError:
        return
    for name, info in file.tensors.items():  # what is accepted can be read to the end
        array = file.read(name)
        assert (array.shape, array.dtype) == (info.shape, info.dtype)
        assert array.nbytes == math.prod(info.shape) * info.dtype.itemsize
        np.array(array)


@pytest.mark.parametrize(("content", "called"), [(POINTER, "a Git-LFS pointer"), (PAGE, "a web page")])
@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors", "llm_config.json"])
def test_what_is_not_the_file_is_called_what_it_is(
    bagel: Path, tmp_path: Path, content: str, called: str, name: str
) -> None:
    (bagel / name).write_text(content)
    remedy = "git lfs pull" if called == "a Git-LFS pointer" else "download the file itself"
    with pytest.raises(UserError, match=rf"(?s){name}: .*{called}.*{remedy}"):
        convert.plan(bagel, tmp_path / "dst")


# -- the index ----------------------------------------------------------------------------------------------

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def in_shards(bagel: Path, prefix: str = "") -> Path:
    """Splits the model of a directory in two, with an index as published ones are."""
    tensors = {prefix + n: x for n, x in tensors_of(bagel / "ema.safetensors").items()}
    (bagel / "ema.safetensors").unlink()
    names = list(tensors)
    parts = dict(zip(SHARDS, (names[: len(names) // 2], names[len(names) // 2 :]), strict=True))
    for file, part in parts.items():
        write_tensors(bagel / file, {n: tensors[n] for n in part})
    index = {
        "metadata": {"total_size": "12.5GB"},
        "weight_map": {n: f for f, part in parts.items() for n in part},
    }
    (bagel / torch_files.INDEX_FILE).write_text(json.dumps(index))
    return bagel


def test_shards_are_read_with_and_without_a_byte_order_mark(bagel: Path, tmp_path: Path) -> None:
    expected = tensors_of(bagel / "ema.safetensors")
    index = in_shards(bagel) / torch_files.INDEX_FILE
    index.write_text("\ufeff" + index.read_text(), "utf-8")
    convert.convert(bagel, tmp_path / "orbax", verify=True)
    convert.convert(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=1 << 40)
    back = tensors_of(tmp_path / "back" / "ema.safetensors")
    assert all(x.tobytes() == back[n].tobytes() for n, x in expected.items())


def test_a_shard_that_is_a_pointer_is_called_one(bagel: Path, tmp_path: Path) -> None:
    (in_shards(bagel) / SHARDS[1]).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{SHARDS[1]}: this is a Git-LFS pointer.*git lfs pull"):
        convert.plan(bagel, tmp_path / "dst")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            '{"weight_map": {"x": null}}',
            r"'x': expected a \.safetensors file in this folder, got None",
        ),
        ('{"weight_map": {"x": 3}}', "got 3"),
        ('{"weight_map": {"x": "../other/model.safetensors"}}', "in this folder, got '../other"),
        ('{"weight_map": {"x": "/etc/model.safetensors"}}', "in this folder, got '/etc"),
        ('{"weight_map": {"x": "a/../../model.safetensors"}}', "in this folder"),
        ('{"weight_map": {"x": "..\\\\model.safetensors"}}', "in this folder"),
        ('{"weight_map": {"x": "a\\u0000.safetensors"}}', "in this folder"),
        (f'{{"weight_map": {{"x": "{"a" * 5000}.safetensors"}}}}', "in this folder"),
        ('{"weight_map": {"x": ""}}', "in this folder"),
        ('{"weight_map": {"x": "pytorch_model.bin"}}', "in this folder, got 'pytorch_model.bin'"),
        ('{"weight_map": {}}', "expected the file of every tensor, got nothing"),
        ('{"weight_map": []}', "weight_map: expected an object"),
        ('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "'x': expected each key once"),
        ("{}", "expected the file of every tensor, got nothing"),
        ("[]", "expected an object"),
        ("null", "expected an object"),
        ("{", "expected JSON"),
        (POINTER, "a Git-LFS pointer"),
        (PAGE, "a web page"),
    ],
)
def test_a_faulty_index_is_one_error(bagel: Path, tmp_path: Path, index: str, message: str) -> None:
    (bagel / "ema.safetensors").unlink()
    (bagel / torch_files.INDEX_FILE).write_text(index)
    with pytest.raises(UserError, match=f"{torch_files.INDEX_FILE}: .*{message}") as caught:
        convert.plan(bagel, tmp_path / "dst")
    assert str(caught.value).count("\n") == 0


def test_shards_without_an_index_are_refused_by_name(bagel: Path, tmp_path: Path) -> None:
    (in_shards(bagel) / torch_files.INDEX_FILE).unlink()
    with pytest.raises(UserError, match=r"no weights; expected .*model\.safetensors\.index\.json"):
        convert.plan(bagel, tmp_path / "dst")
