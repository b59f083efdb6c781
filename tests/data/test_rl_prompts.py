"""RL prompts: published counts, repeats merged, faults named."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unichar_jax.data import rl_prompts
from unichar_jax.records import DataError

# Prompts in the file and distinct ones, from the published table.
REAL = {"Adrien_Brody": (32, 30), "Bo": (41, 41), "Furina": (41, 39), "YuiYagi": (30, 30)}


@pytest.mark.parametrize("name", REAL)
def test_published_prompts(rolescape_dir, name):
    prompts = rl_prompts.read_rl_prompts(rolescape_dir / "personalized_t2i" / name)
    assert (sum(prompt.count for prompt in prompts), len(prompts)) == REAL[name]
    for prompt in prompts:
        asked = [question.question for question in prompt.questions]
        assert len(asked) == len(set(asked)) > 0


def test_contradictions_keep_the_answer_that_is_not_negative(rolescape_dir):
    prompts = rl_prompts.read_rl_prompts(rolescape_dir / "personalized_t2i" / "Bo")
    (leaf,) = [q for p in prompts for q in p.questions if "lying on the leaf" in q.question]
    assert (leaf.answer, leaf.is_negative) == ("lying", False)


def _question(text="Is it blue?", answer="yes", **more):
    return {"question": text, "answer": answer, "type": "yes_no", "weight": 1.0, **more}


def _write(folder, *rows):
    path = folder / "Tess_pure_t2i_with_vqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_repeats_are_merged(tmp_path):
    row = {"text": "Tess", "scene_id": "0", "vqa_questions": [_question(), _question()]}
    other = row | {"scene_id": "1", "vqa_questions": [_question(), _question("Is it round?")]}
    (prompt,) = rl_prompts.read_rl_prompts(_write(tmp_path, row, other))
    assert (prompt.scene_id, prompt.count) == ("0", 2)
    assert [q.question for q in prompt.questions] == ["Is it blue?", "Is it round?"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"scene_id": "1"}, "text: expected a string, got nothing"),
        ({"text": "a", "scene_id": "0"}, "each id once"),
        ({"text": "a", "scene_id": "1", "vqa_questions": [_question(weight=-1)]}, "from 0 to 1"),
        ({"text": "a", "scene_id": "1", "vqa_questions": [_question(type="riddle")]}, "'riddle'"),
        ({"text": "a", "scene_id": "1", "reference_images_path": "../../etc"}, "relative"),
    ],
)
def test_faults(tmp_path, row, message):
    path = _write(tmp_path, {"text": "Tess", "scene_id": "0"}, row)
    with pytest.raises(DataError, match=message) as caught:
        rl_prompts.read_rl_prompts(path)
    assert len(caught.value.findings) == 1 and "line 2" in caught.value.findings[0].record


def test_absent_and_empty(tmp_path):
    with pytest.raises(DataError, match="_pure_t2i_with_vqa.jsonl"):
        rl_prompts.read_rl_prompts(tmp_path)
    with pytest.raises(DataError, match="at least one prompt"):
        rl_prompts.read_rl_prompts(_write(tmp_path))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60)
    | st.dictionaries(
        st.sampled_from(["text", "scene_id", "vqa_questions", "reference_images_path"]),
        st.none() | st.text(max_size=4) | st.integers() | st.lists(st.dictionaries(st.text(), st.none())),
    ).map(lambda row: json.dumps(row).encode())
)
def test_any_content_gives_prompts_or_findings(tmp_path, content):
    path = tmp_path / "x_pure_t2i.jsonl"
    path.write_bytes(content)
    prompts, findings = rl_prompts.scan_rl_prompts(path)
    assert prompts or any(finding.severity == "error" for finding in findings)
