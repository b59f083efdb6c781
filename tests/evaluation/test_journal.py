"""Values in a file of lines come back, whatever texts they hold."""

import json

import pytest

from unichar_jax.files import Journal, read_journal


@pytest.mark.parametrize("text", ["two\nlines", "apart\u2028here\x85", "half \ud800", "名前"])
def test_any_text_comes_back(tmp_path, text):
    path = tmp_path / "answers.jsonl"
    Journal(path, "answer").add("a", text, more=text)
    assert Journal(path, "answer").known == {"a": text}


def test_lines_that_were_written_with_any_letters_are_read(tmp_path):
    path = tmp_path / "outputs.jsonl"
    told = {"key": "a", "output": {"text": "apart\u2028here"}}
    path.write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_journal(path, "output") == {"a": told["output"]}
