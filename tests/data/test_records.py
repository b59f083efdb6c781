"""Values of another type than the format asks for: what is read as meant, and what stays an error."""

import json

import pytest

from tests.data.published import processed_rows
from unichar_jax.data.rl_prompts import read_rl_prompts
from unichar_jax.data.rolescape import read_character, scan_character
from unichar_jax.data.tasks import TASKS
from unichar_jax.records import LITERAL, Findings, Record

TESS = "train/Friends-Tess"


def _edit(folder, name, change):
    path = folder / name
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        (-2.5, "-2.5"),
        (10**20, "1" + "0" * 20),
        (True, "true"),
        (False, "false"),
        (["a", "b"], "a\nb"),
        (["born", 1990, True], "born\n1990\ntrue"),
        ("as it is ", "as it is "),
    ],
)
def test_a_scalar_or_a_list_of_them_is_a_text(value, text):
    found = Findings()
    assert Record(found, "f.json", "items[3]", {"answer": value}).text("answer") == text
    assert not found.failed and len(found.notes) == (value != text)
    for note in found.notes:
        assert (note.file, note.record, note.field) == ("f.json", "items[3]", "answer")


@pytest.mark.parametrize("value", [None, {}, {"A": 1}, [["a"]], ["a", None], [{}], [], "", float("nan")])
def test_what_is_no_text_stays_an_error_with_its_place(value):
    found = Findings()
    assert Record(found, "f.json", "items[3]", {"answer": value}).text("answer") == ""
    (error,) = (f for f in found.all if f.severity == "error")
    assert (error.file, error.record, error.field) == ("f.json", "items[3]", "answer")


@pytest.mark.parametrize("field", LITERAL)
def test_names_and_questions_are_not_guessed(field):
    found = Findings()
    Record(found, "f.json", "", {field: 1}).text(field)
    assert [f.got for f in found.all] == ["a number (1)"]


def _numbers_as_options(v):
    v["scenes"][0][1]["mcq_items"][0].update(options={"A": 1, "B": 2.5, "C": True, "D": "4"}, answer_key="A")


HABITS = [
    ("Tess_with_image.json", _numbers_as_options),
    ("Tess_with_image.json", lambda v: v["scenes"][1][1]["mcq_items"][1].update(rationale=["a", "b"])),
    ("Tess_with_image.json", lambda v: v["scenes"][0][1]["qa_pairs"][0].update(answer=7)),
    ("Tess_knowledge_qa.json", lambda v: v["qa_items"][0].update(evidence=["one", "two"], id=5)),
    ("Tess_knowledge_qa.json", lambda v: v["qa_items"][1].update(reasoning_steps="look", difficulty=2)),
    ("Tess_knowledge_qa.json", lambda v: v["qa_items"][2].update(evidence=[], reasoning_steps=[1, "b"])),
    ("Tess_knowledge_qa_test.json", lambda v: v["mcq_items"][1].update(options={"1": 1, "2": 2}, answer_key=1)),
    ("Tess_knowledge_qa_test.json", lambda v: v["mcq_items"][2].update(evidence=["one", "two"])),
    ("Tess_t2i_instruction.json", lambda v: v["t2i_instructions"][0].update(t2i_instruction=["Tess", "sits"])),
]  # fmt: skip


def test_habits_of_published_folders_are_read(tiny_root):
    folder = tiny_root / TESS
    for name, change in HABITS:
        _edit(folder, name, change)
    tess = read_character(folder)
    first = tess.scenes[0]
    assert first.mcq_items[0].options == {"A": "1", "B": "2.5", "C": "true", "D": "4"}
    assert first.qa_pairs[0].answer == "7" and tess.scenes[1].mcq_items[1].rationale == "a\nb"
    assert [q.evidence for q in tess.knowledge_qa[:3]] == ["one\ntwo", "profile", ""]
    assert (tess.knowledge_qa[0].id, tess.knowledge_qa[1].difficulty) == ("5", "2")
    assert [q.reasoning_steps for q in tess.knowledge_qa[1:3]] == [("look",), ("1", "b")]
    assert (tess.knowledge_mcq[1].options, tess.knowledge_mcq[1].answer_key) == ({"1": "1", "2": "2"}, "1")
    assert tess.knowledge_mcq[2].evidence == "one\ntwo"
    assert tess.captions[0].text == "Tess\nsits"
    told = {(n.file, n.record, n.field) for n in tess.notes if n.remedy.startswith("read as ")}
    assert ("Tess_with_image.json", "scenes[0][1].mcq_items[0].options", "A") in told
    assert ("Tess_knowledge_qa.json", "qa_items[0]", "evidence") in told
    assert all(isinstance(json.dumps(row), str) for task in TASKS for row in processed_rows(tess, task))


@pytest.mark.parametrize("dir_name", ["Bo", "Genshin-Furina"])
def test_a_habit_changes_no_processed_row(rolescape_dir, tmp_path, dir_name):
    """Answers that are numbers, written as numbers: the same rows as with the strings."""
    source = rolescape_dir / "personalized_data" / "train" / dir_name
    folder = tmp_path / "train" / dir_name
    folder.mkdir(parents=True)
    for path in source.glob("*.*"):
        if path.suffix in (".json", ".png"):
            (folder / path.name).write_bytes(path.read_bytes())
    before = read_character(source)
    name = f"{before.name}_with_image.json"

    def numbers(v):
        for _, machine in v["scenes"]:
            for item in machine["mcq_items"]:
                item["options"] = {k: int(t) if t.isdecimal() else t for k, t in item["options"].items()}
                item["options"]["E"] = 5

    _edit(folder, name, numbers)
    _edit(
        folder,
        f"{before.name}_knowledge_qa.json",
        lambda v: [item.update(evidence=item["evidence"].split("\n")) for item in v["qa_items"]],
    )
    after, _ = scan_character(folder)
    assert after is not None
    for task in TASKS:
        assert processed_rows(after, task) == processed_rows(before, task)
    assert after.knowledge_qa == before.knowledge_qa
    assert after.scenes[0].mcq_items[0].options["E"] == "5"


def test_prompts_have_the_same_habits(tmp_path):
    question = {"question": "How many?", "answer": 2, "type": "multiple_choice", "choices": [1, 2, "3"]}
    row = {"text": "Tess sits", "character": "Tess", "scene_id": 0, "vqa_questions": [question]}
    path = tmp_path / "Tess_pure_t2i_with_vqa.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (prompt,) = read_rl_prompts(path)
    assert prompt.scene_id == "0" and prompt.questions[0].answer == "2"
    assert prompt.questions[0].choices == ("1", "2", "3")
