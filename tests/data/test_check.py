"""The check finds everything at once, adds what only pixels show, and decides the exit code."""

import io
import json
import random
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from unichar_jax.data.check import check, main_check
from unichar_jax.errors import UserError

TRAIN = "train/Friends-Tess"


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


def test_the_report_shows_whole_names_and_notes_of_a_kind_together(tiny_root):
    for i in range(4):
        shutil.copy(tiny_root / TRAIN / "0.png", tiny_root / TRAIN / f"picture {i}.jpeg")
    out = io.StringIO()
    assert main_check(tiny_root / TRAIN, Console(file=out, width=40)) == 0
    (line,) = (line for line in out.getvalue().splitlines() if "jpeg" in line)
    assert line.startswith("  note  picture 0.jpeg, picture 1.jpeg, picture 2.jpeg, picture 3.jpeg: expected")


ODD = (
    None,
    True,
    -1.5,
    [],
    {},
    "",
    "\x1b[31m",
    "\ud800",
    "../x",
    "a\0b",
    [[]],
    {"a\nb": 1},
    float("nan"),
    10**400,
)


def _damage(value, rng):
    """The value with one thing in it replaced, renamed, dropped or said twice."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key, value = rng.choice(list(value)), dict(value)
        inner = value.pop(key)
        name = rng.choice([key] * 9 + ["\x1b]0;x", "x\ny", "\ud800", key + "x", ""])
        return value if rng.random() < 0.1 else value | {name: _damage(inner, rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        return [*value[:i], _damage(value[i], rng), *value[i + rng.randint(0, 1) :]]
    return rng.choice(ODD)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_any_damage_gives_a_printable_report(tiny_root, seed):
    rng = random.Random(seed)
    path = rng.choice(sorted(p for p in tiny_root.rglob("*") if p.is_file()))
    before = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        damaged = json.dumps(_damage(json.loads(before), rng)).encode()
    else:
        at = rng.randrange(len(before))
        damaged = before[:at] + bytes([rng.randrange(256)]) + before[at + 1 :][: rng.choice([5, 10**9])]
    path.write_bytes(damaged)
    out = io.StringIO()
    files = {p: p.stat().st_mtime_ns for p in tiny_root.rglob("*")}
    try:
        assert main_check(tiny_root, Console(file=out, width=80)) in (0, 1)
        assert files == {p: p.stat().st_mtime_ns for p in tiny_root.rglob("*")}
    finally:
        path.write_bytes(before)
    assert all(line.isprintable() for line in out.getvalue().split("\n"))


def test_a_test_picture_that_training_sees(tiny_root):
    shutil.copy(tiny_root / "train/Friends-Tess/3.png", tiny_root / "test/Friends-Tess/1.png")
    (error,) = check(tiny_root).errors
    assert (error.file, error.got) == ("1.png", "train/3.png again")


def test_splits_that_disagree(tiny_root):
    for path in (tiny_root / "test" / "Friends-Tess").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"opening": "Other."}))
    (error,) = check(tiny_root).errors
    assert (error.field, error.file) == ("opening", "annotation.json")


def test_a_folder_of_folders(tiny_root):
    report = check(tiny_root / "train")
    assert [part.name for part in report.folders] == ["train/Friends-Tess"] and report.ok
    folder = tiny_root / "personalized_t2i" / "Tess"
    folder.mkdir(parents=True)
    (folder / "Tess_pure_t2i_with_vqa.jsonl").write_text('{"text": "Tess", "scene_id": "0"}')
    (prompts,) = check(folder.parent).folders
    assert prompts.counts == {"rl prompts": 1, "rl questions": 0}
    with pytest.raises(UserError, match="one file cannot be checked alone"):
        check(tiny_root / TRAIN / "0.png")


def test_absent_path(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        check(tmp_path / "absent")
