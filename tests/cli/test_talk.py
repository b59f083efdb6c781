"""``unichar chat`` and ``ask`` with one base and adapters around it, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from unichar_jax.app import engines
from unichar_jax.checkpoint import lora, store
from unichar_jax.cli.main import main
from unichar_jax.config.model import model_preset
from unichar_jax.data.tokenizer import write_debug_tokenizer
from unichar_jax.errors import UserError
from unichar_jax.models import lora as model_lora
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.unified import UnifiedModel

CFG = model_preset("debug")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base and two characters around it: ``ann`` says who she is, ``bob`` does not."""
    folder = tmp_path_factory.mktemp("home")
    write_debug_tokenizer(folder / "tokenizer")
    store.save_model(
        folder / "base",
        params.initialize(UnifiedModel(CFG), 0),
        CFG,
        params.initialize(Autoencoder(CFG.autoencoder), 0),
        tokenizer_files_from=folder / "tokenizer",
    )
    declared = model_lora.declare(UnifiedModel(CFG), {"und.q": 2, "gen.v": 2})
    shapes = {n: s.shape for n, s in store.flat_abstract(declared).items() if "lora_" in n}
    for seed, name in enumerate(("ann", "bob")):
        rng = np.random.default_rng(seed)
        adapters = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
        who = {"name": "Ann", "description": "a calm circle", "opening": "Hello, I roll."}
        lora.save(folder / name, adapters, CFG, base="base", character=who if name == "ann" else None)
    return folder


def typed(monkeypatch, *lines: str) -> None:
    script: Iterator[str] = iter(lines)
    monkeypatch.setattr(Console, "input", lambda *_, **__: next(script))


def test_chat_goes_from_character_to_character(home: Path, tiny_root: Path, monkeypatch, capsys) -> None:
    ann, bob, out = home / "ann", home / "bob", home / "ann-transcript"
    typed(monkeypatch, "hi", "/play nobody", "/play bob", "hi", "/play ann", "hi again", "")
    person = str(tiny_root / "train" / "Friends-Tess")
    (bob / lora.CHARACTER_FILE).write_text(json.dumps({"name": "Bob", "description": "b", "opening": "Yo."}))
    arguments = [
        "chat",
        str(home / "base"),
        "--lora",
        str(ann),
        str(bob),
        "--no-pictures",
        "--max-tokens",
        "8",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Ann: Hello, I roll." in printed
    assert "Bob: Yo." in printed
    assert "'nobody' is not here; /play one of ann, bob" in printed
    assert [t["user"] for t in json.loads((out / "transcript.json").read_text())["turns"]] == [
        "hi",
        "hi again",
    ]
    (bob / lora.CHARACTER_FILE).unlink()
    # One character may be told who it is; several cannot be one.
    typed(monkeypatch, "")
    assert main(["chat", str(home / "base"), "--lora", str(bob), "--character", person]) == 0
    assert "Tess: Hello, I roll." in capsys.readouterr().out
    assert main([*arguments, "--description", "x"]) == 1
    assert "are for one character" in capsys.readouterr().err
    assert main(["chat", str(home / "base"), "--lora", str(bob)]) == 1
    assert "no character is known" in capsys.readouterr().err


def test_ask_takes_adapters(home: Path, capsys) -> None:
    said = []
    for extra in ([], ["--lora", str(home / "ann")], ["--lora", str(home / "bob")]):
        assert main(["ask", str(home / "base"), "who are you ?", "--max-tokens", "8", *extra]) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 3
    assert main(["ask", str(home / "base"), "who ?", "--lora", f"tess={home / 'base'}"]) == 1
    assert "no adapter_config.json here" in capsys.readouterr().err


def test_names_of_adapters(tmp_path: Path) -> None:
    folders = [tmp_path / "runs" / "tess" / "lora", tmp_path / "ann", Path(f"bob={tmp_path / 'ann'}")]
    assert engines.lora_names(folders) == {
        "tess": folders[0],
        "ann": folders[1],
        "bob": tmp_path / "ann",
    }
    with pytest.raises(UserError, match="the name 'ann' is taken"):
        engines.lora_names([tmp_path / "ann", tmp_path / "x" / "ann"])
    with pytest.raises(UserError, match="the name 'base' is taken"):
        engines.lora_names([tmp_path / "base"])
