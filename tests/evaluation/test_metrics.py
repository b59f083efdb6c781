"""Every metric on cases whose answer is known."""

import numpy as np
import pytest
from PIL import Image

from unichar_jax.evaluation import pictures, texts
from unichar_jax.evaluation.items import Item, items
from unichar_jax.evaluation.outputs import Output
from unichar_jax.evaluation.subject import Prompt
from unichar_jax.scoring.base import ScoreContext
from workshop.miniworld.draw import draw
from workshop.miniworld.texts import SAID
from workshop.miniworld.voices import PHRASES
from workshop.miniworld.world import ATTRIBUTES, Look, Scene, attributes

OPTIONS = (("A", "one"), ("B", "two"), ("C", "three"), ("D", "four"))


def question(reference, options=OPTIONS):
    return Item("knowledge_mcq", "k", "Pip", Prompt("Which?"), "Which?", reference, options)


def letters(score):
    """Scores of all places in all rotations; ``score(letter, option)``."""
    keys = [k for k, _ in OPTIONS]
    return [[score(keys[p], k) for p, k in enumerate(order)] for order in texts.rotations(OPTIONS)]


# -- texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", "ABCD")
def test_preferring_a_letter_earns_chance(reference):
    data = {
        "letters": letters(lambda letter, option: 5.0 * (letter == "B")),
        "texts": [[-1, 1]] * 4,
        "text": "",
    }
    assert texts.choice(question(reference), data)["accuracy"] == 0.25


def test_knowing_the_option_is_right_at_every_letter():
    data = {
        "letters": letters(lambda letter, option: np.log(7.0) * (option == 2)),
        "texts": [[-4, 4]] * 4,
        "text": "",
    }
    found = texts.choice(question("C"), data)
    assert found["accuracy"] == 1.0
    assert found["probability"] == pytest.approx(7 / 10)
    assert texts.choice(question("A"), data)["accuracy"] == 0.0


def test_option_texts_are_compared_per_token():
    data = {"letters": letters(lambda *_: 0.0), "texts": [[-3, 2], [-4, 4], [-2, 1], [-9, 3]], "text": ""}
    assert texts.choice(question("B"), data)["text_accuracy"] == 1.0  # -1 a token, though not the largest sum
    assert texts.choice(question("C"), data)["text_accuracy"] == 0.0


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Pip is a sailor.", "B"),  # whole answers mean the option they name
        ("a SAILOR", "B"),
        ("Pip is a baker and a sailor.", ""),  # two are named: neither is meant
        ("Pip is a king.", ""),
        ("", ""),
        ("He lives in the red house.", "D"),  # shares two words with D and one with C
    ],
)
def test_an_answer_in_own_words_means_the_option_it_shares_most_words_with(text, meant):
    options = (("A", "a baker"), ("B", "a sailor"), ("C", "the blue house"), ("D", "the red house"))
    for reference in "ABCD":
        asked = Item("knowledge_mcq", "k", "Pip", Prompt("?"), "?", reference, options)
        data = {"letters": letters(lambda *_: 0.0), "texts": [[-1, 1]] * 4, "text": text}
        assert texts.choice(asked, data)["answer_accuracy"] == float(meant == reference)


def test_free_answers():
    item = Item("vqa", "k", "Pip", Prompt("Who?"), "Who?", "A fox.")
    data = {"text": "the Fox", "log_prob": -3.0, "tokens": 4}
    assert texts.answer(item, data) == {"exact": 1.0, "contains": 1.0, "answer_nats_per_token": 0.75}
    found = texts.answer(item, data | {"text": "It is a fox!"})
    assert (found["exact"], found["contains"]) == (0.0, 1.0)
    assert texts.answer(item, data | {"text": "foxes"})["contains"] == 0.0


def test_likelihood_per_token_and_per_character():
    item = Item("reply_likelihood", "k", "Pip", Prompt("Hi"), "Hi", "Ahoy there")
    found = texts.likelihood(item, {"log_prob": -5.0, "tokens": 4})
    assert found == {"nats_per_token": 1.25, "nats_per_char": 0.5}


def test_style_of_a_pirate(pip):
    spoken = texts.style("Arr! I be by the sea. Zip zap ahoy!", pip.train, PHRASES)
    assert spoken == {"words": 9.0, "catchphrase": 1.0, "voice": 1.0}
    flat = texts.style("I am by the sea.", pip.train, PHRASES)
    assert flat == {"words": 5.0, "catchphrase": 0.0, "voice": 0.0}
    others = {name: phrases for name, phrases in PHRASES.items() if name != "pirate"}
    assert texts.style("I am by the sea.", pip.train, others) == {"words": 5.0, "catchphrase": 0.0}


def test_memory_needs_the_fact(pip):
    answers = pip.train.attributes["memorization_answers"]
    asked, fact = next((q, a) for q, a in answers.items() if a == "pancakes")
    item = Item("memorization", "k", "Pip", Prompt(asked), asked)
    assert texts.memory(item, "Arr! I love Pancakes, matey!", pip.train) == {"expected_words": 1.0}
    assert texts.memory(item, "Arr! I love soup.", pip.train) == {"expected_words": 0.0}
    assert texts.memory(Item("memorization", "k", "Pip", Prompt("?"), "?"), fact, pip.train) == {}


def test_a_character_without_a_truth_file_has_fewer_metrics(tiny_root):
    from unichar_jax.evaluation.items import read_cases

    tess = read_cases(tiny_root)[0]
    assert texts.style("hello there", tess.train, PHRASES) == {"words": 2.0}


# -- pictures -----------------------------------------------------------------------------------------------


def photo(case, number):
    return np.asarray(Image.open(case.train.images[number].path).convert("RGB"))


def test_copies_are_found_and_new_scenes_are_not(pip):
    originals = [photo(pip, i) for i in range(5)]
    rng = np.random.default_rng(0)
    noisy = np.clip(originals[2] + rng.normal(0, 12, originals[2].shape), 0, 255).astype(np.uint8)
    held_out = [np.asarray(Image.open(i.path).convert("RGB")) for i in pip.test.images]
    found = pictures.apart([originals[0], noisy, *held_out], originals)
    assert [d < pictures.COPY for d in found] == [True, True, False, False, False]
    assert found[0] == 0.0 and min(found[2:]) > 0.6 and max(found[2:]) < 1.5
    # The unit is the originals' own: the same pictures, all half as bright, are as far apart.
    dark = [p // 2 for p in (noisy, *originals)]
    assert pictures.apart(dark[:1], dark[1:]) == pytest.approx(found[1:2], rel=0.1)
    assert pictures.apart([noisy], originals[:1]) == [None]
    assert pictures.apart([noisy], originals[:1] * 3) == [None]


def test_pictures_of_a_prompt_vary_or_do_not(pip):
    originals = [photo(pip, i) for i in range(5)]
    shown = [originals[0], originals[0], originals[1], originals[0], originals[2]]
    found = pictures.varied(shown, ["a", "a", "a", "b", "c"], originals)
    assert found[3:] == [None, None]  # each the only one of its prompt
    # The odd one out differs from both others, each of those from one.
    assert found[0] == found[1] == pytest.approx(found[2] / 2)
    assert 0.5 < found[2] < 2  # the unit is the usual distance between originals
    assert pictures.varied([originals[3]] * 2, ["a", "a"], originals) == [0.0, 0.0]
    assert pictures.varied(shown[:2], ["a", "a"], originals[:1]) == [None, None]


LOOK = Look("fox", "blue", "white", "plain", "scarf", "yellow")  # Pip's


def readings(look, scene):
    """What a judge that is never wrong reads."""
    return {name: np.eye(len(ATTRIBUTES[name]))[[index]] for name, index in attributes(look, scene).items()}


def judged(pip, look, scene, item, text=""):
    output = Output(item, 0, {"text": text} if text else {})
    return pictures.judge(pip, [output], readings(look, scene), SAID)[0]


def test_judge_counts_attributes(pip):
    item = Item("t2i", "k", "Pip", Prompt("x"), "Pip is waving on the beach at night, happy.")
    right = Scene("happy", "waving", "beach", "night")
    assert judged(pip, LOOK, right, item) == {"identity": 1.0, "prompt_following": 1.0}
    green = Look("fox", "green", "white", "plain", "scarf", "red")
    wrong = Scene("happy", "waving", "forest", "day")
    assert judged(pip, green, wrong, item) == {"identity": pytest.approx(4 / 6), "prompt_following": 0.5}


def test_consistency_is_between_the_reply_and_the_picture(pip):
    item = Item("t2t2i", "k", "Pip", Prompt("x"), "Let me see you wave.")
    scene = Scene("sad", "waving", "castle", "day")
    reply = "Arr! I feel sad and I be waving at the castle at night."
    found = judged(pip, LOOK, scene, item, reply)
    assert found == {"identity": 1.0, "prompt_following": 1.0, "consistency": 0.75}
    silent = judged(pip, LOOK, scene, item, "Arr! Find the gold!")
    assert "consistency" not in silent


def test_looks_in_the_prompt_do_not_count_as_following(pip):
    """So that a described and a plain prompt are measured alike."""
    item = Item("t2i", "k", "Pip", Prompt("x"), "A blue fox is sitting.")
    assert judged(pip, LOOK, Scene("sad", "sitting", "city", "day"), item)["prompt_following"] == 1.0


class Encoder:
    """Stands for an image encoder: a picture's mean colour, as a unit vector."""

    def __call__(self, images):
        mean = np.asarray(images).mean(axis=(1, 2))
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    def references(self, references):
        return np.concatenate([self(np.asarray(p)[None] / 255) for p in references.pictures])


def test_mean_similarity_is_the_mean_over_references():
    red, green = np.zeros((2, 4, 4, 3), np.uint8)
    red[..., 0], green[..., 1] = 255, 255
    from unichar_jax.scoring.base import References

    references = References.of([Image.fromarray(red), Image.fromarray(red), Image.fromarray(green)])
    context = ScoreContext(["a", "b"], np.array([0, 1]), references)
    scores = pictures.MeanSimilarity(Encoder(), "dino")(np.stack([red, green]) / 255, context)
    np.testing.assert_allclose(scores, [2 / 3, 1 / 3], atol=1e-6)


class Spread:
    """Diversity for tests: how many pictures the prompt has."""

    name = "diversity"

    def __call__(self, images, context):
        return np.array([np.sum(context.groups == g) for g in context.groups], np.float32)


class Prompted:
    """A scorer for tests: the length of what the picture should show."""

    name = "clip_t"

    def __call__(self, images, context):
        return np.array([len(p) for p in context.prompts], np.float32)


def test_scorers_see_prompts_groups_and_all_sizes(pip, tmp_path):
    todo = items(pip, "t2i")[:2]
    instruments = pictures.Instruments(scorers=(Prompted(),), diversity=Spread())
    outputs = []
    for number, item in enumerate(todo):
        for seed in range(3):
            path = tmp_path / f"{number}-{seed}.png"
            side = 96 if number == 0 else 64
            Image.fromarray(draw(LOOK, Scene("happy", "waving", "beach", "day", seed), side)).save(path)
            outputs.append(Output(item, seed, {"picture": str(path)}))
    found = pictures.measure(pip, outputs, instruments)
    assert [m["diversity"] for m in found] == [3.0] * 6
    assert all(m["varied"] > 0 for m in found)  # drawn from other seeds
    assert [m["clip_t"] for m in found] == [float(len(o.item.question)) for o in outputs]
    assert all("identity" not in m for m in found)  # no judge was given
    alone = pictures.measure(pip, outputs[:1], instruments)
    assert "diversity" not in alone[0] and "varied" not in alone[0]
