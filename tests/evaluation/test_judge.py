"""The judge's folder: what its configuration must say, and what texts state by it."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.conftest import REPOSITORY
from unichar_jax.errors import UserError
from unichar_jax.evaluation.attributes import Attribute, stated, voice_of
from unichar_jax.evaluation.judge import load_judge

SHIPPED = REPOSITORY / "checkpoints" / "mini" / "judge"


def changed(folder, change):
    shutil.copytree(SHIPPED, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.update(model_type="dinov2"), "expected model_type 'attribute_judge', got 'dinov2'"),
        (lambda c: c.pop("attributes"), "attributes: expected names with their values"),
        (lambda c: c["attributes"]["pose"].update(said="(stand"), "said: expected a regular expression"),
        (lambda c: c["attributes"]["pose"].update(values=[]), "values: expected names of classes"),
        (lambda c: c["attributes"]["pose"].update(fixed="yes"), "fixed: expected true or false"),
        (lambda c: c["attributes"]["time"]["values"].pop(), "not the weights of this judge"),
        (lambda c: c["attributes"].pop("time"), "not the weights of this judge"),
        (lambda c: c.pop("preprocess"), "preprocess: expected resize"),
        (lambda c: c.update(widths=[0]), "widths: expected a list of whole numbers"),
        (lambda c: c.pop("image_size"), "image_size: expected a whole number"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, change, why):
    with pytest.raises(UserError, match=why):
        load_judge(changed(tmp_path / "judge", change))


def test_a_judge_without_weights_is_refused(tmp_path):
    (changed(tmp_path / "judge", lambda c: None) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_judge(tmp_path / "judge")


MOOD = {
    "mood": Attribute(
        ("glad", "sad"), r"\b(?:(glad|sad)|(merry)|is (down))\b", {"merry": "glad", "down": "sad"}
    ),
    "size": Attribute(("big", "small"), r"\b(big|small)\b", fixed=True),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A MERRY, big day", {"mood": "glad", "size": "big"}),
        ("merry and glad", {"mood": "glad"}),
        ("she is down", {"mood": "sad"}),
        ("glad or sad, small", {"size": "small"}),
        ("sadness", {}),
        ("", {}),
    ],
)
def test_texts_state_attributes(text, expected):
    assert stated(text, MOOD) == expected


def test_a_voice_is_known_by_most_of_its_phrases():
    voices = {"one": ("Ho!", "Hey."), "two": ("Hum",)}
    assert voice_of("Ho! Hum Hey.", voices) == "one"
    assert voice_of("Hum", voices) == "two"
    assert voice_of("hum", voices) is None
    assert voice_of("Hum", {}) is None
