"""A sample longer than a row is never packed without a word: it is named, cut, or left out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.test_loader import config, loader
from unichar_jax.config.data import DataConfig
from unichar_jax.data.tokenizer import write_debug_tokenizer
from unichar_jax.errors import UserError

KEY = "train/Friends-Tess/vlm_extension/0"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_debug_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def long_root(tiny_root):
    """Tess, who once says 65,000 characters."""
    path = tiny_root / "train" / "Friends-Tess" / "Tess_dialogue_text_extension_train.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["scenes"][0][1]["text"] = ("Once upon a time there was a shop of maps. " * 1600)[:65_000]
    path.write_text(json.dumps(value), encoding="utf-8")
    return tiny_root


def test_it_is_named_with_its_length_and_the_choices(long_root, tokenizer):
    with pytest.raises(UserError) as caught:
        loader(config(long_root), tokenizer)
    text = str(caught.value)
    assert f"{KEY} (" in text and "data.tokens_per_row 1024" in text
    assert "data.long_samples to cut" in text and "or drop" in text
    needed = int(text.partition(f"{KEY} (")[2].partition(" tokens")[0].replace(",", ""))
    assert needed > 20_000 and f"raise data.tokens_per_row to {needed}" in text


def test_dropped(long_root, tokenizer):
    without = loader(config(long_root, long_samples="drop"), tokenizer)
    assert list(without.left_out) == [KEY] and f"{KEY}: it has" in without.describe()
    assert without.capacities.total <= 1.06 * 1024


def test_cut(long_root, tokenizer):
    cut = loader(config(long_root, long_samples="cut", tasks={"vlm_extension": 1.0}), tokenizer)
    assert cut.capacities.total <= 1.06 * 1024 and not cut.left_out
    assert "cut at the end of their longest text, to 1024 tokens" in cut.describe() and KEY in cut.describe()
    (whole,) = (r for source in cut._rows.sources for r in source if r.key == KEY)
    assert whole.sizes.total == 1024
    question, reply = whole.parts
    assert reply.loss and len(question.ids) + len(reply.ids) + 4 == 1024
    start = tokenizer.encode("Once upon a time there was a shop of maps. ")
    np.testing.assert_array_equal(reply.ids[: len(start) - 1], start[:-1])
    assert (
        max((batch.text.meta.segment > 0).sum(1).max() for batch in (next(cut) for _ in range(4)))
        <= 1.06 * 1024
    )
    cut.close()


def test_a_folder_without_long_samples_has_the_same_data_with_every_choice(tiny_root, tokenizer):
    marks = {
        loader(config(tiny_root, long_samples=c), tokenizer)._fingerprint for c in ("raise", "cut", "drop")
    }
    assert len(marks) == 1


def test_pictures_alone_cannot_be_cut(tiny_root, tokenizer):
    large = {"draw_min": 128, "draw_max": 128, "tokens_per_row": 32, "tasks": {"pure_t2i": 1.0}}
    with pytest.raises(UserError, match="lower the sizes of pictures"):
        loader(config(tiny_root, long_samples="cut", **large), tokenizer)


def test_the_choice_is_one_of_three():
    with pytest.raises(UserError, match="expected raise, cut or drop"):
        DataConfig(long_samples="trim")
