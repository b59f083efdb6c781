"""``unichar chat`` and ``ask`` with one base and adapters around it, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from unichar_jax.app import engines
from unichar_jax.checkpoint import lora, store
from unichar_jax.cli.inline import inline
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
    store.write_bagel(
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


def test_ask_takes_the_picture_before_the_question(home: Path, tmp_path: Path, capsys) -> None:
    picture, base = tmp_path / "red.png", str(home / "base")
    Image.new("RGB", (20, 20), "red").save(picture)
    short = ["--max-tokens", "4"]
    assert main(["ask", base, str(picture), "what ?", *short]) == 0
    said = capsys.readouterr().out
    assert main(["ask", base, "what ?", "--image", str(picture), *short]) == 0
    assert capsys.readouterr().out == said
    assert main(["ask", base, str(picture), "what ?", "--image", str(picture), *short]) == 1
    assert "ask RUN [IMAGE] QUESTION" in capsys.readouterr().err
    assert main(["ask", base, str(tmp_path / "absent.png"), "what ?", *short]) == 1
    assert "absent.png" in capsys.readouterr().err


def test_a_mistake_does_not_end_the_conversation(home: Path, monkeypatch, capsys) -> None:
    typed(monkeypatch, "/undo", "\ud800", "hi", "/undo", "")
    chat = [
        "chat",
        str(home / "base"),
        "--description",
        "a calm circle",
        "--no-pictures",
        "--max-tokens",
        "4",
    ]
    assert main(chat) == 0
    printed = capsys.readouterr().out
    for expected in ("nothing was said yet", "not valid Unicode", "taken back"):
        assert expected in printed
    assert "transcript" not in printed


def test_a_picture_is_two_pixels_to_a_character() -> None:
    picture = Image.new("RGB", (2, 4), "red")
    picture.paste((0, 0, 255), (0, 1, 2, 2))
    shown = inline(picture)
    assert shown.plain == "▀▀\n▀▀\n"
    first, last = shown.spans[0].style, shown.spans[-1].style
    assert (str(first), str(last)) == ("#ff0000 on #0000ff", "#ff0000 on #ff0000")
    assert inline(Image.new("LA", (1000, 500)), 10).plain == ("▀" * 10 + "\n") * 2
