"""Evaluation end to end with subjects whose results are known: resuming, sharding, pairing, what is said."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.evaluation.conftest import Scripted, gray
from unichar_jax.errors import UserError
from unichar_jax.evaluation import tables
from unichar_jax.evaluation.items import TASKS, items
from unichar_jax.evaluation.outputs import OutputStore
from unichar_jax.evaluation.pictures import Instruments
from unichar_jax.evaluation.results import Results, difference
from unichar_jax.evaluation.subject import Piped
from unichar_jax.evaluation.suite import Plan, collect, draw_seed, evaluate, known_tasks, measure, originals
from workshop.miniworld.texts import SAID, attributes_in_text
from workshop.miniworld.voices import PHRASES
from workshop.miniworld.world import ATTRIBUTES, LOOK_VALUES

PLAN = Plan(seeds=2)


def run(subject, case, folder, plan=PLAN, **options):
    options = {"instruments": Instruments(voices=PHRASES)} | options
    return evaluate(subject, [case], OutputStore(folder), plan, **options)


def facts_of(case):
    return {i.question: dict(i.options)[i.reference] for i in items(case, "knowledge_mcq")}


def knower(case, **options):
    """Answers every question with options rightly, and speaks as the character does."""
    right = facts_of(case)

    def score(prompt, answer):
        fact = right.get(prompt.text.split("\n")[0])
        if f"\n{answer}. {fact}\n" in prompt.text or answer == fact:
            return 0.0
        return -5.0 * len(answer.split())

    return Scripted(score=score, **options)


def test_results_are_known(pip, tmp_path):
    facts = facts_of(pip)
    subject = knower(
        pip, say=lambda prompt, seed: facts.get(prompt.text, "Ahoy, matey! Pancakes! Zip zap ahoy!")
    )
    results = run(subject, pip, tmp_path)
    mean = lambda task, metric: results.interval(task, metric).mean  # noqa: E731
    assert mean("knowledge_mcq", "accuracy") == 1.0
    assert mean("knowledge_mcq", "text_accuracy") == 1.0
    assert mean("knowledge_mcq", "answer_accuracy") == 1.0
    assert mean("image_mcq", "accuracy") == 0.25  # scores no letter above another
    assert (mean("dialogue", "voice"), mean("dialogue", "catchphrase"), mean("dialogue", "words")) == (
        1,
        1,
        6,
    )
    known = pip.train.attributes["memorization_answers"]
    share = sum(answer == "pancakes" for answer in known.values()) / len(known)
    assert mean("memorization", "expected_words") == pytest.approx(share)
    assert results.interval("t2i", "copied").mean == 0.0
    assert len(results.values("t2i", "copied")["Pip"]) == 3
    assert all(len(seeds) == 2 for seeds in results.values("t2i", "copied")["Pip"].values())
    assert "judged" in results.left_out
    assert "scene_t2i" not in {task for task, _ in results.measured}


def test_nothing_is_asked_twice(pip, tmp_path):
    first = Scripted()
    whole = run(first, pip, tmp_path)
    assert first.asked
    again = Scripted()
    assert run(again, pip, tmp_path).records == whole.records
    assert not again.asked
    another = Scripted(fingerprint="other")
    run(another, pip, tmp_path)
    assert len(another.asked) == len(first.asked)


def test_an_interrupted_run_goes_on(pip, tmp_path):
    whole = run(Scripted(), pip, tmp_path / "whole")
    calls = 0

    def stops(prompt, seed):
        nonlocal calls
        calls += 1
        if calls > 12:
            raise KeyboardInterrupt
        return f"reply {seed}"

    with pytest.raises(KeyboardInterrupt):
        run(Scripted(say=stops), pip, tmp_path / "cut")
    lines = tmp_path / "cut" / "outputs.jsonl"
    lines.write_text(lines.read_text()[:-30])  # the last line is cut off, too
    rest = Scripted()
    results = run(rest, pip, tmp_path / "cut")
    strip = lambda r: [(x.task, x.item, x.seed, dict(x.metrics), x.text) for x in r.records]  # noqa: E731
    assert strip(results) == strip(whole)
    assert len(rest.asked) > 0


def test_shards_give_the_numbers_of_one_process(pip, tmp_path):
    whole = run(Scripted(), pip, tmp_path / "one")
    seen = []
    for i in range(3):
        subject = Scripted()
        store = OutputStore(tmp_path / "many", writer=str(i))
        collect(subject, [pip], store, PLAN, shard=(i, 3))
        if i < 2:
            with pytest.raises(UserError, match="are missing"):
                measure([pip], store, subject.fingerprint, PLAN)
        seen += subject.asked
    store = OutputStore(tmp_path / "many")
    together = measure([pip], store, "scripted", PLAN, Instruments(voices=PHRASES))
    strip = lambda r: [(x.task, x.item, x.seed, dict(x.metrics), x.text) for x in r.records]  # noqa: E731
    assert strip(together) == strip(whole)
    reference = Scripted()
    run(reference, pip, tmp_path / "fresh")
    assert sorted(seen) == sorted(reference.asked)  # each was asked by one process


def test_changed_questions_are_asked_anew(pip, tmp_path):
    run(Scripted(), pip, tmp_path, Plan(("knowledge_mcq",)))
    described = Scripted()
    run(described, pip, tmp_path, Plan(("knowledge_mcq",), context="profile"))
    assert described.asked


def test_draws_depend_on_the_item_and_the_seed_alone(pip):
    todo = items(pip, "t2i")
    seeds = {draw_seed(item, s) for item in todo for s in range(3)}
    assert len(seeds) == 9
    told = items(pip, "t2i", "profile")
    assert [draw_seed(i, 1) for i in todo] == [draw_seed(i, 1) for i in told]


def oracle(case):
    """A judge that knows the held-out pictures by heart, and reads value 0 from all others."""
    truth = {}
    for image in case.test.images:
        scene = case.test.attributes["images"][image.id]["scene"]
        pixels = np.asarray(Image.open(image.path).convert("RGB")).tobytes()
        truth[pixels] = {**case.test.attributes["look"], **scene}

    class Oracle:
        attributes = SAID

        def read(self, pictures):
            found = {name: np.zeros((len(pictures), len(values))) for name, values in ATTRIBUTES.items()}
            for row, picture in enumerate(pictures):
                for name, values in ATTRIBUTES.items():
                    value = truth.get(picture.tobytes(), {}).get(name, values[0])
                    found[name][row, values.index(value)] = 1
            return found

    return Oracle()


def test_originals_are_what_a_perfect_model_gets(pip):
    results = originals([pip], Plan(tuple(TASKS)), Instruments(judge=oracle(pip), voices=PHRASES))
    for task, metric in (
        ("t2i", "identity"),
        ("t2i", "prompt_following"),
        ("t2t2i", "consistency"),
        ("dialogue", "voice"),
    ):
        assert results.interval(task, metric).mean == 1.0, (task, metric)
    assert results.interval("t2i", "copied").mean == 0.0
    assert {r.task for r in results.records} == {"dialogue", "t2i", "scene_t2i", "t2t2i"}
    assert results.left_out == {}


def test_two_specialists_in_a_row(pip, tmp_path):
    """The writer's reply is what the painter is asked to draw."""
    reply = "I feel sad and I am sitting in the snow at night."
    painter = Scripted(paint=lambda prompt, seed: gray(9))
    subject = Piped(Scripted(say=lambda prompt, seed: reply, fingerprint="writer"), painter)
    results = run(
        subject, pip, tmp_path, Plan(("t2t2i",), seeds=1), instruments=Instruments(judge=oracle(pip))
    )
    assert all(a.startswith("draw Character Description: Pip") and reply in a for a in painter.asked)
    stated = attributes_in_text(reply)
    right = sum(ATTRIBUTES[name][0] == value for name, value in stated.items())
    assert results.interval("t2t2i", "consistency").mean == right / len(stated)
    look = pip.train.attributes["look"]
    right = sum(look[name] == values[0] for name, values in LOOK_VALUES.items())
    assert results.interval("t2t2i", "identity").mean == pytest.approx(right / 6)


def test_results_survive_a_file(pip, tmp_path):
    results = run(Scripted(), pip, tmp_path, rewarded=("copied",))
    loaded = Results.load(results.save(tmp_path / "results.json"))
    assert loaded == Results(**{**vars(results), "settings": json.loads(json.dumps(results.settings))})
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="not results"):
        Results.load(tmp_path / "other.json")
    with pytest.raises(UserError, match="unichar evaluate"):
        Results.load(tmp_path / "absent.json")


def test_tables_say_what_matters(pip, tmp_path):
    base = run(Scripted(fingerprint="base"), pip, tmp_path, label="base")
    tuned = run(knower(pip, fingerprint="tuned"), pip, tmp_path, label="tuned", rewarded=("copied",))
    change = difference(base, tuned, "knowledge_mcq", "accuracy")
    assert change.mean == 0.75
    assert change.excludes_zero
    console = Console(file=io.StringIO(), width=200)
    tables.print_table([base, tuned], console)
    tables.print_by_character(tuned, console)
    shown = console.file.getvalue()
    line = next(x for x in shown.splitlines() if "knowledge_mcq" in x and "right answer" in x)
    assert "25.0 %" in line and "100.0 %" in line and "+75.0 [+75.0, +75.0]" in line and "77.0 %" in line
    copied = next(x for x in shown.splitlines() if "copies" in x and "%" in x)
    assert copied.count(tables.REWARD_MARK) == 1  # the tuned model's column only
    assert tables.REWARD_NOTE in " ".join(shown.split())
    assert "Not measured: judged" in " ".join(shown.split())
    row = next(r for r in tables.rows([base, tuned]) if (r.task, r.name) == ("knowledge_mcq", "accuracy"))
    assert tables.verdict(row) == "better"
    assert tables.verdict(next(r for r in tables.rows([base, tuned]) if r.name == "words")) == ""


def test_a_narrow_terminal_keeps_numbers_whole(pip, tmp_path):
    results = [run(Scripted(fingerprint=x), pip, tmp_path, label=x) for x in ("first", "second")]
    console = Console(file=io.StringIO(), width=80)
    tables.print_table(results, console)
    shown = console.file.getvalue()
    assert all(len(line) <= 80 for line in shown.splitlines())
    table = shown[: shown.index("Intervals are in the report")]
    assert "right answer" in table and "25.0 %" in table and "+0.0" in table
    assert "[" not in table and "…" not in table


def test_names_and_numbers_are_checked():
    assert known_tasks(["t2i", "knowledge_mcq"]) == ("knowledge_mcq", "t2i")
    with pytest.raises(UserError, match="did you mean 't2i'"):
        known_tasks(["t2"])
    with pytest.raises(UserError, match="at least 1"):
        Plan(seeds=0)
