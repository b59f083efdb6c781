"""What a study reports: verdicts with known answers, and the page."""

from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image

from tests.workshop.study_folder import CHARACTERS, SEEDS, folder_of, results
from unichar_jax.errors import UserError
from unichar_jax.evaluation.results import Results
from workshop.study import claims
from workshop.study.claims import CLAIMS, Check, Claim, examine, judge
from workshop.study.design import OURS, PUBLISHED, STAGE2, VARIANTS, Study
from workshop.study.report import NUMBERS, PAGE, SHEET, page, write_report
from workshop.study.summary import COST, WITHIN_A_THIRD, Summary, joined, summarise

# -- verdicts -----------------------------------------------------------------------------------------------

LOW, HIGH, SPREAD = [0.1, 0.2, 0.1, 0.2], [0.9, 0.8, 0.9, 0.8], [0.0, 1.0, 0.0, 1.0]
IDENTITY, FOLLOWING, LIKELIHOOD = (
    ("t2i", "identity"),
    ("t2i", "prompt_following"),
    ("reply_likelihood", "nats_per_char"),
)


@pytest.mark.parametrize(
    ("check", "base", "sft", "verdict"),
    [
        (Check("sft", *IDENTITY, "base", 0.2), LOW, HIGH, "shows"),
        (Check("sft", *IDENTITY, "base", 0.2), HIGH, LOW, "does not show"),
        (Check("sft", *IDENTITY, "base", 0.2), LOW, [v + 0.1 for v in LOW], "does not show"),
        (Check("sft", *IDENTITY, "base"), LOW, [v + 0.1 for v in LOW], "shows"),
        (Check("sft", *IDENTITY, "base"), [0.5] * 4, SPREAD, "undecided"),
        (Check("sft", *IDENTITY, "base"), LOW, LOW, "undecided"),
        (Check("sft", *IDENTITY, "base", -0.05), LOW, LOW, "shows"),
        (Check("sft", *IDENTITY, "base", -0.05), HIGH, LOW, "does not show"),
        (Check("sft", *IDENTITY, least=0.7), LOW, HIGH, "shows"),
        (Check("sft", *IDENTITY, least=0.7), LOW, SPREAD, "undecided"),
        (Check("sft", *IDENTITY, least=0.7), HIGH, LOW, "does not show"),
        (Check("sft", *LIKELIHOOD, "base"), HIGH, LOW, "shows"),
        (Check("sft", *LIKELIHOOD, "base"), LOW, HIGH, "does not show"),
        (Check("sft", "t2i", "dino", "base"), LOW, HIGH, "not measured"),
        (Check("grpo", *IDENTITY, "sft"), LOW, HIGH, "not measured"),
    ],
)
def test_a_check_with_a_known_answer(check, base, sft, verdict, tmp_path):
    keys = (IDENTITY, LIKELIHOOD)
    summary = summarise(folder_of(tmp_path, {"base": {k: base for k in keys}, "sft": {k: sft for k in keys}}))
    found = examine(check, summary)
    assert found.verdict == verdict
    if verdict == "not measured":
        assert "no numbers of" in found.why
    else:
        assert len(found.by_seed) == len(SEEDS)
        assert found.interval.items == 4 * len(CHARACTERS)


def test_seeds_are_paired_where_both_are_there(tmp_path):
    """One seed of one variant is missing: what is compared is what both have."""
    folder = folder_of(tmp_path, {"sft": {IDENTITY: LOW}, "grpo": {IDENTITY: HIGH}}, characters=("Pip",))
    results({IDENTITY: [0.0] * 4}, "Pip").save(folder / "jobs/sft/Pip/seed-1/results.json")
    (folder / "jobs/grpo/Pip/seed-1/results.json").unlink()
    summary = summarise(folder)
    found = examine(Check("grpo", *IDENTITY, "sft"), summary)
    assert found.interval.mean == pytest.approx(0.7)
    assert found.by_seed == (pytest.approx(0.7),)
    assert "grpo/Pip/seed-1" in summary.missing
    assert summary.coverage("grpo") == (1, 2)


def test_what_was_trained_for_does_not_decide(tmp_path):
    reward, independent = Check("grpo", "t2i", "dino", "sft"), Check("grpo", *IDENTITY, "sft")
    both = {("t2i", "dino"): LOW, IDENTITY: LOW}
    folder = folder_of(tmp_path, {"sft": both, "grpo": {("t2i", "dino"): HIGH, IDENTITY: HIGH}})
    for path in folder.glob("jobs/grpo/*/*/results.json"):
        dataclasses.replace(Results.load(path), rewarded=("dino",)).save(path)
    summary = summarise(folder)
    assert examine(reward, summary).rewarded
    assert examine(reward, summary).verdict == "shows"
    alone = judge(Claim("us", "It is better.", (reward,)), summary)
    assert (alone.verdict, "trained for" in alone.why) == ("undecided", True)
    assert judge(Claim("us", "It is better.", (reward, independent)), summary).verdict == "shows"
    absent = Check("grpo", *FOLLOWING, "sft")
    assert judge(Claim("us", "It is better.", (absent, independent)), summary).verdict == "undecided"
    worse = Check("sft", *IDENTITY, "grpo")
    assert judge(Claim("us", "It is better.", (absent, worse)), summary).verdict == "does not show"
    assert judge(Claim("us", "It is better.", (absent,)), summary).verdict == "not measured"


def test_stage_2_is_compared_with_its_own_beginning_and_by_what_it_costs(tmp_path):
    folder = folder_of(
        tmp_path, {OURS: {IDENTITY: LOW}, PUBLISHED: {IDENTITY: LOW}}, characters=("Pip",), seeds=(0, 1)
    )
    curves = {
        (OURS, 0): [(0, 0.1), (100, 0.6), (200, 0.7)],
        (OURS, 1): [(0, 0.1), (100, 0.2), (200, 0.6)],
        (PUBLISHED, 0): [(0, 0.1), (300, 0.2), (600, 0.5)],
        (PUBLISHED, 1): [(0, 0.1), (300, 0.2), (600, 0.7)],
    }
    for (variant, seed), curve in curves.items():
        for place, (spent, reward) in enumerate(curve):
            values = {
                (STAGE2, "published_reward"): [reward, reward + 0.02],
                (STAGE2, "copied"): [0.1 * place] * 2,
            }
            results(
                values,
                "Pip",
                rewarded=("published_reward",),
                settings={"round": 5 * place, "model_evaluations": spent},
            ).save(folder / f"jobs/{variant}/Pip/seed-{seed}/rounds/round-{5 * place:06d}.json")
    summary = summarise(folder)
    assert summary.rounds(OURS) == [0, 5, 10]
    grew = examine(Check(f"{OURS}@last", STAGE2, "published_reward", f"{OURS}@first"), summary)
    assert (grew.verdict, grew.rewarded) == ("shows", True)
    assert grew.interval.mean == pytest.approx(0.55)
    assert (
        examine(Check(f"{OURS}@last", STAGE2, "copied", f"{OURS}@first"), summary).verdict == "does not show"
    )
    # Seed 0 reaches 0.51 after 100 of 600 evaluations, seed 1 never reaches 0.71.
    reached = summary.values(OURS, COST, WITHIN_A_THIRD)["Pip"]
    assert {item: set(seeds.values()) for item, seeds in reached.items()} == {
        "seed 0": {1.0},
        "seed 1": {0.0},
    }
    assert summary.was_rewarded(OURS, WITHIN_A_THIRD)


def test_claims_ask_for_what_variants_and_tasks_can_give():
    for claim in CLAIMS:
        assert claim.sentence.endswith(".")
        assert claim.source in claims.SOURCES
        for check in claim.checks:
            assert {s.partition("@")[0] for s in (check.first, check.second) if s} <= set(VARIANTS)
            assert check.task in (*Study().tasks, STAGE2, COST)
            assert claims.metric_of(check.metric).better in ("higher", "lower")
            assert check.asked


# -- the report ---------------------------------------------------------------------------------------------


def test_the_report_follows_from_saved_results_byte_by_byte(tmp_path):
    folder = folder_of(tmp_path / "study", {"base": {IDENTITY: LOW}, "sft": {IDENTITY: HIGH}})
    for number, name in enumerate(("base/Pip/untrained", "sft/Pip/seed-0")):
        home = folder / "jobs" / name
        (home / "pictures").mkdir()
        Image.new("RGB", (32, 32), (100 * number, 0, 0)).save(home / "pictures/0.png")
        found = Results.load(home / "results.json")
        records = (dataclasses.replace(found.records[0], picture="pictures/0.png"), *found.records[1:])
        dataclasses.replace(found, records=records).save(home / "results.json")
    first, second = tmp_path / "first", tmp_path / "second"
    text = write_report(folder, first).read_text()
    folder.rename(tmp_path / "moved")
    write_report(tmp_path / "moved", second)
    for name in (PAGE, NUMBERS, SHEET):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    (second / PAGE).unlink()
    write_report(second, second)
    for name in (PAGE, NUMBERS, SHEET):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert f"{len(CLAIMS)} claims: 1 borne out, 0 not borne out" in text
    assert "| Unified-SFT | base, name only | 2 | at least 20 points better | +70.0 [" in text
    assert "**Borne out:**\n\n- Unified-SFT draws the character from its name alone" in text
    # What is planned and not there is said: the folder's plan has adapters for two characters and two seeds.
    assert "6 of 10 planned jobs are done" in text
    assert (
        "| Unified-SFT, adapters only | 0 of 4 | Pip/seed-0, Luna/seed-0, Pip/seed-1, Luna/seed-1 |" in text
    )


def test_the_report_tells_the_command_without_the_base_at_hand():
    settings = json.loads(json.dumps(dataclasses.asdict(Study()), default=str)) | {"versions": {}}
    settings |= {"base": "not here", "repetitions": 1}
    for planned in ("out", "minutes", "characters", "seeds", "variants"):
        del settings[planned]
    summary = Summary(settings, ["base", "sft"], ["Pip"], [0, 2])
    told = page(summary)
    assert (
        "    python -m workshop.study run --out runs/study --characters Pip --seeds 0 2 --variants base sft"
        " --base 'not here' --repetitions 1\n" in told
    )


def test_parts_of_a_study_are_one(tmp_path):
    """Two sessions, each with a character of its own, report what one would have."""
    numbers = {"base": {IDENTITY: LOW, FOLLOWING: HIGH}, "sft": {IDENTITY: HIGH}}
    whole = folder_of(tmp_path / "whole", numbers)
    parts = [folder_of(tmp_path / name, numbers, characters=(name,)) for name in CHARACTERS]
    together = joined(*map(summarise, parts))
    alone = summarise(whole)
    for check in (Check("sft", *IDENTITY, "base"), Check("base", *FOLLOWING, least=0.5)):
        assert examine(check, together) == examine(check, alone)
    assert sorted(together.missing) == sorted(alone.missing)
    # A part that was reported already is as good as its folder.
    write_report(parts[0], tmp_path / "docs")
    write_report([tmp_path / "docs", parts[1]], tmp_path / "docs")
    assert Summary.load(tmp_path / "docs" / NUMBERS) == together
    other = json.loads((parts[1] / "study.json").read_text())
    other["settings"]["guidance"] = 2.0
    (parts[1] / "study.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"guidance = 4\.0 and 2\.0"):
        write_report(parts, tmp_path / "docs")


def test_the_later_part_counts(tmp_path):
    first = folder_of(tmp_path / "first", {"sft": {IDENTITY: LOW}}, characters=("Pip",), seeds=(0,))
    again = folder_of(tmp_path / "again", {"sft": {IDENTITY: HIGH}}, characters=("Pip",), seeds=(0, 1))
    both = joined(summarise(first), summarise(again))
    assert both.values("sft", *IDENTITY) == summarise(again).values("sft", *IDENTITY)
    assert both.seeds == [0, 1]


def test_an_empty_study_and_a_wrong_folder(tmp_path):
    folder = folder_of(tmp_path / "study", {})
    text = write_report(folder, tmp_path / "out").read_text()
    assert f"0 not borne out, 0 undecided, {len(CLAIMS)} not measured" in text
    assert not (tmp_path / "out" / SHEET).exists()
    with pytest.raises(UserError, match=r"study\.json"):
        write_report(tmp_path, tmp_path / "out2")
    (tmp_path / NUMBERS).write_text("[]")
    with pytest.raises(UserError, match="not the numbers of a study"):
        Summary.load(tmp_path / NUMBERS)
