"""Who can be met in the web demo: the characters of runs, and of adapters around one base."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("starlette", reason="the web demo needs the serve extra")
pytest.importorskip("uvicorn", reason="the web demo needs the serve extra")

from tests.app.web import Puppet
from unichar_jax.app.web import guests as web_guests
from unichar_jax.checkpoint import lora
from unichar_jax.errors import UserError


def test_guests_of_runs(tiny_root, tmp_path, monkeypatch):
    monkeypatch.setattr(web_guests.engines, "flow_settings", lambda steps, guidance, run: (steps, run.name))
    loaded = []

    def load(path, loras=None):
        loaded.append((path, loras))
        return Puppet()

    folder = tiny_root / "train" / "Friends-Tess"
    one, two = tmp_path / "one", tmp_path / "two"
    found = web_guests.invite([one, two], [folder], load=load)
    assert [(g.id, g.run) for g in found] == [("tess", "one"), ("tess-2", "two")]
    assert found[0].persona.opening == "Hello, I roll."
    assert [len(g.pictures) for g in found] == [4, 4]
    assert found[0].pictures[1][1] == "Tess, number 1"
    assert found[0].greetings[0] == "What do you do at 0 o'clock?"
    assert found[1].drawing(5, 1.0) == (5, "two")
    with pytest.raises(UserError, match="--character FOLDER"):
        web_guests.invite([tmp_path], load=load)
    assert loaded == [(one, None), (two, None)]


def test_guests_around_one_base(tmp_path):
    """Adapters that carry their character's words, and are met without its pictures."""
    folders = {}
    for name in ("pip", "luna"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        who = {"name": name.title(), "description": "A friend.", "opening": "Ahoy!"}
        (folders[name] / lora.CHARACTER_FILE).write_text(json.dumps(who))
    loaded = []

    def load(path, loras=None):
        loaded.append((path, loras))
        return Puppet()

    found = web_guests.invite([tmp_path], loras=folders, load=load)
    assert [(g.id, g.model, g.persona.opening, g.pictures) for g in found] == [
        ("pip", "pip", "Ahoy!", ()),
        ("luna", "luna", "Ahoy!", ()),
    ]
    assert found[0].engine is found[1].engine
    assert loaded == [(tmp_path, folders)]
    with pytest.raises(UserError, match="one run"):
        web_guests.invite([tmp_path, folders["pip"]], loras=folders, load=load)
    (folders["pip"] / lora.CHARACTER_FILE).unlink()
    with pytest.raises(UserError, match="do not say which character"):
        web_guests.invite([tmp_path], loras=folders, load=load)
