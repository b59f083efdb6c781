"""The reader: the real folders, each irregularity as a note, each fault as its own error, fuzz."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import draw_picture
from unichar_jax.data import rolescape
from unichar_jax.errors import UserError
from unichar_jax.records import DataError

TESS = "train/Friends-Tess"

# Images and dialogues, visual questions, image and knowledge MCQ, from the published table.
REAL = {
    "Adrien Brody": ("Adrien Brody", 12, 192, 240, 60, 20, 20),
    "Bo": ("Bo", 12, 192, 239, 60, 20, 16),
    "Genshin-Furina": ("Furina", 9, 189, 180, 45, 20, 20),
    "Mahjong Soul-Ichihime": ("Ichihime", 10, 190, 199, 50, 19, 17),
    "Mahjong Soul-YuiYagi": ("YuiYagi", 7, 187, 140, 35, 19, 17),
    "Pokemon-Pikachu": ("Pikachu", 7, 187, 139, 35, 18, 16),
}


@pytest.mark.parametrize("dir_name", REAL)
def test_published_counts(rolescape_dir, dir_name):
    root = rolescape_dir / "personalized_data"
    character = rolescape.read_character(root / "train" / dir_name)
    assert REAL[dir_name] == (
        character.name,
        len(character.images),
        len(character.extension_train),
        sum(len(scene.qa_pairs) for scene in character.scenes),
        sum(len(scene.mcq_items) for scene in character.scenes),
        len(character.memorization),
        len(character.personality),
    )
    assert len(character.scenes) == len(character.captions) == len(character.images)
    assert (len(character.knowledge_qa), len(character.knowledge_mcq)) == (100, 10)
    held_out = rolescape.read_character(root / "test" / dir_name)
    assert held_out.split == "test" and held_out.description == character.description


def test_published_irregularities_are_notes(rolescape_dir):
    seen = set()
    for folder in rolescape.find_characters(rolescape_dir):
        for note in rolescape.read_character(folder).notes:
            seen.add((note.expected, note.file.split("_")[-1] if "_" in note.file else note.file))
    for expected in (
        ("PNG content", "0.png"),
        ("line ends LF", "annotation.json"),
        ("the key 'reasoning_steps'", "qa.json"),
        ("dialogues without pictures", "train.json"),
        ("questions without quotation marks", "test.json"),
        ("no such file", "Store"),
    ):
        assert expected in seen


def test_the_corrupted_key_is_read_as_meant(rolescape_dir):
    root = rolescape_dir / "personalized_data"
    furina = rolescape.read_character(root / "train" / "Genshin-Furina")
    assert furina.knowledge_qa[75].id == "qa_076"
    assert furina.knowledge_qa[75].reasoning_steps


def test_tiny_character(tiny_root):
    tess = rolescape.read_character(tiny_root / TESS)
    assert (tess.name, tess.dir_name, tess.split) == ("Tess", "Friends-Tess", "train")
    assert tess.scenes[2].reply == "At 2 I roll “gently”."
    assert (tess.scenes[1].image.width, tess.scenes[1].image.mode) == (40, "RGBA")
    assert tess.personality == ("Who?", 'Say "no" now')
    assert [folder.parent.name for folder in rolescape.find_characters(tiny_root)] == [
        "train",
        "test",
    ]
    assert rolescape.find_characters(tiny_root.parent) == rolescape.find_characters(tiny_root)


def test_a_new_character_needs_little(tiny_root, tmp_path):
    folder = tmp_path / "Friends-Nova"
    folder.mkdir()
    shutil.copy(tiny_root / TESS / "0.png", folder)
    (folder / "annotation.json").write_text('{"description": "Nova.", "scenes": []}')
    nova = rolescape.read_character(folder)
    assert (nova.name, nova.opening, nova.scenes, len(nova.images)) == ("Nova", "", (), 1)


def _edit(root, name, change):
    path = root / TESS / name
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def _errors(root):
    with pytest.raises(DataError) as caught:
        rolescape.read_character(root / TESS)
    return caught.value.findings


@pytest.mark.parametrize(
    ("name", "change", "field", "got"),
    [
        (
            "Tess_knowledge_qa.json",
            lambda v: v["qa_items"][1].update(id="qa_000"),
            "qa_items.id",
            "'qa_000' 2 times",
        ),
        (
            "Tess_knowledge_qa.json",
            lambda v: v["qa_items"][1].pop("answer"),
            "answer",
            "nothing",
        ),
        (
            "Tess_knowledge_qa.json",
            lambda v: v["qa_items"][0].update(confidence=float("nan")),
            "confidence",
            "nan",
        ),
        (
            "Tess_t2i_instruction.json",
            lambda v: v["t2i_instructions"][1].update(image_id="0"),
            "image_id",
            "'0' again",
        ),
        (
            "Tess_t2i_instruction.json",
            lambda v: v["t2i_instructions"][1].update(image_id=1),
            "image_id",
            "a number (1)",
        ),
        (
            "Tess_with_image.json",
            lambda v: v["scenes"][0][1].update(image="../../train/Friends-Tess/0"),
            "image",
            "'../../train/Friends-Tess/0'",
        ),
        (
            "Tess_with_image.json",
            lambda v: v["scenes"][0][1].update(image="/etc/passwd"),
            "image",
            "'/etc/passwd'",
        ),
        (
            "Tess_with_image.json",
            lambda v: v["scenes"][0][1]["mcq_items"][0].update(answer_key="E"),
            "answer_key",
            "'E'",
        ),
        (
            "Tess_dialogue_text_extension_train.json",
            lambda v: v["scenes"][1].pop(),
            "",
            "1 turns",
        ),
        (
            "Tess_dialogue_text_extension_train.json",
            lambda v: v["scenes"][1][0].update(role="machine"),
            "role",
            "'machine'",
        ),
        (
            "Tess_memorization_test.json",
            lambda v: v.update(test_questions=[1]),
            "test_questions[0]",
            "a number (1)",
        ),
        (
            "Tess_memorization_test.json",
            lambda v: v.update(test_questions="Who?"),
            "test_questions",
            "a string",
        ),
        (
            "Tess_memorization_test.json",
            lambda v: v.update(description="Another."),
            "description",
            "'Another.'",
        ),
        (
            "Tess_memorization_test.json",
            lambda v: v.update(test_questions=["\ud800"]),
            "test_questions[0]",
            "half a character in '\\ud800'",
        ),
    ],
)
def test_each_fault_is_named_once(tiny_root, name, change, field, got):
    _edit(tiny_root, name, change)
    (error,) = _errors(tiny_root)
    assert (error.file, error.field, error.got) == (name, field, got)
    assert error.expected and error.remedy and name in str(error)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b'{"description": "caf\xe9"}', "byte 0xe9 at 20"),
        (b'{"description": ', "Expecting value at line 1, column 17"),
        (b"[" * 100_000, "recursion"),
        (b'{"n": ' + b"9" * 5000 + b"}", "integer"),
        (b"[1]", "a list"),
    ],
)
def test_broken_json(tiny_root, content, got):
    (tiny_root / TESS / "Tess_memorization_test.json").write_bytes(content)
    (error,) = _errors(tiny_root)
    assert error.file == "Tess_memorization_test.json" and got in error.got


def test_faults_are_reported_together(tiny_root):
    folder = tiny_root / TESS
    (folder / "0.png").unlink()
    (folder / "1.png").write_text("no picture")
    _edit(tiny_root, "Tess_knowledge_qa.json", lambda v: v.update(qa_items=None))
    files = {error.file for error in _errors(tiny_root)}
    assert files >= {"1.png", "annotation.json", "Tess_with_image.json", "Tess_knowledge_qa.json"}


def test_scenes_that_lack_an_annotation_are_named(tiny_root):
    _edit(tiny_root, "Tess_with_image.json", lambda v: v["scenes"][2][1].pop("thinking_process"))
    (note,) = (n for n in rolescape.read_character(tiny_root / TESS).notes if n.field == "thinking_process")
    assert note.got == "none for 2.png"


def test_a_file_that_cannot_be_read(tiny_root, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    errors = _errors(tiny_root)
    assert {error.got for error in errors} == {"Permission denied"}


def test_contradicting_scene_files(tiny_root):
    _edit(tiny_root, "annotation.json", lambda v: v["scenes"][0][0].update(text="Else?"))
    tess = rolescape.read_character(tiny_root / TESS)
    assert tess.scenes[0].user == "What do you do at 0 o'clock?"
    assert any("Tess_with_image.json" in note.expected for note in tess.notes)


def test_nothing_outside_the_folder_is_read(tiny_root, tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text('{"description": "stolen"}')
    target = tiny_root / TESS / "Tess_personality_test.json"
    target.unlink()
    os.symlink(outside, target)
    shutil.copy(tiny_root / TESS / "0.png", tmp_path / "outside.png")
    (tiny_root / TESS / "0.png").unlink()
    os.symlink(tmp_path / "outside.png", tiny_root / TESS / "0.png")
    errors = _errors(tiny_root)
    assert {"0.png", "Tess_personality_test.json"} <= {error.file for error in errors}
    assert "stolen" not in "".join(map(str, errors))


def test_a_relative_path(tiny_root, monkeypatch):
    monkeypatch.chdir(tiny_root / TESS)
    assert rolescape.read_character(Path()).dir_name == "Friends-Tess"


def test_empty_and_absent_folders(tmp_path):
    empty = tmp_path / "Nobody"
    empty.mkdir()
    with pytest.raises(DataError, match="an empty character; start it with: unichar data new"):
        rolescape.read_character(empty)
    draw_picture(empty / "0.png", 1)
    with pytest.raises(DataError, match="description"):
        rolescape.read_character(empty)
    with pytest.raises(DataError, match="no such folder"):
        rolescape.read_character(tmp_path / "absent")
    with pytest.raises(UserError, match="unichar data new"):
        rolescape.find_characters(tmp_path / "absent")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["description", "scenes", "role", "text", "image", "qa_pairs", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(
        [
            "annotation.json",
            "Tess_with_image.json",
            "Tess_knowledge_qa.json",
            "Tess_full_profile.txt",
        ]
    ),
    content=st.one_of(
        st.binary(max_size=60),
        _JSON.map(lambda value: json.dumps(value).encode()),
        _JSON.map(
            lambda value: json.dumps(
                {"description": "Tess is a blue circle — calm, round.", "scenes": value}
            ).encode()
        ),
    ),
)
def test_any_content_gives_a_character_or_findings(tiny_root, name, content):
    path = tiny_root / TESS / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        character, findings = rolescape.scan_character(tiny_root / TESS)
    finally:
        path.write_bytes(before)
    assert (character is None) == any(finding.severity == "error" for finding in findings)
    assert all(str(finding).isprintable() for finding in findings)
