"""Metrics and rewards of the shipped pictures are what they were when they were first written down.

The numbers of ``golden_mini.json`` are those of commit 68e102f, when code held what the folders of the scorers and the
judge now say. Shares of attributes and of words are equal; cosines may differ by the rounding of another machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from unichar_jax.config.model import model_preset
from unichar_jax.data.transforms import Transforms
from unichar_jax.evaluation import pictures
from unichar_jax.evaluation.attributes import stated, voice_of
from unichar_jax.evaluation.instruments import find_instruments
from unichar_jax.evaluation.items import Item, read_case
from unichar_jax.evaluation.outputs import Output
from unichar_jax.evaluation.subject import Prompt
from unichar_jax.evaluation.suite import Plan, originals
from unichar_jax.scoring.base import References, ScoreContext
from unichar_jax.scoring.registry import Sources, build

MINI = REPOSITORY / "checkpoints" / "mini"
DATA = MINI / "cast" / "personalized_data"
GOLDEN = json.loads(Path(__file__).with_name("golden_mini.json").read_text("utf-8"))
COUNTED = ("words", "catchphrase", "voice", "copied", "identity", "prompt_following", "consistency")


@pytest.fixture(scope="module")
def instruments():
    return find_instruments(MINI)


def same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        exact = name in COUNTED
        assert found[name] == pytest.approx(
            value, rel=1e-6 if exact else 1e-4, abs=1e-6 if exact else 5e-5
        ), name


def photo(name, part, number):
    return Image.open(DATA / part / name / f"{number}.png").convert("RGB")


def shown():
    """Three held-out pictures of each of two characters, uint8 ``[6, 96, 96, 3]``."""
    return np.stack([np.asarray(photo(name, "test", i)) for name in ("Pip", "Luna") for i in range(3)])


def test_held_out_replies_and_pictures(instruments):
    case = read_case(DATA / "train" / "Pip")
    found = originals([case], Plan(("dialogue", "t2i", "scene_t2i", "t2t2i")), instruments)
    assert [[r.task, r.item] for r in found.records] == [one[:2] for one in GOLDEN["originals"]]
    for record, (_, _, expected) in zip(found.records, GOLDEN["originals"], strict=True):
        same(record.metrics, expected)


def test_pictures_of_groups(instruments):
    text = "A sad fox is sitting at the castle by day; its belly is pink."
    outputs = []
    for seed, (key, number) in enumerate([("a", 0), ("a", 1), ("a", 2), ("b", 3), ("b", 4)]):
        item = Item("t2i", key, "Pip", Prompt("x"), "Pip is waving in the snow.")
        picture = str(DATA / "test" / "Pip" / f"{number}.png")
        outputs.append(Output(item, seed, {"picture": picture, "text": text}))
    found = pictures.measure(read_case(DATA / "train" / "Pip"), outputs, instruments)
    for metrics, expected in zip(found, GOLDEN["groups"], strict=True):
        same(metrics, expected)


def test_readings_of_the_judge(instruments):
    found = instruments.judge.read(shown())
    assert list(found) == list(GOLDEN["readings"])
    for name, expected in GOLDEN["readings"].items():
        np.testing.assert_allclose(found[name], expected, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("term", GOLDEN["rewards"])
def test_rewards(term):
    name, brace, options = term.partition("{")
    sources = Sources(MINI, None, Transforms.usual(model_preset("mini")).look)
    references = References.of(photo("Pip", "train", i) for i in range(4))
    texts = [
        "Pip is waving on the beach at night, happy.",
        "A striped purple cat with a pink belly.",
        "xyzzy quux 12, Hello!",
    ]
    context = ScoreContext(texts * 2, np.array([0, 0, 0, 1, 1, 2]), references)
    scorer = build(name, json.loads(brace + options), sources)
    found = scorer(jnp.asarray(shown(), jnp.float32) / 255, context)
    np.testing.assert_allclose(found, GOLDEN["rewards"][term], atol=1e-4)


def test_texts(instruments):
    for text, attributes, voice in GOLDEN["texts"]:
        assert stated(text, instruments.judge.attributes) == attributes, text
        assert voice_of(text, instruments.voices) == voice, text
