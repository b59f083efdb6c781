"""The mini world: repeatable, readable texts, clear pictures, and test sets that are held out."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from unichar_jax.data.rl_prompts import RLPrompt, read_rl_prompts
from unichar_jax.data.rolescape import read_character
from unichar_jax.data.tasks import TASKS, samples
from unichar_jax.errors import UserError
from workshop.miniworld import dialogue, profiles, questions, texts, unnamed, voices
from workshop.miniworld.cast import CAST, MIN_DISTANCE, member, sample_look
from workshop.miniworld.draw import draw
from workshop.miniworld.world import (
    ATTRIBUTES,
    LOOK_VALUES,
    SCENE_VALUES,
    Look,
    Scene,
    attributes,
    distance,
    random_look,
    sample_scene,
    values,
)
from workshop.miniworld.write import plan_scenes, write_character

SEEDS = range(300)
LOOK = Look("fox", "red", "white", "plain", "scarf", "blue")
SCENE = Scene("happy", "standing", "meadow", "day", jitter=3)


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return [unnamed.unnamed_texts(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mini")
    write_character(member("Pip"), root, train_images=10, test_images=6)
    return root


# -- world ---------------------------------------------------------------------------------------


def test_wrong_value_is_refused_with_a_hint() -> None:
    with pytest.raises(UserError, match="did you mean 'penguin'"):
        dataclasses.replace(LOOK, species="pengin")
    with pytest.raises(UserError, match="three different colours"):
        dataclasses.replace(LOOK, belly="red")
    with pytest.raises(UserError, match=r"Scene\.place"):
        dataclasses.replace(SCENE, place="moon")


def test_attributes_are_class_indices() -> None:
    indices = attributes(LOOK, SCENE)
    assert list(indices) == list(ATTRIBUTES)
    assert {n: ATTRIBUTES[n][i] for n, i in indices.items()} == values(LOOK, SCENE)


def test_sampling_reaches_every_value() -> None:
    rng = np.random.default_rng(0)
    drawn = [values(sample_look(rng), sample_scene(rng)) for _ in range(600)]
    for name, options in ATTRIBUTES.items():
        assert {record[name] for record in drawn} == set(options)


# -- pictures ------------------------------------------------------------------------------------


def test_picture_depends_on_look_scene_and_size_alone() -> None:
    first = draw(LOOK, SCENE)
    draw(random_look(np.random.default_rng(1)), SCENE)
    assert first.shape == (96, 96, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, draw(LOOK, SCENE))
    assert draw(LOOK, SCENE, 64).shape == (64, 64, 3)
    moved = draw(LOOK, dataclasses.replace(SCENE, jitter=4))
    assert (moved != first).any()


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_each_value_of_an_attribute_is_clearly_visible(name: str) -> None:
    """Any two values differ in at least 60 of 9,216 pixels by much, in a few random settings."""
    rng = np.random.default_rng(5)
    for _ in range(2):
        look, scene = random_look(rng), sample_scene(rng)
        pictures = []
        for value in ATTRIBUTES[name]:
            try:
                new_look = dataclasses.replace(look, **{name: value} if name in LOOK_VALUES else {})
            except UserError:  # a colour that the look has elsewhere
                continue
            new_scene = dataclasses.replace(scene, **{name: value} if name in SCENE_VALUES else {})
            pictures.append(draw(new_look, new_scene).astype(int))
        for a, b in itertools.combinations(pictures, 2):
            assert (np.abs(a - b).max(axis=-1) > 40).sum() > 60


# -- texts ---------------------------------------------------------------------------------------


def test_full_captions_read_back_exactly(records: list[dict]) -> None:
    for record in records:
        truth = values(record["look"], record["scene"])
        assert texts.attributes_in_text(record["caption"]) == truth
        named = texts.full_named_caption("Pip", record["look"], record["scene"])
        assert texts.attributes_in_text(named) == truth


def test_replies_state_exactly_the_scene(records: list[dict]) -> None:
    for record in records:
        truth = values(record["look"], record["scene"])
        scene = {name: truth[name] for name in SCENE_VALUES}
        assert texts.attributes_in_text(record["reply"]) == scene
        assert texts.attributes_in_text(record["user"]).items() <= scene.items()


def test_other_texts_state_nothing_false(records: list[dict]) -> None:
    kinds = ("partial_caption", "t2i_instruction", "thinking", "generation_instruction")
    for record in records:
        truth = values(record["look"], record["scene"])
        for kind in kinds:
            assert texts.attributes_in_text(record[kind]).items() <= truth.items(), record[kind]


def test_talk_states_nothing_that_a_picture_shows(records: list[dict]) -> None:
    for record in records:
        for line in itertools.chain.from_iterable(record["dialogue"]):
            assert texts.attributes_in_text(line) == {}, line


def test_contradictions_are_left_out() -> None:
    stated = texts.attributes_in_text("A red fox on the beach and in the city at night.")
    assert stated == {"species": "fox", "colour": "red", "time": "night"}


def test_replies_are_in_the_described_voice(records: list[dict]) -> None:
    assert {record["profile"].voice for record in records} == set(voices.VOICES)
    for record in records:
        spoken = [record["reply"], *(reply for _, reply in record["dialogue"])]
        assert {voices.voice_in_text(reply) for reply in spoken} == {record["profile"].voice}
        assert voices.VOICES[record["profile"].voice].manner in record["description"]


def test_talk_and_knowledge_need_only_the_description(records: list[dict]) -> None:
    values_of = {v: fact for fact, options in profiles.FACT_VALUES.items() for v in options}
    for record in records:
        said = " ".join(reply for _, reply in record["dialogue"])
        for value in values_of:
            if f" {value}." in said:
                assert value in record["description"]
        for item in record["knowledge"]:
            answer = item["answer"].removeprefix("Yes. ").removeprefix("No. ")
            profile = record["profile"]
            facts = [f for f in profiles.FACTS if profiles.fact_answer(profile, f) == answer]
            assert len(facts) == 1
            assert getattr(profile, facts[0]) in record["description"]


def test_visual_answers_are_true(records: list[dict]) -> None:
    for record in records:
        truth = values(record["look"], record["scene"])
        answers = {f"{texts.capital(texts.value_phrase(truth, name))}." for name in truth}
        for item in record["vqa"]:
            if item["type"] == "open_ended":
                assert item["answer"] in answers
            else:
                assert item["answer"] in ("Yes.", "No.")
        for item in record["mcq"]:
            assert list(item["options"]) == list("ABCD")
            assert f"{texts.capital(item['options'][item['answer_key']])}." in answers
            assert len(set(item["options"].values())) == 4


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_yes_and_no_questions_name_the_true_value_or_another(name: str, test: bool) -> None:
    rng, truth = np.random.default_rng(0), values(LOOK, SCENE)
    true = texts.value_phrase(truth, name)
    for yes in (True, False):
        asked = questions.yes_no_question(truth, name, "Pip", rng, yes=yes, test=test)
        assert (f" {true}?" in asked.question) == yes == (asked.answer == "yes") != asked.negative


@pytest.mark.parametrize("key", "ABCD")
def test_choice_puts_the_right_option_at_its_key(key: str) -> None:
    rng, truth = np.random.default_rng(0), values(LOOK, SCENE)
    for name in questions.CHOICE_ATTRIBUTES:
        asked = questions.choice_question(truth, name, "Pip", rng, key=key)
        assert asked.key == key
        assert len(set(asked.options)) == 4
        assert asked.answer == texts.value_phrase(truth, name)


def test_lengths_suit_a_small_model(records: list[dict]) -> None:
    def words(kind: str) -> list[int]:
        return [len(record[kind].split()) for record in records]

    assert min(words("caption")) >= 12
    assert max(words("caption")) <= 26
    assert min(words("description")) >= 20
    assert max(words("description")) <= 45
    assert 10 <= np.median(words("reply")) <= 25


# -- pretraining records and the cast ------------------------------------------------------------


def test_record_is_a_pure_function_of_its_seed() -> None:
    a, b = unnamed.unnamed_sample(7, size=48), unnamed.unnamed_sample(7, size=48)
    np.testing.assert_array_equal(a.pop("image"), b.pop("image"))
    assert a == b
    c = unnamed.unnamed_texts(7)
    assert a == c
    assert unnamed.unnamed_texts(8)["caption"] != c["caption"]


def test_cast_is_absent_from_pretraining() -> None:
    rng = np.random.default_rng(2)
    for look in (sample_look(rng) for _ in range(2000)):
        assert min(distance(look, m.look) for m in CAST.values()) >= MIN_DISTANCE
    for seed in SEEDS:
        look, _, profile = unnamed.unnamed_identity(seed)
        assert min(distance(look, m.look) for m in CAST.values()) >= MIN_DISTANCE
        assert profile.name not in CAST


def test_cast_members_differ() -> None:
    assert len(CAST) >= 10
    assert sum(m.role == "experiment" for m in CAST.values()) == 8
    for a, b in itertools.combinations(CAST.values(), 2):
        assert distance(a.look, b.look) >= MIN_DISTANCE
        assert a.profile.voice != b.profile.voice
        assert a.profile.catchphrase != b.profile.catchphrase
        for fact in profiles.FACTS:
            assert getattr(a.profile, fact) != getattr(b.profile, fact)


def test_descriptions_of_the_cast_do_not_tell_looks() -> None:
    for m in CAST.values():
        assert texts.attributes_in_text(m.description) == {}, m.description
        assert texts.attributes_in_text(m.opening) == {}, m.opening
        assert m.name in m.description
        assert 25 <= len(m.description.split()) <= 45


def test_unknown_member_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'Percy'"):
        member("Percie")


# -- folders -------------------------------------------------------------------------------------


def test_folder_reads_as_rolescape_and_trains_every_task(written: Path) -> None:
    train = read_character(written / "personalized_data" / "train" / "Pip")
    test = read_character(written / "personalized_data" / "test" / "Pip")
    assert (len(train.images), len(test.images)) == (10, 6)
    assert len(train.knowledge_mcq) == 10
    assert train.full_profile
    assert train.simplified_profile
    for task in TASKS:
        assert samples(train, task), task
    keys = [item.answer_key for item in train.knowledge_mcq]
    assert {keys.count(letter) for letter in "ABCD"} == {2, 3}


def test_test_set_shares_nothing_with_training(written: Path) -> None:
    base = written / "personalized_data"
    train, test = read_character(base / "train" / "Pip"), read_character(base / "test" / "Pip")
    prompts = read_rl_prompts(written / "personalized_t2i" / "Pip")

    train_text = [scene.reply for scene in (*train.scenes, *train.extension_train)]
    train_text += [caption.text for caption in train.captions] + [p.text for p in prompts]
    stated = [texts.attributes_in_text(text) for text in train_text]
    train_pairs = {(s["pose"], s["place"]) for s in stated if "pose" in s}
    held_out = [record["scene"] for record in test.attributes["images"].values()]
    assert not train_pairs & {(scene["pose"], scene["place"]) for scene in held_out}
    assert {pose for pose, _ in train_pairs} == set(SCENE_VALUES["pose"])
    assert {place for _, place in train_pairs} == set(SCENE_VALUES["place"])

    said = {s.user for s in (*train.scenes, *train.extension_train)}
    asked = {s.user for s in (*test.scenes, *train.extension_test)}
    assert not said & {*asked, *train.memorization, *train.personality}

    learned = {q.question for s in train.scenes for q in (*s.qa_pairs, *s.mcq_items)}
    assert not learned & {q.question for s in test.scenes for q in (*s.qa_pairs, *s.mcq_items)}
    assert not {q.question for q in train.knowledge_qa} & {q.question for q in train.knowledge_mcq}


def test_prompts_of_a_named_character_do_not_tell_looks(written: Path) -> None:
    train = read_character(written / "personalized_data" / "train" / "Pip")
    fields = [c.text for c in train.captions] + [p.text for p in _prompts(written)]
    for scene in train.scenes:
        fields += [scene.user, scene.reply, scene.thinking, scene.generation_instruction]
    for text in fields:
        assert not set(texts.attributes_in_text(text)) & set(LOOK_VALUES), text


def _prompts(root: Path) -> tuple[RLPrompt, ...]:
    return read_rl_prompts(root / "personalized_t2i" / "Pip")


def test_ground_truth_matches_pictures_and_captions(written: Path) -> None:
    for split in ("train", "test"):
        character = read_character(written / "personalized_data" / split / "Pip")
        truth = character.attributes
        look = Look(**truth["look"])
        assert look == member("Pip").look
        for caption in character.captions:
            record = truth["images"][caption.image.id]
            scene = Scene(**record["scene"])
            shown = {name: getattr(scene, name) for name in SCENE_VALUES}
            assert texts.attributes_in_text(caption.text) == shown
            assert texts.attributes_in_text(record["full_caption"]) == values(look, scene)
    answers = read_character(written / "personalized_data" / "train" / "Pip").attributes
    profile = member("Pip").profile
    assert answers["memorization_answers"]["Which work is yours, Pip?"] == profile.job


def test_rl_questions_are_distinct_and_true(written: Path) -> None:
    folder = written / "personalized_t2i" / "Pip"
    truth = json.loads((folder / "Pip_attributes.json").read_text())["prompts"]
    prompts = read_rl_prompts(folder)
    assert len(prompts) >= 30
    assert all(prompt.count == 1 for prompt in prompts)
    for prompt in prompts:
        shown = truth[prompt.scene_id]["scene"]
        stated = texts.attributes_in_text(prompt.text)
        assert stated == {name: shown[name] for name in SCENE_VALUES}
        asked = [question.question for question in prompt.questions]
        assert len(set(asked)) == len(asked) >= 12
        for question in prompt.questions:
            told = texts.attributes_in_text(question.question)
            for name in set(told) & set(SCENE_VALUES) if question.type == "yes_no" else ():
                assert (told[name] == shown[name]) == (question.answer == "yes")


def test_writing_repeats_and_never_overwrites_unasked(written: Path, tmp_path: Path) -> None:
    again = write_character(member("Pip"), tmp_path, train_images=10, test_images=6)
    first = written / "personalized_data" / "train" / "Pip"
    for path in first.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(UserError, match="existing"):
        write_character(member("Pip"), tmp_path)
    write_character(member("Pip"), tmp_path, train_images=2, test_images=1, overwrite=True)
    assert len(list(again.glob("*.png"))) == 2
    assert not list(tmp_path.glob(".writing-*"))


def test_fewer_training_pictures_are_the_first_and_change_no_test(written: Path, tmp_path: Path) -> None:
    write_character(member("Pip"), tmp_path, train_images=3, test_images=6)
    for part in ("personalized_data/test", "personalized_t2i"):
        old, new = written / part / "Pip", tmp_path / part / "Pip"
        kept = {path.name for path in new.iterdir()}
        lost = {path.name for path in old.iterdir()} - kept
        assert lost == (set() if part.endswith("test") else {f"{i}.png" for i in range(3, 10)})
        for name in kept:
            assert (new / name).read_bytes() == (old / name).read_bytes(), name
    old, new = (root / "personalized_data/train/Pip" for root in (written, tmp_path))
    for name in ("0.png", "2.png", "Pip_knowledge_qa.json", "Pip_knowledge_qa_test.json"):
        assert (new / name).read_bytes() == (old / name).read_bytes(), name
    assert (new / "Pip_dialogue_text_extension_test.json").read_bytes() == (
        old / "Pip_dialogue_text_extension_test.json"
    ).read_bytes()
    fewer, more = read_character(new), read_character(old)
    assert [s.reply for s in fewer.scenes] == [s.reply for s in more.scenes[:3]]
    assert [c.text for c in fewer.captions] == [c.text for c in more.captions[:3]]
    assert [s.qa_pairs for s in fewer.scenes] == [s.qa_pairs for s in more.scenes[:3]]


@pytest.mark.parametrize(
    ("part", "asked"), [("train", (7, 6, 8)), ("test", (10, 3, 8)), ("prompts", (10, 6, 5))]
)
def test_the_size_of_one_part_changes_no_other(part: str, asked: tuple[int, int, int]) -> None:
    whole, less = plan_scenes(10, 6, 8, seed=4), plan_scenes(*asked, seed=4)
    for name in ("train", "test", "prompts"):
        scenes = getattr(less, name)
        assert scenes == getattr(whole, name)[: len(scenes)], name
        assert (len(scenes) < len(getattr(whole, name))) == (name == part)


def test_moods_are_balanced() -> None:
    scenes = plan_scenes(10, 6, 30, seed=3).train
    for name in ("expression", "time"):
        shown = [getattr(scene, name) for scene in scenes]
        counts = [shown.count(value) for value in SCENE_VALUES[name]]
        assert max(counts) - min(counts) <= 1


def test_plan_refuses_more_pictures_than_pairs() -> None:
    with pytest.raises(UserError, match="at most 48 together"):
        plan_scenes(45, 4, 10, 0)


@pytest.mark.parametrize(("train", "test"), [(3, 1), (10, 6), (24, 12), (40, 8)])
def test_plan_holds_out_pairs(train: int, test: int) -> None:
    plan = plan_scenes(train, test, 30, seed=1)
    held_out = {(scene.pose, scene.place) for scene in plan.test}
    assert len(held_out) == test
    for scene in (*plan.train, *plan.prompts):
        assert (scene.pose, scene.place) not in held_out
    assert len({(scene.pose, scene.place) for scene in plan.train}) == train


def test_user_lines_of_test_and_training_are_disjoint() -> None:
    profile, scene = member("Luna").profile, SCENE

    def lines(topics: tuple[str, ...], at: Scene | None, test: bool) -> set[str]:
        return {dialogue.user_line(t, profile, at, v, test) for t in topics for v in range(4)}

    for topics, at in ((dialogue.TALK_TOPICS, None), (dialogue.SCENE_TOPICS, scene)):
        assert not lines(topics, at, test=False) & lines(topics, at, test=True)
