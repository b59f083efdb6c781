"""Every published row is derived byte for byte; samples carry the loss where it belongs."""

import json

import pytest

from tests.data.published import processed_rows
from unichar_jax.data import templates
from unichar_jax.data.rolescape import find_characters, read_character
from unichar_jax.data.tasks import (
    T2I_TASKS,
    TASKS,
    TEST_SETS,
    VLM_TASKS,
    eval_items,
    samples,
)
from unichar_jax.errors import UserError


def test_published_rows_byte_for_byte(rolescape_dir):
    compared = 0
    for folder in find_characters(rolescape_dir):
        character = read_character(folder)
        tasks = TASKS if character.split == "train" else T2I_TASKS
        for task in tasks:
            kind = "t2i" if task in T2I_TASKS else "vlm"
            path = folder / "processed" / kind / f"{character.name}_{task}.jsonl"
            rows = processed_rows(character, task)
            derived = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
            assert derived == path.read_bytes(), path
            compared += 1
    assert compared == 6 * 9 + 6 * 4


def test_samples_follow_the_rows(tiny_root):
    tess = read_character(tiny_root / "train" / "Friends-Tess")
    for task in TASKS:
        rows, plans = processed_rows(tess, task), samples(tess, task)
        assert len(rows) == len(plans) > 0
        assert len({sample.key for sample in plans}) == len(plans)
        for row, sample in zip(rows, plans, strict=True):
            *prompt, target = sample.parts
            assert target.loss and not any(part.loss for part in prompt)
            if task in T2I_TASKS:
                assert target.kind == "latent_image" and target.image.path.is_file()
                assert [(p.kind, p.droppable, p.text) for p in prompt] == [("text", True, row["text"])]
            else:
                human, gpt = (turn["value"] for turn in row["conversations"])
                assert (target.kind, target.text) == ("text", gpt)
                assert not any(part.droppable for part in sample.parts)
                text = "".join(p.text if p.kind == "text" else "<image>" for p in prompt)
                assert text == human


def test_vqa_looks_first_then_reads(tiny_root):
    tess = read_character(tiny_root / "train" / "Friends-Tess")
    sample = samples(tess, "vqa")[3]
    assert sample.key == "train/Friends-Tess/vqa/1_1"
    assert [part.kind for part in sample.parts] == ["vit_image", "text", "text"]
    assert sample.parts[0].image.id == "1" and sample.parts[1].text == "Colour 1?"


def test_a_scene_without_thinking_yields_none(tiny_root):
    folder = tiny_root / "train" / "Friends-Tess"
    (folder / "Tess_with_image.json").unlink()
    tess = read_character(folder)
    counts = {task: len(samples(tess, task)) for task in TASKS}
    assert counts["t2i"] == counts["vlm"] == 4
    assert counts["t2i_with_thinking"] == counts["vlm_thinking"] == counts["vqa"] == 0
    assert counts["t2i_generation_instruction_only"] == 0


def test_test_sets(tiny_root):
    train = read_character(tiny_root / "train" / "Friends-Tess")
    test = read_character(tiny_root / "test" / "Friends-Tess")
    counts = {name: (len(eval_items(train, name)), len(eval_items(test, name))) for name in TEST_SETS}
    assert counts == {
        "dialogue": (2, 2),
        "memorization": (1, 0),
        "personality": (2, 0),
        "knowledge_mcq": (3, 0),
        "image_mcq": (8, 0),
        "t2i": (0, 4),
    }
    choice = eval_items(train, "image_mcq")[0]
    assert choice.reference == "A" and dict(choice.options)["A"] == "one"
    assert choice.prompt.startswith(templates.IMAGE_PLACEHOLDER) and "\nB. two\n" in choice.prompt
    asked = eval_items(train, "personality")[0]
    assert asked.prompt == templates.dialogue("Tess", train.description, train.opening, "Who?")


def test_unknown_names_are_corrected(tiny_root):
    tess = read_character(tiny_root / "train" / "Friends-Tess")
    with pytest.raises(UserError, match="did you mean 'vlm_thinking'"):
        samples(tess, "vlm_thinkin")
    with pytest.raises(UserError, match="did you mean 'image_mcq'"):
        eval_items(tess, "image_mc")
    assert set(T2I_TASKS) | set(VLM_TASKS) == set(TASKS)
