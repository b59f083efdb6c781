"""Conversion: exact both ways, one error for everything that is wrong, and nothing half-written ever."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from unichar_jax.checkpoint import convert, store, table, torch_files, weights, writing
from unichar_jax.checkpoint.safetensors_io import open_file
from unichar_jax.cli.main import main
from unichar_jax.config.model import model_preset
from unichar_jax.data.tokenizer import load_tokenizer
from unichar_jax.errors import UserError

from .conftest import REPOSITORY, tensors_of, write_tensors

Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"
BF16 = np.dtype(ml_dtypes.bfloat16)


def assert_same_file(a: Path, b: Path) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    for name, x in left.items():
        y = right[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert x.tobytes() == y.tobytes(), name


def cast_model(bagel: Path, dtype) -> None:
    path = bagel / "ema.safetensors"
    write_tensors(path, {n: x.astype(dtype) for n, x in tensors_of(path).items()})


def assert_untouched(folder: Path, *names: str) -> None:
    """Nothing but these: no destination, and no temporary folder."""
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)


# -- exact both ways ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
def test_round_trip_is_bit_identical(bagel: Path, tmp_path: Path, dtype) -> None:
    cast_model(bagel, dtype)
    convert.convert(bagel, tmp_path / "orbax", verify=True)
    convert.convert(tmp_path / "orbax", tmp_path / "back", verify=True)
    for name in ("ema.safetensors", "ae.safetensors"):
        assert_same_file(bagel / name, tmp_path / "back" / name)
    for file in bagel.iterdir():
        if file.suffix == ".json":
            assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes(), file.name
    index = json.loads((tmp_path / "back" / torch_files.INDEX_FILE).read_text())
    assert index["weight_map"] == dict.fromkeys(tensors_of(bagel / "ema.safetensors"), "ema.safetensors")
    written = json.loads((tmp_path / "orbax" / "unichar.json").read_text())
    assert written["format_version"] == writing.FORMAT_VERSION
    assert written["dtype"] == {"model": str(np.dtype(dtype)), "autoencoder": "float32"}


def test_shards_in_and_out(bagel: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    convert.convert(bagel, whole)
    sizes = [x.nbytes for x in tensors_of(bagel / "ema.safetensors").values()]
    limit = max(*sizes, sum(sizes) // 4)
    convert.convert(whole, tmp_path / "shards", max_shard_bytes=limit)
    files = sorted(p.name for p in (tmp_path / "shards").glob("model-*.safetensors"))
    assert len(files) > 2
    assert not (tmp_path / "shards" / "ema.safetensors").exists()
    assert all(
        sum(t.nbytes for t in open_file(tmp_path / "shards" / f).tensors.values()) <= limit for f in files
    )
    index = json.loads((tmp_path / "shards" / torch_files.INDEX_FILE).read_text())["weight_map"]
    assert {n: f for f in files for n in open_file(tmp_path / "shards" / f).tensors} == index
    # A source in shards is exported in shards again, with the same tensors.
    convert.convert(tmp_path / "shards", tmp_path / "again", verify=True)
    convert.convert(tmp_path / "again", tmp_path / "back", verify=True)
    back = {}
    for file in (tmp_path / "back").glob("model-*.safetensors"):
        back |= tensors_of(file)
    original = tensors_of(bagel / "ema.safetensors")
    assert back.keys() == original.keys()
    assert all(x.tobytes() == back[n].tobytes() for n, x in original.items())


def test_dtype_rounds_the_model_and_not_the_autoencoder(bagel: Path, tmp_path: Path) -> None:
    convert.convert(bagel, tmp_path / "orbax", dtype="bfloat16", verify=True)
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    before = tensors_of(bagel / "ema.safetensors")
    after = tensors_of(tmp_path / "back" / "ema.safetensors")
    assert all(after[n].tobytes() == x.astype(BF16).tobytes() for n, x in before.items())
    assert_same_file(bagel / "ae.safetensors", tmp_path / "back" / "ae.safetensors")


def test_full_precision_sft_file(bagel: Path, tmp_path: Path) -> None:
    """SFT leaves ``model.safetensors`` alone in a folder; the base has everything that goes with it."""
    step = tmp_path / "0000100"
    step.mkdir()
    shutil.move(bagel / "ema.safetensors", step / "model.safetensors")
    with pytest.raises(UserError, match="--base"):
        convert.convert(step, tmp_path / "orbax")
    convert.convert(step, tmp_path / "orbax", base=bagel, verify=True)
    np.testing.assert_array_equal(
        store.load_model(tmp_path / "orbax").embed.embedding[...],
        tensors_of(step / "model.safetensors")["language_model.model.embed_tokens.weight"],
    )
    assert load_tokenizer(tmp_path / "orbax") is not None


@pytest.mark.parametrize("kind", ["torch", "orbax"])
def test_language_model_alone_is_merged_over_a_base(bagel: Path, tmp_path: Path, kind: str) -> None:
    base = bagel
    if kind == "orbax":
        base = tmp_path / "base"
        convert.convert(bagel, base)
    original = tensors_of(bagel / "ema.safetensors")
    trained = {
        n.removeprefix(table.LM_PREFIX): (x + 1).astype(BF16)
        for n, x in original.items()
        if n.startswith(table.LM_PREFIX)
    }
    folder = tmp_path / "grpo"
    folder.mkdir()
    write_tensors(folder / "model.safetensors", trained)
    with pytest.raises(UserError, match="holds the language model alone"):
        convert.convert(folder, tmp_path / "merged")
    convert.convert(folder / "model.safetensors", tmp_path / "merged", base=base, verify=True)
    convert.convert(tmp_path / "merged", tmp_path / "back")
    merged = tensors_of(tmp_path / "back" / "ema.safetensors")
    assert merged.keys() == original.keys()
    for name, x in original.items():
        if name in table.frozen_tables(store.load_config(bagel)):
            continue
        expected = trained.get(name.removeprefix(table.LM_PREFIX), x)
        assert merged[name].tobytes() == expected.tobytes(), name


def test_training_step_is_exported(bagel: Path, tmp_path: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    from unichar_jax.models.unified import UnifiedModel

    cfg = store.load_config(bagel)
    run = tmp_path / "run"
    run.mkdir()
    writing.write_companions(run, cfg, bagel, bagel)
    items = {"weights": store.unstack(UnifiedModel(cfg), store.load_model(bagel))}
    ocp.save_checkpointables(run / "checkpoints" / "10", items)
    with pytest.raises(UserError, match=r"no ae\.safetensors"):
        convert.convert(run / "checkpoints" / "10", tmp_path / "back")
    convert.convert(run / "checkpoints" / "10", tmp_path / "back", base=bagel, verify=True)
    assert_same_file(bagel / "ema.safetensors", tmp_path / "back" / "ema.safetensors")
    assert load_tokenizer(tmp_path / "back") is not None


def test_frozen_tables_may_be_absent_and_are_written(bagel: Path, tmp_path: Path) -> None:
    path = bagel / "ema.safetensors"
    original = tensors_of(path)
    write_tensors(path, {n: x for n, x in original.items() if "pos_embed.pos_embed" not in n})
    convert.convert(bagel, tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert tensors_of(tmp_path / "back" / "ema.safetensors").keys() == original.keys()


# -- accounting ---------------------------------------------------------------------------------------------


def spoil(tensors: dict) -> dict:
    """One of each kind of mistake."""
    tensors["stranger.weight"] = np.zeros((2, 3), np.float32)
    del tensors["llm2vae.bias"]
    tensors[Q_PROJ] = tensors[Q_PROJ][:-1]
    tensors["connector.fc1.bias"] = tensors["connector.fc1.bias"].astype(np.int32)
    tensors[table.VISION_TABLE] = tensors[table.VISION_TABLE] + np.float32(0.25)
    return tensors


def test_everything_wrong_is_in_one_error(bagel: Path, tmp_path: Path) -> None:
    path = bagel / "ema.safetensors"
    write_tensors(path, spoil(tensors_of(path)))
    autoencoder = tensors_of(bagel / "ae.safetensors")
    autoencoder["decoder.odd"] = autoencoder.pop("decoder.conv_in.bias")
    write_tensors(bagel / "ae.safetensors", autoencoder)
    with pytest.raises(UserError) as caught:
        convert.convert(bagel, tmp_path / "orbax")
    message, h = str(caught.value), store.load_config(bagel).decoder.hidden_size
    for expected in (
        "in the file, but not in the model (1):\n    stranger.weight [2, 3]",
        "in the model, but not in the file (1):\n    llm2vae.bias",
        f"wrong shape (1):\n    {Q_PROJ}: expected [{h}, {h}], got [{h - 1}, {h}]",
        "(expected float32, bfloat16 or float16) (1):\n    connector.fc1.bias: got int32",
        f"differ from the computed ones (1):\n    {table.VISION_TABLE}: largest difference 0.25",
        "decoder.odd",
        "decoder.conv_in.bias",
    ):
        assert expected in message
    assert_untouched(tmp_path, "bagel")


def test_doubled_tensor_is_named_with_both_files(bagel: Path, tmp_path: Path) -> None:
    tensors = tensors_of(bagel / "ema.safetensors")
    (bagel / "ema.safetensors").unlink()
    names = list(tensors)
    parts = {"a.safetensors": names[: len(names) // 2 + 1], "b.safetensors": names[len(names) // 2 :]}
    for file, part in parts.items():
        write_tensors(bagel / file, {n: tensors[n] for n in part})
    index = {n: f for f, part in parts.items() for n in part}
    (bagel / torch_files.INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match=r"in more than one file \(1\):\n.*: a.safetensors, b.safetensors"):
        convert.convert(bagel, tmp_path / "orbax")
    assert_untouched(tmp_path, "bagel")


def test_missing_shard_is_named(bagel: Path, tmp_path: Path) -> None:
    tensors = tensors_of(bagel / "ema.safetensors")
    (bagel / "ema.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "model-00002-of-00002.safetensors")}
    (bagel / torch_files.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"of which 1 are missing.*model-00002-of-00002\.safetensors"):
        convert.convert(bagel, tmp_path / "orbax")
    assert_untouched(tmp_path, "bagel")


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
@pytest.mark.parametrize("keep", [5, 200, -10])
def test_truncated_file(bagel: Path, tmp_path: Path, name: str, keep: int) -> None:
    path = bagel / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{name}: not a complete safetensors file"):
        convert.convert(bagel, tmp_path / "orbax")
    assert_untouched(tmp_path, "bagel")


def test_frozen_table_is_compared_after_rounding(bagel: Path, tmp_path: Path) -> None:
    """bfloat16 tables differ from the float32 ones by rounding, and pass; one step more does not."""
    cast_model(bagel, BF16)
    convert.plan(bagel, tmp_path / "orbax")
    tensors = tensors_of(bagel / "ema.safetensors")
    moved = tensors[table.LATENT_TABLE].astype(np.float32)
    moved[3, 5] += 2.0**-5
    tensors[table.LATENT_TABLE] = moved.astype(BF16)
    write_tensors(bagel / "ema.safetensors", tensors)
    with pytest.raises(UserError, match=r"latent_pos_embed.*largest difference 0\.03"):
        convert.plan(bagel, tmp_path / "orbax")


def test_orbax_directory_of_other_sizes(bagel: Path, tmp_path: Path) -> None:
    convert.convert(bagel, tmp_path / "orbax")
    path = tmp_path / "orbax" / "llm_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"num_hidden_layers": content["num_hidden_layers"] + 1}))
    with pytest.raises(UserError, match=r"in the model, but not in the file \(28\)"):
        convert.convert(tmp_path / "orbax", tmp_path / "back")
    assert_untouched(tmp_path, "bagel", "orbax")


def test_newer_format_is_refused(bagel: Path, tmp_path: Path) -> None:
    convert.convert(bagel, tmp_path / "orbax")
    path = tmp_path / "orbax" / "unichar.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        convert.convert(tmp_path / "orbax", tmp_path / "back")


# -- destinations -------------------------------------------------------------------------------------------


def test_existing_destination_is_left_alone(bagel: Path, tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    (target / "keep").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert.convert(bagel, target)
    assert [p.name for p in target.iterdir()] == ["keep"]


def test_full_disk_is_foreseen(bagel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"GiB are to be written"):
        convert.convert(bagel, tmp_path / "orbax")
    assert_untouched(tmp_path, "bagel")


@pytest.mark.parametrize("direction", ["to Orbax", "to safetensors"])
def test_failure_half_way_leaves_nothing(
    bagel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    src = bagel
    if direction == "to safetensors":
        src = tmp_path / "orbax"
        convert.convert(bagel, src)
    before = sorted(p.name for p in tmp_path.iterdir())

    def fail(*args) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(writing, "write_companions", fail)  # the weights are written by then
    with pytest.raises(OSError, match="no space"):
        convert.convert(src, tmp_path / "dst")
    assert_untouched(tmp_path, *before)


def test_verify_finds_one_wrong_bit(bagel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = writing.write_item

    def flip(folder, arrays, *rest) -> None:
        def flipped():
            for name, x in arrays:
                if name == "connector.fc1.kernel":
                    x = np.array(x)
                    x.view(np.uint32)[1, 2] ^= 1
                yield name, x

        honest(folder, flipped(), *rest)

    monkeypatch.setattr(writing, "write_item", flip)
    with pytest.raises(UserError, match=r"1 arrays differ.*\n  model: connector\.fc1\.kernel"):
        convert.convert(bagel, tmp_path / "orbax", verify=True)
    assert_untouched(tmp_path, "bagel")


# -- the command --------------------------------------------------------------------------------------------


def test_dry_run_prints_the_accounting_and_writes_nothing(
    bagel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(bagel), str(tmp_path / "orbax"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    cfg = store.load_config(bagel)
    assert f"{sum(math.prod(e.shape) for e in table.model_table(cfg)):,}" in printed
    assert "nothing was written" in printed
    assert_untouched(tmp_path, "bagel")


def test_command_converts_and_reports_mistakes(
    bagel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(bagel), str(tmp_path / "orbax"), "--verify"]) == 0
    assert "every array compared" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "x")]) == 1
    assert "no such file or directory" in capsys.readouterr().err


# -- memory -------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path
from orbax.checkpoint import v1 as ocp
import jax
from unichar_jax.checkpoint import convert, weights
from unichar_jax.checkpoint.memory import PeakMemory
src, dst, group, verify = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "verify"
jax.devices()
weights.GROUP_BYTES = group
with PeakMemory() as memory:
    made = convert.convert(src, dst, verify=verify)
largest = max(p.largest_bytes for p in made.parts)
print(json.dumps({"peak": memory.peak, "largest": largest, "all": made.nbytes}))
"""


def measure(src: Path, dst: Path, group: int, verify: bool = False) -> dict[str, int]:
    """Peak RssAnon above the interpreter's, of a conversion in a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    arguments = [str(src), str(dst), str(group), "verify" if verify else "-"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    if measured["peak"] is None:
        pytest.skip("this system does not tell a process's anonymous memory")
    return measured


def synthetic(folder: Path, hidden: int, mlp: int, layers: int, vocab: int) -> None:
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    try:
        from synthetic_bagel import write_synthetic
    finally:
        sys.path.pop(0)
    cfg = model_preset("bagel-7b")
    cfg = dataclasses.replace(
        cfg,
        decoder=dataclasses.replace(
            cfg.decoder, hidden_size=hidden, mlp_size=mlp, num_layers=layers, num_heads=16, vocab_size=vocab
        ),
        vision=dataclasses.replace(cfg.vision, num_layers=2),
        autoencoder=model_preset("debug").autoencoder,
    )
    write_synthetic(folder, cfg, BF16)


def test_memory_is_bounded_by_the_group(tmp_path: Path) -> None:
    """A third of a gigabyte converts, both ways, in less memory than half of it (Python included)."""
    synthetic(tmp_path / "src", hidden=1024, mlp=3072, layers=5, vocab=4096)
    there = measure(tmp_path / "src", tmp_path / "orbax", 8 << 20)
    back = measure(tmp_path / "orbax", tmp_path / "back", 8 << 20)
    for measured in (there, back):
        assert 16 * measured["largest"] < measured["all"], measured
        assert measured["largest"] < measured["peak"] < measured["all"] / 2, measured
    assert_same_file(tmp_path / "src" / "ema.safetensors", tmp_path / "back" / "ema.safetensors")


@pytest.mark.slow
def test_four_gibibytes_are_streamed(tmp_path: Path) -> None:
    """At most three times the largest tensor and 1 GiB above the interpreter, both ways, verified."""
    if shutil.disk_usage(tmp_path).free < 14 << 30:
        pytest.skip("needs 14 GiB of disk")
    synthetic(tmp_path / "src", hidden=2048, mlp=8192, layers=17, vocab=32000)
    there = measure(tmp_path / "src", tmp_path / "orbax", weights.GROUP_BYTES, verify=True)
    back = measure(tmp_path / "orbax", tmp_path / "back", weights.GROUP_BYTES, verify=True)
    assert there["all"] >= 4 << 30
    for measured in (there, back):
        assert measured["peak"] <= 3 * measured["largest"] + (1 << 30), measured
    for name in ("ema.safetensors", "ae.safetensors"):
        compare = ["cmp", str(tmp_path / "src" / name), str(tmp_path / "back" / name)]
        assert subprocess.run(compare, check=False).returncode == 0
