"""The ablation study: order and resuming of jobs, the pipe, one real run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.evaluation.conftest import Scripted
from tests.workshop.study_folder import CHARACTERS, SEEDS, results
from unichar_jax.config import presets
from unichar_jax.config.train import SFTConfig
from unichar_jax.errors import UserError
from unichar_jax.evaluation.results import Results
from workshop.study import work
from workshop.study.design import PUBLISHED, STAGE2, VARIANTS, Study, jobs
from workshop.study.report import NUMBERS, PAGE, SHEET
from workshop.study.summary import Summary
from workshop.study.work import Worker, changed, run

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
        order.index(PUBLISHED) < order.index("pictures_1") < order.index("lora") < order.index("no_diversity")
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
    monkeypatch.setattr(work, "Worker", Recorded)
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
    variants = ("sft", "text_only", "image_only", "piped", "grpo", "pictures_3", "no_diversity", "lora")
    study = Study(out=tmp_path, characters=("Pip",), seeds=(0,), variants=variants, encoders="")
    run(study, say=lambda text: None)
    assert [p.split("/")[0] for p in recorded] == [
        *("sft", "text_only", "image_only", "piped", "grpo", "pictures_3", "lora", "no_diversity")
    ]
    assert left == [
        {"sft"},
        {"sft", "text_only"},
        {"sft", "text_only", "image_only"},
        {"sft"},
        set(),
        {"pictures_3"},
        {"pictures_3"},
        set(),
    ]
    assert (tmp_path / "jobs/sft/Pip/seed-0/metrics.jsonl").is_file()
    # What an earlier call planned and did not do still counts.
    (tmp_path / "jobs/grpo/Pip/seed-0/results.json").unlink()
    (tmp_path / "jobs/sft/Pip/seed-0/run/checkpoints").mkdir(parents=True)
    (tmp_path / "jobs/lora/Pip/seed-0/results.json").unlink()
    run(dataclasses.replace(study, variants=("lora",)), say=lambda text: None)
    assert left[-1] == {"sft"}


def test_a_variant_changes_what_it_says_of_the_recipe(tmp_path):
    worker = Worker(Study(out=tmp_path))
    worker.data = lambda character, count=10: tmp_path  # type: ignore[method-assign]
    plain, few, without = (
        worker.grpo_config(VARIANTS[name], "Pip", 3, tmp_path, tmp_path)
        for name in ("grpo", "few_grpo", "no_diversity")
    )
    assert plain.whole_std and not few.whole_std and few.rounds < plain.rounds
    weights = {t.name: t.weight for t in few.reward}
    assert weights == {t.name: t.weight for t in plain.reward}
    assert {t.name: t.weight for t in without.reward} == weights | {"diversity": 0.0}
    assert dataclasses.replace(without, reward=few.reward) == few
    published, gentle = (
        worker.grpo_config(VARIANTS[name], "Pip", 3, tmp_path, tmp_path)
        for name in ("few_flow_grpo", "few_gentle_flow_grpo")
    )
    assert gentle.algorithm == published.algorithm == "flow_grpo" and gentle.rollout == published.rollout
    assert {t.name: t.options for t in gentle.reward} == {t.name: t.options for t in plain.reward}
    odd = dataclasses.replace(VARIANTS["few_grpo"], weights={"beauty": 1.0})
    with pytest.raises(UserError, match="no reward term \\['beauty'\\]"):
        worker.grpo_config(odd, "Pip", 3, tmp_path, tmp_path)


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
    script = [sys.executable, "-m", "workshop.study"]
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
    assert len(rewards) == Study().held_out
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
