"""The ablation study: order and resuming of jobs, verdicts with known answers, the pipe, the report, one real run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from tests.evaluation.conftest import Scripted
from unichar_jax.app import study_claims, study_work
from unichar_jax.app.study import OURS, PUBLISHED, STAGE2, VARIANTS, Study, jobs
from unichar_jax.app.study_claims import CLAIMS, Check, Claim, examine, judge
from unichar_jax.app.study_report import NUMBERS, PAGE, SHEET, page, write_report
from unichar_jax.app.study_summary import COST, WITHIN_A_THIRD, Summary, joined, summarise
from unichar_jax.app.study_work import Worker, changed, run
from unichar_jax.config import presets
from unichar_jax.config.train import SFTConfig
from unichar_jax.errors import UserError
from unichar_jax.evaluation.results import Record, Results

CHARACTERS, SEEDS = ("Pip", "Luna"), (0, 1)


def results(values: Mapping[tuple[str, str], list[float]], character: str, **fields) -> Results:
    """One record for every item: ``(task, metric) -> the items' values``."""
    records = [
        Record(task, character, f"{character}/{item}", 0, {metric: value}, f"{character} {item}")
        for (task, metric), column in values.items()
        for item, value in enumerate(column)
    ]
    return Results("a variant", "", tuple(records), **fields)


def folder_of(
    root: Path,
    numbers: Mapping[str, Mapping[tuple[str, str], list[float]]],
    *,
    characters=CHARACTERS,
    seeds=SEEDS,
) -> Path:
    """A study's folder whose jobs found these numbers, equal for all characters and seeds."""
    plan = {
        "settings": json.loads(json.dumps(Study(out=root).settings())),
        "versions": {"jax": "1"},
        "variants": [v for v in VARIANTS if v in numbers or v == "lora"],
        "characters": list(characters),
        "seeds": list(seeds),
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "study.json").write_text(json.dumps(plan))
    for job in jobs(list(numbers), characters, seeds):
        results(numbers[job.variant.name], job.character).save(root / "jobs" / job.place / "results.json")
    return root


# -- jobs ---------------------------------------------------------------------------------------------------


def test_what_matters_most_comes_first():
    found = [job.place for job in jobs(tuple(VARIANTS), CHARACTERS, SEEDS)]
    assert len(set(found)) == len(found)
    first = [place.split("/") for place in found]
    assert first[0] == ["originals", "Pip", "untrained"]
    untrained = [p for p in first if p[2] == "untrained"]
    assert untrained == first[: len(untrained)]
    assert {p[0] for p in untrained} == {"originals", "base", "profile", "profile_picture"}
    assert len(untrained) == 4 * 2
    order = list(dict.fromkeys(p[0] for p in first))
    assert order.index("sft") < order.index("piped") < order.index("grpo") < order.index("early")
    assert (
        order.index(PUBLISHED) < order.index("lora") < order.index("pictures_1") < order.index("no_diversity")
    )
    assert found.index("sft/Luna/seed-1") < found.index("text_only/Pip/seed-0")
    # A pipe follows its own two specialists at once, so that their checkpoints can go.
    at = found.index("piped/Pip/seed-0")
    assert found[at - 2 : at] == ["text_only/Pip/seed-0", "image_only/Pip/seed-0"]


class Recorded(Worker):
    """Does jobs by writing a file; every training run leaves a large one."""

    done: list[str]

    def do(self, job):
        self.done.append(job.place)
        for needed in job.runs:
            run_dir = self.study.out / "jobs" / needed / "run"
            (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            (run_dir / "metrics.jsonl").write_text("{}\n")
        results({("t2i", "identity"): [1.0]}, job.character).save(
            self.study.out / "jobs" / job.place / "results.json"
        )


@pytest.fixture
def recorded(monkeypatch) -> list[str]:
    done: list[str] = []
    monkeypatch.setattr(Recorded, "done", done, raising=False)
    monkeypatch.setattr(study_work, "Worker", Recorded)
    return done


def test_goes_on_where_it_was(recorded, tmp_path):
    study = Study(out=tmp_path, characters=("Pip",), seeds=(0,), variants=("base", "sft"), encoders="")
    run(study, say=lambda text: None)
    assert recorded == ["base/Pip/untrained", "sft/Pip/seed-0"]
    (tmp_path / "jobs/sft/Pip/seed-0/results.json").unlink()
    more = dataclasses.replace(study, seeds=(0, 1), variants=("sft",))
    said: list[str] = []
    run(dataclasses.replace(more, minutes=0.0), said.append)
    assert recorded[2:] == []
    assert "2 jobs are left" in said[-1]
    run(more, say=lambda text: None)
    assert recorded[2:] == ["sft/Pip/seed-0", "sft/Pip/seed-1"]
    plan = json.loads((tmp_path / "study.json").read_text())
    assert (plan["seeds"], plan["variants"]) == ([0, 1], ["base", "sft"])
    with pytest.raises(UserError, match="begun with guidance = 4.0"):
        run(dataclasses.replace(study, guidance=2.0))
    with pytest.raises(UserError, match="did you mean 'early_flow_grpo'"):
        Study(variants=("early_flow_gpo",))


def test_checkpoints_stay_as_long_as_a_later_job_starts_from_them(recorded, tmp_path, monkeypatch):
    left: list[set[str]] = []
    forget = Recorded.forget

    def watched(self, keep):
        forget(self, keep)
        left.append({p.relative_to(tmp_path / "jobs").parts[0] for p in tmp_path.glob("jobs/*/*/*/run")})

    monkeypatch.setattr(Recorded, "forget", watched)
    variants = ("sft", "text_only", "image_only", "piped", "grpo", "early", "no_diversity", "lora")
    study = Study(out=tmp_path, characters=("Pip",), seeds=(0,), variants=variants, encoders="")
    run(study, say=lambda text: None)
    assert [p.split("/")[0] for p in recorded] == [
        *("sft", "text_only", "image_only", "piped", "grpo", "early", "lora", "no_diversity")
    ]
    assert left == [
        {"sft"},
        {"sft", "text_only"},
        {"sft", "text_only", "image_only"},
        {"sft"},
        set(),
        {"early"},
        {"early"},
        set(),
    ]
    assert (tmp_path / "jobs/sft/Pip/seed-0/metrics.jsonl").is_file()
    # What an earlier call planned and did not do still counts.
    (tmp_path / "jobs/grpo/Pip/seed-0/results.json").unlink()
    (tmp_path / "jobs/sft/Pip/seed-0/run/checkpoints").mkdir(parents=True)
    (tmp_path / "jobs/lora/Pip/seed-0/results.json").unlink()
    run(dataclasses.replace(study, variants=("lora",)), say=lambda text: None)
    assert left[-1] == {"sft"}


def test_a_study_without_its_judge_does_not_begin(tmp_path):
    (tmp_path / "encoders").mkdir()
    cfg = Study(out=tmp_path / "study", characters=("Pip",), encoders=str(tmp_path / "encoders"))
    with pytest.raises(UserError, match="make them first"):
        run(cfg, say=lambda text: None)


def test_a_variant_is_a_configuration(tmp_path):
    worker = Worker(Study(out=tmp_path, base="mini", steps=7, test_pictures=2))
    made = {
        name: worker.sft_config(VARIANTS[name], "Pip", 3, tmp_path / "run")
        for name in ("sft", "text_only", "image_only", "lora", "pictures_1")
    }
    assert {c.steps for c in made.values()} == {7}
    assert {(c.seed, c.data.seed) for c in made.values()} == {(3, 3)}
    assert made["lora"].trainable == "lora"
    assert made["lora"].lora.rank > 0
    assert not set(made["text_only"].data.tasks) & set(made["image_only"].data.tasks)
    assert made["sft"].data.tasks == presets.load(SFTConfig, "sft-mini").data.tasks
    assert "1-pictures" in made["pictures_1"].data.path
    for count in (1, 10):
        pictures = tmp_path / f"data/{count}-pictures/personalized_data/train/Pip"
        assert len(list(pictures.glob("*.png"))) == count
    stage2 = worker.grpo_config(VARIANTS["no_diversity"], "Pip", 1, tmp_path / "sft", tmp_path / "run")
    weights = {t.name: t.weight for t in stage2.reward}
    assert weights["diversity"] == 0
    assert sum(w > 0 for w in weights.values()) == len(weights) - 1
    with pytest.raises(UserError, match="did you mean"):
        changed(presets.load(SFTConfig, "sft-mini"), {"optimizer.learning_rat": 1.0})


def test_the_pipe_writes_with_one_and_draws_with_the_other(tmp_path, monkeypatch):
    asked: dict[str, list[str]] = {}

    def trained(self, variant, character, seed):
        return tmp_path / variant.name

    def subject(self, path, stack):
        made = Scripted(fingerprint=path.name, say=lambda prompt, seed: f"{path.name} speaks")
        asked[path.name] = made.asked
        return made

    monkeypatch.setattr(Worker, "trained", trained)
    monkeypatch.setattr(Worker, "_subject", subject)
    study = Study(
        out=tmp_path,
        encoders="",
        characters=("Pip",),
        repetitions=1,
        test_pictures=2,
        tasks=("vqa", "t2i", "t2t2i"),
    )
    [job] = jobs(("piped",), ("Pip",), (0,))
    Worker(study).do(job)
    assert {line.split()[0] for line in asked["text_only"]} == {"write", "score"}
    assert {line.split()[0] for line in asked["image_only"]} == {"draw"}
    found = Results.load(tmp_path / "jobs" / job.place / "results.json")
    assert {r.text for r in found.records if r.task == "t2t2i"} == {"text_only speaks"}
    # The reply that was written is what is drawn.
    assert sum("text_only speaks" in line for line in asked["image_only"]) == 2
    # A first picture of each caption stays, by a path that moves with the folder; everything else goes.
    kept = [r.picture for r in found.records if r.picture]
    assert len(kept) == 2
    assert all((tmp_path / "jobs" / job.place / path).is_file() for path in kept)
    assert not (tmp_path / "jobs" / job.place / "outputs").exists()


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
        assert claim.source in study_claims.SOURCES
        for check in claim.checks:
            assert {s.partition("@")[0] for s in (check.first, check.second) if s} <= set(VARIANTS)
            assert check.task in (*Study().tasks, STAGE2, COST)
            assert study_claims.metric_of(check.metric).better in ("higher", "lower")
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
    assert "| Unified-SFT | base, name only | at least 20 points better | +70.0 [" in text
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
        "    python scripts/study.py run --out runs/study --characters Pip --seeds 0 2 --variants base sft"
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


# -- for real -----------------------------------------------------------------------------------------------

STAGE2_CONFIG = """
prompts_per_round = 2
group = 2
held_out = 2
pictures_every = 0
rollout = {{ height = 32, width = 32, num_timesteps = 3, window_range = [0, 2], text_scale = 1.0 }}
reward = [{{ name = "{folder}/own.py:bright" }}]
lora = {{ rank = 2, experts = ["gen"] }}
compute = {{ dtype = "float32" }}
eval = {{ every = 1, pictures = 2, num_timesteps = 3 }}
"""


@pytest.mark.slow
def test_a_study_of_a_random_model_from_end_to_end(tmp_path):
    """One step of everything, through the script, in a process with one device as users have it."""
    from unichar_jax.checkpoint import store
    from unichar_jax.config.model import model_preset
    from unichar_jax.data.tokenizer import write_debug_tokenizer
    from unichar_jax.models import params
    from unichar_jax.models.autoencoder import Autoencoder
    from unichar_jax.models.unified import UnifiedModel

    words = tmp_path / "tokenizer"
    words.mkdir()
    write_debug_tokenizer(words)
    cfg = model_preset("debug")
    model = params.initialize(UnifiedModel(cfg), 0)
    autoencoder = params.initialize(Autoencoder(cfg.autoencoder), 1)
    store.write_bagel(tmp_path / "base", model, cfg, autoencoder, tokenizer_files_from=words)
    (tmp_path / "own.py").write_text("def bright(images, context):\n    return images.mean(axis=(1, 2, 3))\n")
    (tmp_path / "stage2.toml").write_text(STAGE2_CONFIG.format(folder=tmp_path))
    study = tmp_path / "study"
    script = [sys.executable, str(REPOSITORY / "scripts" / "study.py")]
    run = [*script, "run", "--out", str(study), "--characters", "Pip", "--seeds", "0", "--encoders", ""]
    run += ["--base", str(tmp_path / "base"), "--sft", "sft-debug", "--steps", "1", "--rounds", "1"]
    run += ["--grpo", str(tmp_path / "stage2.toml"), "--published", str(tmp_path / "stage2.toml")]
    run += ["--tasks", "t2i", "t2t2i", "--repetitions", "1", "--test-pictures", "1"]
    run += [
        "--draw-steps",
        "2",
        "--max-tokens",
        "4",
        "--variants",
        "originals",
        "base",
        "sft",
        "piped",
        "grpo",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}

    def call(command: list[str]) -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "5 jobs, 0 of them done" in call(run)
    assert "5 jobs, 5 of them done" in call(run)
    assert not list(study.glob("jobs/*/*/*/run"))
    assert not list(study.glob("jobs/*/*/*/outputs"))
    call([*script, "report", str(study), "--to", str(tmp_path / "docs")])
    summary = Summary.load(tmp_path / "docs" / NUMBERS)
    assert summary.missing == []
    assert set(summary.numbers) == {"originals", "base", "sft", "piped", "grpo", "grpo@0", "grpo@1"}
    assert summary.rounds("grpo") == [0, 1]
    rewards = summary.values("grpo@last", STAGE2, "reward")["Pip"]
    assert len(rewards) == 2
    assert all(0 < seeds[0] < 1 for seeds in rewards.values())
    found = {
        name: Results.load(study / f"jobs/{name}/Pip/seed-0/results.json")
        for name in ("sft", "piped", "grpo")
    }
    assert len({r.fingerprint for r in found.values()}) == 3
    assert all({r.task for r in one.records} == {"t2i", "t2t2i"} for one in found.values())
    sheet = Image.open(tmp_path / "docs" / SHEET)
    assert sheet.width > 5 * 128
    assert "incomplete" not in (tmp_path / "docs" / PAGE).read_text()
