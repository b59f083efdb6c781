"""Every test set is read, and prompts say of the character what they should."""

import pytest

from unichar_jax.data import templates
from unichar_jax.data.rolescape import short_name
from unichar_jax.errors import UserError
from unichar_jax.evaluation.items import TASKS, items, read_cases

# RoleScape-20: dialogue, memorization, personality, knowledge and image choices; pictures of the test folder.
PUBLISHED = {
    "Adrien Brody": (20, 20, 20, 10, 60, 3),
    "Bo": (20, 20, 16, 10, 60, 3),
    "Furina": (20, 20, 20, 10, 45, 3),
    "Ichihime": (20, 19, 17, 10, 50, 5),
    "YuiYagi": (20, 19, 17, 10, 35, 6),
    "Pikachu": (20, 18, 16, 10, 35, 3),
}


def test_published_test_sets_are_read_completely(rolescape_dir):
    cases = {case.name: case for case in read_cases(rolescape_dir)}
    assert cases.keys() == PUBLISHED.keys()
    for name, (said, memory, manner, facts, seen, drawn) in PUBLISHED.items():
        counts = {task: len(items(cases[name], task)) for task in TASKS}
        assert counts == {
            "knowledge_mcq": facts,
            "image_mcq": seen,
            "unseen_image_mcq": 0,  # the published test folders have no questions
            "vqa": 0,
            "reply_likelihood": said + drawn,
            "dialogue": said + drawn,
            "memorization": memory,
            "personality": manner,
            "t2i": drawn,
            "scene_t2i": drawn,
            "t2t2i": drawn,
        }, name


def test_keys_are_unique(pip):
    for task in TASKS:
        keys = [item.key for item in items(pip, task)]
        assert len(set(keys)) == len(keys) > 0, task


def test_by_name_prompts_are_those_of_training(pip):
    spoken = items(pip, "dialogue")[0]
    assert spoken.prompt.text == templates.dialogue(
        "Pip", pip.train.description, pip.train.opening, spoken.question
    )
    assert items(pip, "t2i")[0].prompt.text == pip.test.captions[0].text
    assert items(pip, "vqa")[0].prompt.text == "Who do you see here?"
    assert "blue" not in items(pip, "t2i")[0].prompt.text


def test_a_profile_in_the_prompt_tells_the_looks(pip):
    for task in ("dialogue", "t2i", "t2t2i", "knowledge_mcq"):
        told = items(pip, task, "profile")[0]
        named = items(pip, task)[0]
        assert "blue fox" in told.prompt.text, task
        assert (told.key, told.question, told.reference) == (named.key, named.question, named.reference)
    told = items(pip, "t2t2i", "profile")[0].described_by
    assert told.startswith(
        "Pip is a plain blue fox with a white belly and a yellow scarf. He talks like a pirate."
    )


def test_a_picture_in_the_prompt_leaves_questions_their_own(pip):
    shown = pip.train.images[0].path
    assert {i.prompt.image for i in items(pip, "t2i", "profile+picture")} == {shown}
    asked = items(pip, "unseen_image_mcq", "profile+picture")
    assert {i.prompt.image.parent.parent.name for i in asked} == {"test"}


def test_characters_are_chosen_by_either_name(tiny_root):
    assert [c.name for c in read_cases(tiny_root, ["Tess"])] == ["Tess"]
    assert [c.train.dir_name for c in read_cases(tiny_root, ["Friends-Tess"])] == ["Friends-Tess"]
    assert read_cases(tiny_root)[0].test.split == "test"
    assert short_name(tiny_root / "train" / "Friends-Tess") == "Tess"
    with pytest.raises(UserError, match="did you mean 'Tess'"):
        read_cases(tiny_root, ["Tes"])


def test_unknown_names_are_corrected(pip):
    with pytest.raises(UserError, match="did you mean 'knowledge_mcq'"):
        items(pip, "knowledge_mc")
    with pytest.raises(UserError, match="did you mean 'profile'"):
        items(pip, "t2i", "profil")
