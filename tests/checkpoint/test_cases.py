"""Variants of a BAGEL directory as people meet them: what each ends in, and with which weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from unichar_jax.checkpoint import convert, lora, store, table, torch_files
from unichar_jax.checkpoint.arrays import is_rounding, not_finite, overflowing
from unichar_jax.cli.main import main
from unichar_jax.errors import UserError
from unichar_jax.models import params

from .conftest import tensors_of, write_tensors
from .test_headers import in_shards

HEAD, EMBEDDING = torch_files.HEAD, torch_files.EMBEDDING
DOWN = "language_model.model.layers.0.mlp.down_proj.weight"


def rename(bagel: Path, name: Callable[[str], str]) -> dict[str, np.ndarray]:
    """Gives the tensors of a directory other names; returns them under BAGEL's."""
    tensors = tensors_of(bagel / "ema.safetensors")
    write_tensors(bagel / "ema.safetensors", {name(n): x for n, x in tensors.items()})
    return tensors


def edit(bagel: Path, **values) -> None:
    path = bagel / "llm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def converted(src: Path, dst: Path, **options) -> dict[str, np.ndarray]:
    """Converts there and back; returns the tensors of the export."""
    convert.convert(src, dst, verify=True, **options)
    convert.convert(dst, dst.with_name("back"), verify=True, max_shard_bytes=1 << 40)
    return tensors_of(dst.with_name("back") / "ema.safetensors")


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    assert all(x.tobytes() == got[n].tobytes() for n, x in expected.items())


# -- wrappers -----------------------------------------------------------------------------------------------


def inside(word: str) -> Callable[[str], str]:
    """A wrapper around every layer and around the model, as FSDP leaves them."""
    return lambda n: (
        f"{word}." + n.replace(".layers.0.", f".layers.0.{word}.").replace(".mlp.", f".mlp.{word}.")
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (lambda n: f"module.{n}", ["'module.'"]),
        (lambda n: f"module.module.{n}", ["'module.module.'"]),
        (lambda n: f"model.{n}", ["'model.'"]),
        (lambda n: f"_fsdp_wrapped_module.{n}", ["'_fsdp_wrapped_module.'"]),
        (lambda n: f"_orig_mod.{n}", ["'_orig_mod.'"]),
        (lambda n: f"module._orig_mod.model.{n}", ["'_orig_mod.'", "'module.model.'"]),
        (inside("_fsdp_wrapped_module"), ["'_fsdp_wrapped_module.'"]),
        (inside("_checkpoint_wrapped_module"), ["'_checkpoint_wrapped_module.'"]),
    ],
    ids=["ddp", "twice", "model", "fsdp", "compiled", "three", "fsdp-layers", "checkpointed-layers"],
)
def test_wrappers_are_told_and_left_off(bagel: Path, tmp_path: Path, capsys, name, words: list[str]) -> None:
    expected = rename(bagel, name)
    made = convert.plan(bagel, tmp_path / "x")
    assert len(made.notes) == 1 and all(word in made.notes[0] for word in words)
    assert main(["convert", str(bagel), str(tmp_path / "x"), "--dry-run"]) == 0
    assert words[0] in capsys.readouterr().out
    assert_same(converted(bagel, tmp_path / "orbax"), expected)
    loaded = store.load_model(bagel)  # and where nothing is converted
    assert np.array_equal(np.asarray(loaded.embed.embedding[...]), expected[EMBEDDING])


def test_names_of_no_wrapper_are_one_short_error(bagel: Path, tmp_path: Path) -> None:
    rename(bagel, lambda n: f"student.{n}")
    with pytest.raises(UserError, match=r"none of its tensors has a name of BAGEL's; the first is student\."):
        convert.plan(bagel, tmp_path / "x")


def test_a_wrapped_and_a_plain_copy_are_a_doubled_tensor(bagel: Path, tmp_path: Path) -> None:
    tensors = tensors_of(bagel / "ema.safetensors")
    write_tensors(bagel / "ema.safetensors", tensors | {f"_orig_mod.{DOWN}": tensors[DOWN]})
    with pytest.raises(UserError, match=rf"in more than one file \(1\):\n +{DOWN}"):
        convert.plan(bagel, tmp_path / "x")


# -- tied heads ---------------------------------------------------------------------------------------------


def without(bagel: Path, *names: str) -> dict[str, np.ndarray]:
    tensors = tensors_of(bagel / "ema.safetensors")
    write_tensors(bagel / "ema.safetensors", {n: x for n, x in tensors.items() if n not in names})
    return tensors


def test_a_tied_head_is_the_embedding(bagel: Path, tmp_path: Path) -> None:
    expected = without(bagel, HEAD)
    edit(bagel, tie_word_embeddings=True)
    assert "tied to" in convert.plan(bagel, tmp_path / "x").notes[0]
    got = converted(bagel, tmp_path / "orbax")
    assert_same(got, expected | {HEAD: expected[EMBEDDING]})
    for folder in ("orbax", "back"):  # what was written has a head of its own
        settings = json.loads((tmp_path / folder / "llm_config.json").read_text())
        assert settings["tie_word_embeddings"] is False
    direct = params.flat(store.load_model(bagel))
    assert np.array_equal(np.asarray(direct["lm_head.kernel"]), expected[EMBEDDING].T)


def test_a_missing_head_that_is_not_tied_is_refused_in_the_right_words(bagel: Path, tmp_path: Path) -> None:
    without(bagel, HEAD)
    for attempt in (lambda: convert.plan(bagel, tmp_path / "x"), lambda: store.load_model(bagel)):
        with pytest.raises(
            UserError, match=r'(?s)tied to the embedding.*"tie_word_embeddings": true'
        ) as caught:
            attempt()
        assert "Check that llm_config.json" not in str(caught.value)


# -- values that are not finite -----------------------------------------------------------------------------


def with_values(
    bagel: Path, name: str, *values: float, file: str = "ema.safetensors", dtype=np.float32
) -> None:
    tensors = tensors_of(bagel / file)
    x = tensors[name].astype(dtype)
    x.reshape(-1)[: len(values)] = values
    write_tensors(bagel / file, tensors | {name: x})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(
    "file, name", [("ema.safetensors", DOWN), ("ae.safetensors", "encoder.conv_in.weight")]
)
def test_what_is_not_finite_is_refused_on_the_way_in(bagel: Path, tmp_path: Path, dtype, file, name) -> None:
    with_values(bagel, name, np.nan, np.inf, -np.inf, file=file, dtype=dtype)
    size = tensors_of(bagel / file)[name].size
    with pytest.raises(UserError, match=rf"{name}: 3 of {size:,} values are not finite; nothing was written"):
        convert.convert(bagel, tmp_path / "orbax")
    assert [p.name for p in tmp_path.iterdir()] == ["bagel"]


@pytest.mark.parametrize("verify", [True, False])
def test_what_float16_cannot_hold_is_refused_after_the_cast(
    bagel: Path, tmp_path: Path, verify: bool
) -> None:
    with_values(bagel, DOWN, *[1e6] * 8)
    size = tensors_of(bagel / "ema.safetensors")[DOWN].size
    message = rf"{DOWN}: 8 of {size:,} values do not fit float16, whose largest is 65504; nothing was written"
    with pytest.raises(UserError, match=message):
        convert.convert(bagel, tmp_path / "orbax", dtype="float16", verify=verify)
    assert [p.name for p in tmp_path.iterdir()] == ["bagel"]
    convert.convert(bagel, tmp_path / "orbax", verify=True)
    with pytest.raises(UserError, match=message):  # and on the way out
        convert.convert(tmp_path / "orbax", tmp_path / "back", dtype="float16", verify=verify)
    convert.convert(tmp_path / "orbax", tmp_path / "back", dtype="bfloat16", verify=verify)


def test_float32_beyond_bfloat16_is_refused_too(bagel: Path, tmp_path: Path) -> None:
    with_values(bagel, DOWN, float(np.finfo(np.float32).max))
    with pytest.raises(UserError, match=rf"{DOWN}: 1 of .* do not fit bfloat16"):
        convert.convert(bagel, tmp_path / "orbax", dtype="bfloat16")


def test_adapters_that_make_infinities_are_refused(bagel: Path, tmp_path: Path) -> None:
    from .test_lora import random_adapters

    cfg = store.load_config(bagel)
    adapters = {n: x * np.float32(1e25) for n, x in random_adapters(cfg).items()}
    lora.save(tmp_path / "lora", adapters, cfg, base="b")
    with pytest.raises(UserError, match="are not finite; nothing was written"):
        convert.execute(convert.plan(bagel, tmp_path / "merged", adapters=tmp_path / "lora"))
    assert not (tmp_path / "merged").exists()


def test_verify_compares_with_the_source_and_not_with_its_cast(
    bagel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cast that is wrong (it cuts instead of rounding) would agree with itself."""
    from unichar_jax.checkpoint import writing

    def cut(x: np.ndarray, dtype=None) -> np.ndarray:
        bits = np.ascontiguousarray(x).view(np.uint32)
        return (bits >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)

    monkeypatch.setattr(writing, "materialize", cut)
    with pytest.raises(UserError, match="arrays differ from"):
        convert.convert(bagel, tmp_path / "orbax", dtype="bfloat16", verify=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_counts_and_rounding_of_every_layout(dtype) -> None:
    x = np.random.default_rng(0).standard_normal((6, 5, 3, 3)).astype(np.float32)
    y = x.astype(dtype)
    assert is_rounding(x, y) and is_rounding(x.transpose(2, 3, 1, 0), y.transpose(2, 3, 1, 0))
    assert not_finite(y.transpose(3, 1, 0, 2)) == overflowing(x, np.dtype(dtype)) == 0
    y[1, 2, 0, 0] = np.inf
    assert not_finite(y.transpose(3, 1, 0, 2)) == 1 and not is_rounding(x, y)
    y[1, 2, 0, 0] = x[1, 2, 0, 0] * 1.02
    assert not is_rounding(x, y)
    y[1, 2, 0, 0] = np.nan
    assert not_finite(y) == 1 and not is_rounding(x, y)
    assert is_rounding(np.zeros((0, 3), np.float32), np.zeros((0, 3), dtype))
    assert is_rounding(np.float32([1e-12, -3.0]), np.float32([1e-12, -3.0]).astype(dtype))
    assert is_rounding(np.array(1.5, np.float32), np.array(1.5, dtype))


# -- parts, as fine-tunes are published ---------------------------------------------------------------------


def published(
    bagel: Path, folder: Path, keep: Callable[[str], bool], prefix: str = ""
) -> dict[str, np.ndarray]:
    """A fine-tune that holds some tensors, changed, in two shards and nothing beside them; the whole it makes."""
    whole = tensors_of(bagel / "ema.safetensors")
    frozen = table.frozen_tables(store.load_config(bagel))
    part = {n: (x if n in frozen else x + np.float32(0.5)) for n, x in whole.items() if keep(n)}
    folder.mkdir()
    write_tensors(folder / "ema.safetensors", {n.removeprefix(prefix): x for n, x in part.items()})
    in_shards(folder)
    return whole | part


def of_language_model(name: str) -> bool:
    return name.startswith(table.LM_PREFIX)


LAYOUTS = {
    "full names": (lambda n: True, ""),
    "language model with prefix": (of_language_model, ""),
    "language model without prefix": (of_language_model, table.LM_PREFIX),
    "inner language model": (lambda n: of_language_model(n) and n != HEAD, f"{table.LM_PREFIX}model."),
    "without the vision tower": (lambda n: not n.startswith(("vit_model", "connector")), ""),
    "generation expert": (lambda n: "_moe_gen" in n, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["torch", "orbax", "run"])
def test_layouts_of_fine_tunes_are_read_with_a_base(
    bagel: Path, tmp_path: Path, layout: str, kind: str
) -> None:
    keep, prefix = LAYOUTS[layout]
    expected = published(bagel, tmp_path / "tuned", keep, prefix)
    base = bagel
    if kind != "torch":
        convert.convert(bagel, tmp_path / "base")
        base = tmp_path / "base"
    if kind == "run":
        base = run_of(base, tmp_path / "run")
    if layout != "full names":
        with pytest.raises(UserError, match="--base|no llm_config"):
            convert.plan(tmp_path / "tuned", tmp_path / "x")
    assert_same(converted(tmp_path / "tuned", tmp_path / "merged", base=base), expected)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def run_of(model: Path, run: Path) -> Path:
    """A run whose latest step holds the weights of a model directory."""
    from orbax.checkpoint import v1 as ocp

    from unichar_jax.models.unified import UnifiedModel

    shutil.copytree(model, run, ignore=shutil.ignore_patterns("model"))
    (run / "config.json").write_text("{}")
    cfg = store.load_config(model)
    items = {"weights": store.unstack(UnifiedModel(cfg), store.load_model(model))}
    ocp.save_checkpointables(run / "checkpoints" / "3", items)
    return run


def test_the_base_may_be_a_name_that_ships(tmp_path: Path) -> None:
    from unichar_jax.config.presets import folder_or_shipped

    mini = folder_or_shipped("mini")
    folder = tmp_path / "grpo"
    folder.mkdir()
    tensors = tensors_of(mini / "ema.safetensors")
    alone = {n.removeprefix(table.LM_PREFIX): x for n, x in tensors.items() if of_language_model(n)}
    write_tensors(folder / "model.safetensors", alone)
    assert main(["convert", str(folder), str(tmp_path / "merged"), "--base", "mini", "--verify"]) == 0
    convert.convert(tmp_path / "merged", tmp_path / "back")
    back = tensors_of(tmp_path / "back" / "ema.safetensors")
    assert all(x.tobytes() == back[n].tobytes() for n, x in tensors.items() if of_language_model(n))
    with pytest.raises(UserError, match="minni: not a directory .did you mean 'mini'"):
        convert.plan(folder, tmp_path / "x", base="minni")


def test_a_part_with_a_hole_is_damaged_and_not_filled(bagel: Path, tmp_path: Path) -> None:
    published(bagel, tmp_path / "tuned", lambda n: of_language_model(n) and n != DOWN, table.LM_PREFIX)
    with pytest.raises(UserError, match=rf"in the model, but not in the file \(1\):\n +{DOWN}"):
        convert.plan(tmp_path / "tuned", tmp_path / "x", base=bagel)
