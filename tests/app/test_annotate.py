"""Annotation through a local endpoint that answers by rule: what comes out, and what comes of every fault."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.app.stub import Stub, endpoint
from unichar_jax.app.annotate.annotation import Wanted, balanced_letters
from unichar_jax.app.annotate.asking import Answers, collect
from unichar_jax.app.annotate.kinds import Facts
from unichar_jax.app.annotate.run import AnnotateConfig, run
from unichar_jax.cli.main import main
from unichar_jax.data.check import check
from unichar_jax.data.new_character import new_character
from unichar_jax.data.rl_prompts import read_rl_prompts
from unichar_jax.data.rolescape import read_character
from unichar_jax.data.tasks import TASKS, TEST_SETS, eval_items, samples
from unichar_jax.errors import UserError
from workshop.miniworld.cast import member
from workshop.miniworld.draw import draw
from workshop.miniworld.world import sample_scene

SMALL = Wanted(
    vqa=3, image_mcq=2, knowledge=7, dialogue=8, dialogue_test=3, memorization=2, personality=2, rl_prompts=3
)
SMALLER = replace(SMALL, vqa=1, image_mcq=1, knowledge=1, dialogue=1, rl_prompts=1, knowledge_mcq=(1, 0, 0))
TALK = """\
Opening: Um... I am Wisp. Boo, maybe!

Image: 0.png
User: What are you doing there?
Wisp: Um... I count stones. Boo, maybe!

User: Who is your friend?
Wisp: Ola. She brings soup.
"""


@pytest.fixture(scope="session")
def _bare(tmp_path_factory) -> Path:
    """The held-back character of the mini world as its maker has it: ten pictures, a profile, some talk."""
    source = tmp_path_factory.mktemp("wisp")
    wisp, rng = member("Wisp"), np.random.default_rng(5)
    (source / "pictures").mkdir()
    for number in range(10):
        Image.fromarray(draw(wisp.look, sample_scene(rng), 64)).save(source / "pictures" / f"{number}.png")
    (source / "profile.txt").write_text(wisp.full_profile)
    (source / "talk.txt").write_text(TALK)
    made = new_character(
        "Wisp", source / "pictures", source / "profile.txt", source / "talk.txt", out=source / "data"
    )
    return made.folder


@pytest.fixture
def bare(_bare, tmp_path) -> Path:
    root = shutil.copytree(_bare.parents[2], tmp_path / "data")
    return root / "personalized_data" / "train" / "Wisp"


def config(folder: Path, url: str, wanted: Wanted = SMALL, **more) -> AnnotateConfig:
    return AnnotateConfig(folder, url, "stub", wanted=wanted, **more)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_bare_folder_becomes_a_whole_character(bare):
    before, stub = contents(bare.parents[2]), Stub()
    with endpoint(stub) as url:
        made = run(config(bare, url))
    assert contents(bare.parents[2]) == before  # the user's folder is only read
    root = bare.parents[2].with_name("data-annotated")
    report = check(root)
    assert report.ok, report.errors
    assert "Less than wished for" not in made.summary

    train, test = (read_character(root / "personalized_data" / s / "Wisp") for s in ("train", "test"))
    assert (len(train.images), len(test.images)) == (8, 2)
    assert all(samples(train, task) for task in TASKS)
    assert all(eval_items(train, name) or eval_items(test, name) for name in TEST_SETS)
    assert [len(s.qa_pairs) for s in train.scenes] == [3] * 8
    assert [len(s.mcq_items) for s in (*train.scenes, *test.scenes)] == [2] * 10
    assert all(s.thinking and s.generation_instruction for s in (*train.scenes, *test.scenes))
    assert (len(train.knowledge_qa), len(train.knowledge_mcq)) == (
        max(7, len(read_character(bare).knowledge_qa)),
        10,
    )
    assert Counter(q.difficulty for q in train.knowledge_mcq) == {"easy": 4, "medium": 4, "hard": 2}
    assert (len(train.extension_test), len(train.memorization), len(train.personality)) == (3, 2, 2)
    # The user's words come first and are kept.
    assert train.scenes[0].reply == "Um... I count stones. Boo, maybe!"
    assert train.extension_train[0].reply == "Ola. She brings soup."
    assert len(train.extension_train) == 1 + 8 + 8
    assert train.opening == test.opening == "Um... I am Wisp. Boo, maybe!"
    prompts = read_rl_prompts(root / "personalized_t2i" / "Wisp")
    assert len(prompts) == 3
    assert [len(p.questions) for p in prompts] == [3] * 3  # the repeated question is gone
    # Pictures are shown exactly where they are asked about.
    looked = {"caption", "exchange", "plan", "vqa", "image_mcq"}
    assert all(shown == (task in looked) for task, shown in stub.asked)


def test_keys_are_balanced_and_answers_follow_them(bare):
    with endpoint(Stub()) as url:
        made = run(config(bare, url))
    train = read_character(made.places.train)
    right = {i.value["question"]: i.value["answer"] for i in made.annotation.items("image_mcq")}
    asked = [q for s in train.scenes for q in s.mcq_items]
    counts = Counter(q.answer_key for q in asked)
    assert len(asked) == 16
    assert set(counts.values()) == {4}
    assert all(q.options[q.answer_key] == right[q.question] for q in asked)
    for count in range(9):
        spread = Counter(balanced_letters(count, "seed"))
        assert max(spread.values(), default=0) - min((spread[x] for x in "ABCD"), default=0) <= 1


def test_nothing_leaks_into_the_tests(bare):
    """A model that says in tests what training has is refused until it says something else."""
    said = {"user": "Tell me of the old clocks, please!", "reply": "Um... they tick. Boo!"}

    def fault(task, times):
        if task == "dialogue" and times == 1:
            return json.dumps([said])
        if task == "dialogue_test" and times == 1:
            return json.dumps([{**said, "user": "Please tell me of the old clocks!"}])
        return None

    with endpoint(Stub(fault)) as url:
        made = run(config(bare, url))
    train = read_character(made.places.train)
    test = read_character(made.places.test)
    trained = {d.user for d in train.extension_train}
    assert said["user"] in trained
    assert not trained & {d.user for d in train.extension_test}
    reasons = [r.reason for r in made.annotation.collected["dialogue_test", ""].rejected]
    assert reasons == [f"it is in the training data: {said['user']}"]
    assert not {s.user for s in test.scenes} & trained
    asked = [*train.memorization, *train.personality, *(d.user for d in train.extension_test)]
    assert len(set(asked)) == len(asked)
    pixels = [
        {p.read_bytes() for p in folder.glob("*.png")} for folder in (made.places.train, made.places.test)
    ]
    assert not pixels[0] & pixels[1]


def test_no_picture_is_asked_the_same_twice(bare):
    """A test question that training asks of the same picture is refused."""
    same = {"question": "What colour is the old boat there?", "answer": "Red.", "type": "objective"}
    choice = {"answer": "red", "wrong": ["blue", "green", "pink"], "difficulty": "easy", "rationale": "Seen."}

    def fault(task, times):
        if task == "vqa" and times == 1:
            return json.dumps([same])
        return json.dumps([same | choice]) if task == "image_mcq" and times == 1 else None

    with endpoint(Stub(fault)) as url:
        made = run(config(bare, url, SMALLER, workers=1))
    reasons = [r.reason for r in made.annotation.collected["image_mcq", "0"].rejected]
    assert reasons == [f"it is in the training data: {same['question']}"]


def test_it_goes_on_where_it_was_interrupted(bare):
    """The service dies half way; the same command asks only what is left, and the result is the same."""
    broken = Stub(lambda task, times: 401 if task == "knowledge" else None)
    with endpoint(broken) as url, pytest.raises(UserError, match=r"401.*UNICHAR_ENDPOINT_KEY.*goes on"):
        run(config(bare, url, workers=1))
    before = len(broken.asked)
    assert before > 30
    root = bare.parents[2].with_name("data-annotated")
    assert not (root / "personalized_data").exists()

    with_memory = (root / "annotation" / "Wisp" / "answers.jsonl").read_text()
    (root / "annotation" / "Wisp" / "answers.jsonl").write_text(with_memory + '{"key": "cut o')
    again = Stub()
    with endpoint(again) as url:
        made = run(config(bare, url, workers=1))
    assert {task for task, _ in again.asked} <= {
        "knowledge",
        "dialogue",
        "rl_prompts",
        "knowledge_mcq",
        "dialogue_test",
        "memorization",
        "personality",
    }
    first = contents(made.places.train)
    with endpoint(Stub(lambda task, times: 500)) as url:  # which nobody asks any more
        once_more = run(config(bare, url))
    assert once_more.annotation.asked == 0
    assert contents(made.places.train) == first


def test_a_busy_and_a_slow_service_get_time(bare):
    waits = []
    faults = {("caption", 1): 429, ("caption", 2): 503, ("plan", 1): "slow", ("vqa", 1): "silent"}
    stub = Stub(lambda task, times: faults.get((task, times)))
    with endpoint(stub) as url:
        made = run(config(bare, url, SMALLER, timeout=0.7), sleep=waits.append)
    assert check(made.places.train).ok
    assert len(waits) == 4
    assert Counter(t for t, _ in stub.asked)["plan"] == 11


def test_a_service_that_is_not_there(bare):
    with pytest.raises(UserError, match="Connection refused"):
        run(config(bare, "http://127.0.0.1:9/v1", attempts=1))
    assert not (bare.parents[2].with_name("data-annotated") / "personalized_data").exists()


@pytest.mark.parametrize(
    "nonsense",
    [
        "",
        "I am sorry, I cannot see pictures.",
        "[]",
        "[1, 2]",
        "{",
        "[" * 5000,
        '{"error": "no"}',
        "\x00\x1b[0m",
        '[{"caption": "',
    ],
)
def test_a_model_that_talks_nonsense_is_given_up_and_nothing_is_invented(bare, nonsense):
    stub = Stub(lambda task, times: nonsense)
    with endpoint(stub) as url:
        made = run(config(bare, url, SMALLER))
    assert check(made.places.train).ok  # what the user gave is still a character
    assert not [i for c in made.annotation.collected.values() for i in c.items]
    assert "caption 3: 0 of 1" in made.summary
    assert max(Counter(t for t, _ in stub.asked).values()) <= 2 * 10
    train = read_character(made.places.train)
    assert [s.reply for s in train.scenes] == ["Um... I count stones. Boo, maybe!"]


def test_the_model_is_told_why_it_was_refused(tmp_path):
    stub = Stub(lambda task, times: '[{"caption": "A ghost stands on a beach."}]' if times == 1 else None)
    answers = Answers(lambda prompt, image: stub.answer(prompt)[1], "stub", tmp_path / "answers.jsonl")
    found = collect(answers, "caption", 1, Facts("Wisp", ""), {"description": "a ghost"})
    assert [r.reason for r in found.rejected] == ["caption: it does not name Wisp"]
    assert "caption: it does not name Wisp" in stub.prompts[1]
    assert len(found.items) == 1


def test_the_review_page_and_its_decisions(bare, tmp_path):
    hostile = "Wisp waves </script><script>alert(1)</script> and <b>smiles</b>."
    stub = Stub(
        lambda task, times: json.dumps([{"caption": hostile}]) if (task, times) == ("caption", 1) else None
    )
    with endpoint(stub) as url:
        cfg = config(bare, url, SMALLER, workers=1)
        made = run(cfg)
        page = made.review.read_text()
        assert page.count("<script") == 2
        assert hostile not in page
        assert page.count("<fieldset") == sum(len(c.items) for c in made.annotation.collected.values())
        assert page.count("data:image/jpeg") >= 10
        shown = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))
        captions = [i for i in made.annotation.items("caption") if i.value["caption"] == hostile]
        dialogue = made.annotation.items("dialogue")[0]
        assert shown["values"][captions[0].id] == captions[0].value

        decisions = {
            "drop": [dialogue.id],
            "edit": {captions[0].id: {"caption": "Wisp waves and smiles."}},
        }
        path = tmp_path / "decisions.json"
        path.write_text(json.dumps(decisions))
        asked = len(stub.asked)
        again = run(replace(cfg, decisions=path))
        assert len(stub.asked) == asked
        texts = " ".join(p.read_text() for p in again.places.train.glob("*.json"))
        assert "Wisp waves and smiles." in texts or captions[0].part in [
            i.id for i in again.annotation.held_out
        ]
        assert dialogue.value["user"] not in texts
        assert "alert" not in texts
        assert check(again.places.train).ok
        run(cfg)  # decisions are remembered
        assert "alert" not in " ".join(p.read_text() for p in again.places.train.glob("*.json"))

        before = contents(again.places.train)
        path.write_text(
            json.dumps({"drop": [], "edit": {captions[0].id: {"caption": "no name here, sorry"}}})
        )
        with pytest.raises(UserError, match=f"{captions[0].id}: caption: it does not name Wisp"):
            run(replace(cfg, decisions=path))
        path.write_text("[1]")
        with pytest.raises(UserError, match="not decisions"):
            run(replace(cfg, decisions=path))
        assert contents(again.places.train) == before


def test_nothing_of_others_is_replaced(bare):
    with endpoint(Stub()) as url:
        cfg = config(bare, url, SMALLER)
        made = run(cfg)
        (made.places.train / "annotation.json").write_text("{}")
        with pytest.raises(UserError, match="changed since"):
            run(cfg)
        with pytest.raises(UserError, match="not written by this command"):
            run(replace(cfg, out=bare.parents[2]))  # over the user's own folder
    assert (made.places.train / "annotation.json").read_text() == "{}"


def test_mistakes_are_named(bare, tmp_path):
    with pytest.raises(UserError, match="--endpoint URL"):
        AnnotateConfig(bare)
    with pytest.raises(UserError, match="one of them"):
        AnnotateConfig(bare, "http://localhost:1", "m", run=tmp_path)
    with pytest.raises(UserError, match="model's name"):
        run(AnnotateConfig(bare, "http://localhost:1/v1"))
    with pytest.raises(UserError, match="too few"):
        run(config(bare, "http://localhost:1/v1", replace(SMALL, held_out=10)))
    (bare / "Wisp_full_profile.txt").unlink()
    with pytest.raises(UserError, match="no profile"):
        run(config(bare, "http://localhost:1/v1"))


def test_copies_of_a_training_picture_are_not_held_out(bare):
    last = Image.open(bare / "9.png").convert("RGB")
    last.putpixel((0, 0), (1, 2, 3))
    last.save(bare / "8.png")
    with endpoint(Stub()) as url:
        made = run(config(bare, url, SMALLER))
    assert [i.id for i in made.annotation.held_out] == ["6", "7"]


def test_the_command(bare, capsys):
    with endpoint(Stub()) as url:
        args = [
            "--endpoint",
            url,
            "--model",
            "stub",
            "--knowledge",
            "12",
            "--dialogues",
            "4",
            "--prompts",
            "2",
        ]
        assert main(["data", "annotate", str(bare), *args]) == 0
    printed = capsys.readouterr().out
    assert "review.html" in printed and "unichar data check" in printed
    root = bare.parents[2].with_name("data-annotated")
    assert main(["data", "check", str(root)]) == 0


def test_a_run_annotates(bare, monkeypatch):
    """The unified model in place of an endpoint: asked by the same prompts, shown the same pictures."""
    stub, seen = Stub(), []

    class Engine:
        def answer(self, image, prompt, settings):
            seen.append(image)
            return stub.answer(prompt)[1]

    monkeypatch.setattr("unichar_jax.app.engines.load_engine", lambda path: nullcontext(Engine()))
    cfg = AnnotateConfig(bare, run=bare.parent, wanted=SMALLER)
    made = run(cfg)
    assert check(made.places.train).ok
    assert {p.name for p in seen if p} == {f"{n}.png" for n in range(10)}
    assert run(cfg).annotation.asked == 0


def test_an_annotated_character_trains(bare, tmp_path, monkeypatch):
    """Two steps of Unified-SFT on what annotation made, thinking and questions included."""
    from unichar_jax.config import presets
    from unichar_jax.config.compute import MeshConfig
    from unichar_jax.config.train import SFTConfig
    from unichar_jax.training import sft
    from unichar_jax.training.metrics import read

    whole = sft.mesh_lib.make_mesh  # on one device; the sharded step has tests of its own
    monkeypatch.setattr(sft.mesh_lib, "make_mesh", lambda cfg: whole(MeshConfig(), jax.devices()[:1]))
    with endpoint(Stub()) as url:
        made = run(config(bare, url))
    cfg = presets.load(SFTConfig, "sft-debug")
    data = replace(cfg.data, path=str(made.places.train.parents[2]), characters=("Wisp",), rows_per_device=1)
    run_dir = tmp_path / "run"
    sft.train(replace(cfg, data=data, run_dir=str(run_dir), steps=2), quiet=True)
    assert [
        np.isfinite(record["loss"]) for record in read(run_dir / "metrics.jsonl") if "loss" in record
    ] == [True] * 2
