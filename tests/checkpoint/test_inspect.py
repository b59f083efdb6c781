"""``inspect`` counts what is there; ``diff`` finds what is not the same, whatever the kind of directory."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from unichar_jax.checkpoint import arrays, convert, inspect, store, table
from unichar_jax.cli.main import main

from .conftest import tensors_of, write_tensors


@pytest.fixture
def orbax(bagel: Path, tmp_path: Path) -> Path:
    convert.convert(bagel, tmp_path / "orbax")
    return tmp_path / "orbax"


def test_both_kinds_are_described_alike(bagel: Path, orbax: Path) -> None:
    left, right = inspect.inspect(bagel), inspect.inspect(orbax)
    assert left.cfg == right.cfg == store.load_config(bagel)
    assert left.parameters == right.parameters
    describe = [[(r.name, r.torch, r.info.shape, r.info.dtype) for r in x.rows] for x in (left, right)]
    assert describe[0] == describe[1]
    stored = tensors_of(bagel / "ema.safetensors")
    frozen = table.frozen_tables(left.cfg)
    total = sum(x.size for n, x in stored.items() if n not in frozen)
    total += sum(x.size for x in tensors_of(bagel / "ae.safetensors").values())
    assert sum(left.parameters.values()) == total


def test_parts_are_counted_under_their_names(bagel: Path) -> None:
    found, stored = inspect.inspect(bagel).parameters, tensors_of(bagel / "ema.safetensors")
    size = {n: x.size for n, x in stored.items()}

    def of(*parts: str) -> int:
        return sum(s for n, s in size.items() if any(p in n for p in parts))

    decoder = {n: s for n, s in size.items() if ".layers." in n or ".model.norm" in n}
    decoder = {n: s for n, s in decoder.items() if n.startswith("language_model.")}
    gen = sum(s for n, s in decoder.items() if "moe_gen" in n)
    assert found["decoder, generation expert"] == gen
    assert found["decoder, understanding expert"] == sum(decoder.values()) - gen
    assert found["vision tower"] == of("vit_model.")
    assert found["connector"] == of("connector.")
    assert found["text embedding"] == of("embed_tokens")
    assert found["text head"] == of("lm_head")
    assert found["latent input, head and time"] == of("time_embedder", "vae2llm", "llm2vae")


def test_conversion_makes_no_difference(bagel: Path, orbax: Path) -> None:
    assert list(inspect.diff(bagel, orbax)) == []
    assert list(inspect.diff(orbax, bagel)) == []


def test_diff_says_which_and_by_how_much(bagel: Path, orbax: Path) -> None:
    tensors = tensors_of(bagel / "ema.safetensors")
    before = tensors["connector.fc1.weight"].copy()
    tensors["connector.fc1.weight"][1, 2] += 0.5
    write_tensors(bagel / "ema.safetensors", tensors)
    (found,) = inspect.diff(orbax, bagel)
    assert found.name == "connector.fc1.kernel"
    assert found.max_abs == pytest.approx(0.5, rel=1e-6)
    assert found.rel_l2 == pytest.approx(0.5 / np.linalg.norm(before), rel=1e-5)


def test_diff_names_what_only_one_side_has(bagel: Path, orbax: Path) -> None:
    (bagel / "ae.safetensors").unlink()
    (found,) = inspect.diff(bagel, orbax)
    assert (found.name, found.note) == ("autoencoder", f"only in {orbax}")


def test_compare_works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_BLOCK_ELEMENTS", 12)
    x = np.random.default_rng(0).standard_normal((10, 5), np.float32)
    y = x.copy()
    y[3, 1] -= 0.25
    y[9, 4] += 2
    found = inspect.compare("x", x.T, y.T)
    assert found is not None
    assert found.max_abs == pytest.approx(2, rel=1e-6)
    assert found.rel_l2 == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-6)
    assert inspect.compare("x", x, x.copy()) is None


def test_compare_of_dtypes_and_special_values() -> None:
    x = np.array([1.0, np.inf, -0.0], np.float32)
    assert inspect.compare("x", x, x.astype(ml_dtypes.bfloat16)) is None
    found = inspect.compare("x", x, np.array([1.0, np.nan, 0.0], np.float32))
    assert found is not None
    assert np.isnan(found.max_abs)
    scalar = inspect.compare("x", np.array(2.0, np.float32), np.array(3.0, np.float32))
    assert scalar is not None
    assert (scalar.max_abs, scalar.rel_l2) == (1.0, 0.5)


def test_commands(bagel: Path, orbax: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(orbax)]) == 0
    printed = capsys.readouterr().out
    assert "vision tower" in printed
    assert "hidden_size" in printed
    assert main(["diff", str(bagel), str(orbax)]) == 0
    assert "no array differs" in capsys.readouterr().out
    tensors = tensors_of(bagel / "ema.safetensors")
    tensors["llm2vae.bias"] += 1
    write_tensors(bagel / "ema.safetensors", tensors)
    assert main(["diff", str(bagel), str(orbax)]) == 1
    assert "latent_out.bias" in capsys.readouterr().out
