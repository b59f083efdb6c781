"""Doing the jobs of a study: a folder of results that fills, and goes on where it was.

A job trains what is not trained yet, asks the same held-out items as every other job, saves one file of results
and forgets its checkpoints as soon as no later job starts from them. A job whose results are there is never done
again.

    <out>/study.json                                    settings, and what is planned
    <out>/data/<n>-pictures/personalized_data/...       the characters, the same for all seeds
    <out>/jobs/<variant>/<character>/<seed>/results.json, pictures/, rounds/ (stage 2), metrics.jsonl, run/
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unichar_jax.app import engines
from unichar_jax.app.evaluate import versions
from unichar_jax.checkpoint import runs
from unichar_jax.config import presets
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.train import SFTConfig
from unichar_jax.data.rl_prompts import RLPrompt
from unichar_jax.errors import UserError
from unichar_jax.evaluation import pictures
from unichar_jax.evaluation.instruments import find_instruments, rewarded_metrics
from unichar_jax.evaluation.items import Case, Item, read_case
from unichar_jax.evaluation.outputs import Output, OutputStore
from unichar_jax.evaluation.results import Record, Results
from unichar_jax.evaluation.subject import EngineSubject, Piped, Prompt, Subject, weights_fingerprint
from unichar_jax.evaluation.suite import Plan, evaluate, originals
from unichar_jax.files import write_text
from unichar_jax.sampling.text import TextSettings
from unichar_jax.training.grpo.rewards import Scores
from workshop.miniworld.cast import member
from workshop.miniworld.voices import PHRASES
from workshop.miniworld.write import write_character
from workshop.study.design import (
    ALL_PICTURES,
    REWARDS,
    STAGE2,
    VARIANTS,
    Job,
    Study,
    Variant,
    differing,
    jobs,
    place,
    plan_of,
    shipped,
)


def run(study: Study, say: Callable[[str], None] | None = None) -> Path:
    """Does the jobs that are not done; returns the study's folder.

    Args:
      study: what is asked for.
      say: told what happens, a line at a time; by default the terminal is.

    Raises:
      UserError: the folder was made with other settings, or the base, a configuration or the encoders are absent.
    """
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    started = time.monotonic()
    plan = _register(study)
    done = lambda job: (study.out / "jobs" / job.place / "results.json").is_file()  # noqa: E731
    asked = jobs(study.variants, study.characters, study.seeds)
    todo = [job for job in asked if not done(job)]
    say(f"{len(asked)} jobs, {len(asked) - len(todo)} of them done")
    worker = Worker(study)
    if todo:
        worker.check()
    for number, job in enumerate(todo):
        if study.minutes is not None and time.monotonic() - started >= 60 * study.minutes:
            say(f"the time is over; {len(todo) - number} jobs are left, and the same command goes on")
            break
        since = time.monotonic()
        worker.do(job)
        # All that is planned counts, not only what was asked for this time.
        worker.forget(keep={folder for later in plan if not done(later) for folder in later.runs})
        say(f"{number + 1}/{len(todo)} {job.place}: {time.monotonic() - since:.0f} s")
    return study.out


def _register(study: Study) -> list[Job]:
    """Checks the folder's settings, adds to what is planned in it, and returns all that is planned."""
    path = study.out / "study.json"
    settings = study.settings()
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {"settings": settings}
    for name, (old, new) in differing(known["settings"], settings).items():
        raise UserError(
            f"{path}: this study was begun with {name} = {old!r}, and now it is {new!r}; numbers would not be"
            " comparable. Use the old value, or another --out."
        )
    known |= plan_of(known, vars(study))
    known.setdefault("versions", versions())
    study.out.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(known, indent=1) + "\n")
    return jobs(known["variants"], known["characters"], known["seeds"])


# -- doing a job --------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """Trains and evaluates; everything it makes is below the study's folder."""

    study: Study

    def check(self) -> None:
        """Finds out now what would otherwise stop the study after hours.

        Raises:
          UserError: the base or the encoders are not there.
        """
        shipped(self.study.base)
        _ = self.instruments

    def do(self, job: Job) -> None:
        """Trains what the job needs, measures it, saves ``results.json`` last."""
        folder = self.study.out / "jobs" / job.place
        folder.mkdir(parents=True, exist_ok=True)
        found = self._measure(job, folder)
        kept = _keep_pictures(found, folder)
        dataclasses.replace(kept, settings={**kept.settings, "seed": job.seed}).save(folder / "results.json")
        shutil.rmtree(folder / "outputs", ignore_errors=True)

    def forget(self, keep: set[str]) -> None:
        """Removes training runs that no later job needs; their curves and configurations stay."""
        for run_dir in (self.study.out / "jobs").glob("*/*/*/run"):
            home = run_dir.parent
            if home.relative_to(self.study.out / "jobs").as_posix() not in keep:
                for name in (runs.INFO_FILE, "metrics.jsonl", "held_out.jsonl"):
                    if (run_dir / name).is_file():
                        shutil.copy(run_dir / name, home)
                shutil.rmtree(run_dir)

    # -- the character

    def data(self, character: str, count: int = ALL_PICTURES) -> Path:
        """The folder with ``personalized_data/`` and ``personalized_t2i/``; drawn when first asked for."""
        root = self.study.out / "data" / f"{count}-pictures"
        if not (root / "personalized_t2i" / character).is_dir():  # what is written last
            write_character(
                member(character),
                root,
                train_images=count,
                test_images=self.study.test_pictures,
                overwrite=True,
            )
        return root

    def case(self, character: str) -> Case:
        """What everybody is measured on: with all pictures, whatever the variant has seen."""
        return read_case(self.data(character) / "personalized_data" / "train" / character)

    @cached_property
    def instruments(self) -> pictures.Instruments:
        found = find_instruments(shipped(self.study.encoders) if self.study.encoders else None)
        if self.study.encoders and found.missing:
            raise UserError(
                f"encoders '{self.study.encoders}': {'; '.join(found.missing.values())}. A study without them would"
                " answer few questions; make them first, or say --encoders '' to measure words only."
            )
        # Replies are told apart by their words, with encoders or without.
        return found if found.voices else dataclasses.replace(found, voices=PHRASES)

    # -- training

    def trained(self, variant: Variant, character: str, seed: int) -> Path:
        """The variant's finished training run; trained now if it is not there."""
        run_dir = self.study.out / "jobs" / place(variant.name, character, seed) / "run"
        cfg: SFTConfig | GRPOConfig
        if variant.grpo:
            start = self.trained(VARIANTS[variant.start], character, seed)
            cfg = self.grpo_config(variant, character, seed, start, run_dir)
        else:
            cfg = self.sft_config(variant, character, seed, run_dir)
        last = cfg.rounds if isinstance(cfg, GRPOConfig) else cfg.steps
        if runs.is_run(run_dir) and last in runs.complete_steps(run_dir):
            return run_dir
        if isinstance(cfg, GRPOConfig):
            from unichar_jax.training import grpo

            return grpo.train(cfg, observe=self._observer(variant, character, cfg, run_dir), quiet=True)
        from unichar_jax.training import sft

        return sft.train(cfg, quiet=True)

    def sft_config(self, variant: Variant, character: str, seed: int, run_dir: Path) -> SFTConfig:
        preset = presets.load(SFTConfig, self.study.sft)
        fields = {
            "base": str(shipped(self.study.base)),
            "run_dir": str(run_dir),
            "seed": seed,
            "steps": self.study.steps or preset.steps,
            "save.keep": 1,
            "data.path": str(self.data(character, variant.pictures) / "personalized_data"),
            "data.characters": [character],
            "data.seed": seed,
        }
        return changed(preset, fields | dict(variant.sft or {}))

    def grpo_config(
        self, variant: Variant, character: str, seed: int, start: Path, run_dir: Path
    ) -> GRPOConfig:
        preset = presets.load(GRPOConfig, getattr(self.study, variant.grpo))
        rewarding = getattr(self.study, variant.reward_of or variant.grpo)
        terms = [dataclasses.asdict(t) for t in presets.load(GRPOConfig, rewarding).reward]
        unknown = variant.weights.keys() - {t["name"] for t in terms}
        if unknown:
            raise UserError(
                f"variant '{variant.name}': '{rewarding}' has no reward term {sorted(unknown)}; leave the"
                " variant out."
            )
        fields = {
            "base": str(start),
            "run_dir": str(run_dir),
            "prompts": str(self.data(character) / "personalized_t2i" / character),
            "encoders": self.study.encoders,
            "rounds": self.study.rounds or preset.rounds,
            "held_out": self.study.held_out,
            "seed": seed,
            "save.keep": 1,
            "reward": [t | {"weight": variant.weights.get(t["name"], t["weight"])} for t in terms],
        }
        return changed(preset, fields | dict(variant.stage2))

    def _observer(
        self, variant: Variant, character: str, cfg: GRPOConfig, run_dir: Path
    ) -> Callable[[int, Sequence[RLPrompt], np.ndarray, Scores], None]:
        """Measures what stage 2 draws of its held-out prompts, with who is no reward, into ``rounds/``."""
        from unichar_jax.checkpoint import store
        from unichar_jax.plan.grpo import round_cost
        from unichar_jax.training.grpo.rewards import term_label

        case = self.case(character)
        published = presets.load(GRPOConfig, self.study.published).reward
        weights = {term_label(t.name): t.weight for t in published}
        cost = round_cost(cfg, store.load_config(runs.resolve(cfg.base)))
        rewarded = (*REWARDS, *rewarded_metrics(dataclasses.asdict(cfg)))

        def observe(done: int, prompts: Sequence[RLPrompt], images: np.ndarray, scores: Scores) -> None:
            rows: list[dict[str, float]] = [{"reward": float(r)} for r in scores.rewards]
            if weights.keys() <= scores.terms.keys():
                for i, row in enumerate(rows):
                    row["published_reward"] = float(sum(w * scores.terms[n][i] for n, w in weights.items()))
            texts = [p.text for p in prompts]
            with tempfile.TemporaryDirectory() as folder:
                drawn = []
                for i, prompt in enumerate(prompts):
                    path = f"{folder}/{i}.png"
                    Image.fromarray(np.asarray(images[i])).save(path)
                    item = Item(STAGE2, prompt.scene_id, character, Prompt(prompt.text), prompt.text)
                    drawn.append(Output(item, texts[:i].count(prompt.text), {"picture": path}))
                measured = pictures.measure(case, drawn, self.instruments)
            records = [
                Record(STAGE2, character, o.item.key, o.seed, {**measure, **row}, o.item.question)
                for o, measure, row in zip(drawn, measured, rows, strict=True)
            ]
            spent = {"round": done, "model_evaluations": round(done * (cost.draw + cost.learn))}
            results = Results(variant.title, "", tuple(records), rewarded, settings=spent)
            results.save(run_dir.parent / "rounds" / f"round-{done:06d}.json")

        return observe

    # -- measuring

    def _measure(self, job: Job, folder: Path) -> Results:
        variant, study, case = job.variant, self.study, self.case(job.character)
        tasks = tuple(t for t in study.tasks if t in (variant.tasks or study.tasks))
        plan = Plan(tasks, study.repetitions, variant.context)
        if variant.held_out:
            return originals([case], plan, self.instruments, variant.title)
        rewarded: tuple[str, ...] = ()
        if job.seed is None:
            models = [shipped(study.base)]
        else:
            names = variant.pipe or (variant.name,)
            models = [self.trained(VARIANTS[name], job.character, job.seed) for name in names]
            rewarded = tuple(
                sorted({m for c in runs.read_info(models[-1]).lineage for m in rewarded_metrics(c)})
            )
        with ExitStack() as stack:
            subjects = [self._subject(path, stack) for path in models]
            subject = Piped(subjects[0], subjects[1]) if variant.pipe else subjects[0]
            store = OutputStore(folder / "outputs")
            return evaluate(
                subject, [case], store, plan, self.instruments, label=variant.title, rewarded=rewarded
            )

    def _subject(self, path: Path, stack: ExitStack) -> Subject:
        small = engines.is_small(path)
        engine = stack.enter_context(engines.load_engine(path, "float32" if small else "bfloat16"))
        return EngineSubject(
            engine,
            weights=weights_fingerprint(runs.resolve(path)),
            writing=TextSettings(max_tokens=self.study.max_tokens, temperature=self.study.temperature),
            drawing=engines.flow_settings(self.study.draw_steps, self.study.guidance, path),
        )


# -- small things -------------------------------------------------------------------------------------------


def changed(cfg: Any, fields: Mapping[str, Any]) -> Any:
    """A frozen configuration with some fields replaced, named as on the command line (``data.tasks``)."""
    tree = json.loads(presets.to_json(cfg))
    for name, value in fields.items():
        *path, last = name.split(".")
        table = tree
        for key in path:
            table = table[key]
        table[last] = value
    return presets.from_dict(type(cfg), tree)


def _keep_pictures(results: Results, folder: Path) -> Results:
    """Results that keep the first picture of every caption, beside them; the others are named no more."""
    records = []
    for number, record in enumerate(results.records):
        kept = ""
        if record.task == "t2i" and record.seed == 0 and record.picture:
            kept = f"pictures/{number}.png"
            (folder / "pictures").mkdir(exist_ok=True)
            shutil.copy(record.picture, folder / kept)
        records.append(dataclasses.replace(record, picture=kept))
    return dataclasses.replace(results, records=tuple(records))


def _write(path: Path, text: str) -> None:
    write_text(path, text)
