"""The check finds everything at once, adds what only pixels show, and decides the exit code."""

import io
import json
import shutil

import pytest
from rich.console import Console

from unichar_jax.data.check import check, main_check
from unichar_jax.errors import UserError


def test_published_data_has_notes_only(rolescape_dir):
    report = check(rolescape_dir)
    assert report.ok and not report.errors
    assert len(report.folders) == 12 + 6
    noted = {note.got for note in report.notes}
    assert {"JPEG", "transparency", "CRLF", "a repeat", "'Adrien Brody'"} <= noted


def test_tiny_root(tiny_root):
    report = check(tiny_root)
    assert [part.name for part in report.folders] == ["train/Friends-Tess", "test/Friends-Tess"]
    assert report.ok
    assert report.folders[0].counts["vqa"] == 8 and report.folders[1].counts["test: t2i"] == 4


def _spoil(root):
    """Five faults of different kinds in two folders."""
    train, test = root / "train" / "Friends-Tess", root / "test" / "Friends-Tess"
    whole = (train / "0.png").read_bytes()
    (train / "0.png").write_bytes(whole[: len(whole) // 2])
    (train / "1.png").unlink()
    (train / "Tess_full_profile.txt").write_bytes(b"\xff\xfe")
    (train / "Tess_memorization_test.json").write_text("{")
    captions = json.loads((test / "Tess_t2i_instruction.json").read_text())
    captions["t2i_instructions"][0]["image_id"] = "../../train/Friends-Tess/2"
    (test / "Tess_t2i_instruction.json").write_text(json.dumps(captions))


def test_all_faults_at_once(tiny_root):
    _spoil(tiny_root)
    report = check(tiny_root)
    assert {error.file for error in report.errors} == {
        "0.png",
        "annotation.json",
        "Tess_with_image.json",
        "Tess_t2i_instruction.json",
        "Tess_full_profile.txt",
        "Tess_memorization_test.json",
    }
    assert all(error.expected and error.got and error.remedy for error in report.errors)


def test_exit_code_and_output(tiny_root):
    out = io.StringIO()
    assert main_check(tiny_root, Console(file=out, width=300)) == 0
    assert "vqa 8" in out.getvalue() and "ready to train on" in out.getvalue()
    _spoil(tiny_root)
    out = io.StringIO()
    assert main_check(tiny_root / "train" / "Friends-Tess", Console(file=out, width=300)) == 1
    assert "Tess_memorization_test.json" in out.getvalue() and "truncated" in out.getvalue()


def test_a_test_picture_that_training_sees(tiny_root):
    shutil.copy(tiny_root / "train/Friends-Tess/3.png", tiny_root / "test/Friends-Tess/1.png")
    (error,) = check(tiny_root).errors
    assert (error.file, error.got) == ("1.png", "train/3.png again")


def test_splits_that_disagree(tiny_root):
    for path in (tiny_root / "test" / "Friends-Tess").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"opening": "Other."}))
    (error,) = check(tiny_root).errors
    assert (error.field, error.file) == ("opening", "annotation.json")


def test_absent_path(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        check(tmp_path / "absent")
