"""The tokenizer of a model directory: special tokens, round trips, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unichar_jax.config.model import SpecialTokens, model_preset
from unichar_jax.data.tokenizer import load_tokenizer, train_tokenizer, write_debug_tokenizer
from unichar_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_debug_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder, model_preset("debug"))


def test_small_presets_ids(tokenizer):
    assert tokenizer.special == SpecialTokens(bos=1, eos=2, image_start=3, image_end=4)
    assert tokenizer.encode("<|endoftext|>") == [0]
    assert 400 < tokenizer.vocab_size <= 512


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_texts_survive_up_to_their_normal_form(tokenizer, text):
    import unicodedata

    normal = unicodedata.normalize("NFC", text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normal
    assert tokenizer.encode(normal) == ids
    assert tokenizer.encode_batch([text, "x"])[0] == ids


def test_nothing_is_added_and_special_strings_are_parsed(tokenizer):
    assert tokenizer.encode("") == []
    ids = tokenizer.encode("a<|im_end|>b")
    assert ids == [*tokenizer.encode("a"), 2, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "a<|im_end|>b"
    assert tokenizer.decode(ids, skip_special=True) == "ab"


def test_vocabulary_and_merges_alone_give_the_same_ids(folder, tokenizer, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    other = load_tokenizer(tmp_path, model_preset("debug"))
    text = "Please generate an image 12 e\u0301 <|vision_start|> of 小 cats.\n\n"
    assert other.encode(text) == tokenizer.encode(text)


def test_training_is_repeatable(folder, tmp_path):
    again = write_debug_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert again.fingerprint() == load_tokenizer(folder).fingerprint()
    other = train_tokenizer(["quite another text, another text"], 300, tmp_path / "other")
    assert other.fingerprint() != again.fingerprint()


def test_the_wrong_tokenizer_is_refused(folder, tmp_path):
    debug = model_preset("debug")
    with pytest.raises(UserError, match=r"no tokenizer; expected tokenizer\.json"):
        load_tokenizer(tmp_path)
    swapped = dataclasses.replace(debug, special_tokens=SpecialTokens(1, 2, 4, 3))
    with pytest.raises(UserError, match="is not the model's"):
        load_tokenizer(folder, swapped)
    small = dataclasses.replace(debug, decoder=dataclasses.replace(debug.decoder, vocab_size=300))
    with pytest.raises(UserError, match="vocab_size is 300"):
        load_tokenizer(folder, small)
    with pytest.raises(UserError, match="at least 261"):
        train_tokenizer([], 100, tmp_path / "new")


def test_a_tokenizer_without_the_delimiters_is_refused(folder, tmp_path):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    kept = {text: i for text, i in vocabulary.items() if not text.startswith("<|vision")}
    (tmp_path / "vocab.json").write_text(json.dumps(kept))
    (tmp_path / "merges.txt").write_bytes((folder / "merges.txt").read_bytes())
    with pytest.raises(UserError, match=r"lacks the special tokens <\|vision_start\|>"):
        load_tokenizer(tmp_path)


def test_damaged_files_are_a_users_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_importing_the_module_stays_quick():
    code = (
        "import sys, unichar_jax.data.tokenizer; "
        "sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
