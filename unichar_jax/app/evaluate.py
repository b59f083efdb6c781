"""``unichar evaluate`` as a function: which models on which characters, and what is left in a folder.

The last column of every table is the run that was named; the others, in order, are what it is compared with. All
share one folder of outputs, so that a second comparison asks only what is new. A model that ends in ``@profile``
is told the character's full profile in every prompt, one that ends in ``@profile+picture`` sees a picture too: what
can be had without training.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tyro

from unichar_jax.app import engines
from unichar_jax.app.report import Command, Measurements, Picture, Report, compare, write_report
from unichar_jax.app.sheet import contact_sheet
from unichar_jax.checkpoint import runs
from unichar_jax.config import presets
from unichar_jax.errors import UserError
from unichar_jax.evaluation.endpoint import Endpoint
from unichar_jax.evaluation.instruments import find_instruments, rewarded_metrics
from unichar_jax.evaluation.items import CONTEXTS, DEFAULT_TASKS, Case, read_cases
from unichar_jax.evaluation.outputs import OutputStore
from unichar_jax.evaluation.pictures import Instruments
from unichar_jax.evaluation.rater import Rater
from unichar_jax.evaluation.results import Results
from unichar_jax.evaluation.subject import EngineSubject, weights_fingerprint
from unichar_jax.evaluation.suite import Plan, Progress, collect, evaluate, known_tasks, originals
from unichar_jax.sampling.text import TextSettings


@dataclass(frozen=True)
class Evaluation:
    """Measures what a model makes of characters: RoleScape-20's tasks, a table, a sheet of pictures, a report."""

    run: tyro.conf.Positional[str]
    """A finished run or a model directory; with @profile it is told the character's profile in every prompt."""
    data: Path | None = None
    """Folder that holds train/ and test/; by default that of the run's training."""
    characters: tuple[str, ...] = ()
    """Names; by default those of the run's training, or all of the folder."""
    tasks: tuple[str, ...] = DEFAULT_TASKS
    """What to measure."""
    seeds: int = 3
    """Repetitions of what is random."""
    compare: tuple[str, ...] = ()
    """Other runs or models (also by the name of one that ships), shown beside it; each may end in @profile."""
    originals: bool = True
    """Measure the held-out replies and pictures themselves, too: what a perfect model would get."""
    encoders: str = ""
    """Folder of the scorers' encoders; by default those of the run, or for a small model those that ship."""
    judge_url: str = ""
    """An OpenAI-compatible endpoint that gives marks, such as http://localhost:8000/v1; without one: no marks."""
    judge_model: str = ""
    """Its model's name."""
    judge_key: str = "UNICHAR_JUDGE_KEY"
    """Environment variable that holds its key."""
    steps: int = 30
    """Of drawing."""
    guidance: float = 4.0
    """Strength of the text when drawing."""
    temperature: float = 0.7
    """Of replies; answers to questions are greedy."""
    max_tokens: int | None = None
    """Of a reply; by default 256, or 96 for a small model."""
    weights: engines.Weights = None
    """int8 holds the decoders' weights in eight bits."""
    shard: str = "0/1"
    """I/N: only ask share I of N and keep it; when all have, the same command without it measures."""
    out: Path | None = None
    """Folder of outputs and results; by default evaluation/ in the run."""


@dataclass(frozen=True)
class Evaluated:
    """What was found, and where it is. The page and the sheet are None for a share of the work."""

    results: tuple[Results, ...]
    folder: Path
    report: Path | None = None
    sheet: Path | None = None


def run_evaluation(cfg: Evaluation, progress: Callable[[str], Progress] | None = None) -> Evaluated:
    """Does it all.

    Args:
      cfg: what to measure.
      progress: given a model's label, returns what is told of every chunk.

    Raises:
      UserError: a model, the data or the encoders are not there, or an endpoint refuses.
    """
    models = _models((*cfg.compare, cfg.run))
    cases = _cases(cfg, models[-1].path)
    plan = Plan(known_tasks(cfg.tasks), cfg.seeds)
    shard = _shard(cfg.shard)
    home = models[-1].path
    folder = cfg.out or (
        home / "evaluation" if runs.is_run(home) else Path("runs") / f"evaluation-{home.name}"
    )
    whole = shard == (0, 1)
    instruments = _instruments(cfg, home, folder) if whole else Instruments()
    results = [originals(cases, plan, instruments)] if whole and cfg.originals else []
    store = OutputStore(folder, writer="" if whole else f"{shard[0]}-of-{shard[1]}")
    for model in models:
        told = progress(model.label) if progress else None
        asked = replace(plan, context=model.context)
        with engines.load_engine(
            model.path, "float32" if engines.is_small(model.path) else "bfloat16", weights=cfg.weights
        ) as engine:
            subject = _subject(cfg, engine, model.path)
            if not whole:
                collect(subject, cases, store, asked, shard=shard, progress=told)
                continue
            found = evaluate(
                subject,
                cases,
                store,
                asked,
                instruments,
                label=model.label,
                rewarded=_rewarded(model.path),
                progress=told,
            )
        results.append(replace(found, settings={**found.settings, **_settings(cfg, model)}))
        results[-1].save(folder / f"results-{_file_name(model.label)}.json")
    if not whole:
        return Evaluated((), folder)
    page = write_report(_report(cfg, cases, results), folder / "report.html")
    return Evaluated(tuple(results), folder, page, _sheet(results, folder))


# -- what is named on the command line ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    path: Path
    context: Any
    label: str


def _models(specs: tuple[str, ...]) -> list[_Model]:
    """Paths and contexts, with labels that tell them apart."""
    parsed: list[tuple[Path, str]] = []
    for spec in specs:
        name, _, context = spec.partition("@")
        if context and context not in CONTEXTS:
            raise UserError(f"{spec}: expected @{' or @'.join(CONTEXTS[1:])} after a path, got @{context}.")
        path = presets.folder_or_shipped(name)
        if not path.is_dir():
            raise UserError(
                f"{name}: not a directory, and no model of that name ships; give a run or a model."
            )
        runs.resolve(path)
        parsed.append((path, context or "name"))
    made = []
    for path, context in parsed:
        clear = len({p.resolve() for p, _ in parsed if p.name == path.name}) == 1
        label = path.name if clear else f"{path.parent.name}/{path.name}"
        made.append(_Model(path, context, label if context == "name" else f"{label}, {context}"))
    return made


def _cases(cfg: Evaluation, run: Path) -> list[Case]:
    root, names = (cfg.data, ()) if cfg.data else engines.training_data(run)
    if root is None or not (cfg.data or root.is_dir()):
        gone = "it does not say which characters it is for" if root is None else f"{root} is not here"
        raise UserError(f"{run}: {gone}; name the characters' folder with --data FOLDER.")
    return read_cases(root, cfg.characters or names)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard {text}: expected I/N with I from 0 to N - 1, such as 0/4.")
    return int(match[1]), int(match[2])


def _instruments(cfg: Evaluation, run: Path, folder: Path) -> Instruments:
    rater = None
    if cfg.judge_url:
        endpoint = Endpoint(cfg.judge_url, cfg.judge_model, cfg.judge_key)
        rater = Rater(endpoint, folder / "marks.jsonl")
    named = cfg.encoders or next(
        (c["encoders"] for c in runs.read_info(run).lineage if c.get("encoders")), ""
    )
    if not named:
        named = "mini" if engines.is_small(run) else ""
    place = presets.folder_or_shipped(named)
    if named and not place.is_dir():
        raise UserError(f"encoders '{named}': no such folder; give --encoders FOLDER.")
    found = find_instruments(place if named else None, rater)
    if cfg.encoders and not (found.scorers or found.diversity or found.judge):
        raise UserError(f"encoders '{cfg.encoders}': {' '.join(found.missing.values())}; correct --encoders.")
    return found


def _subject(cfg: Evaluation, engine: Any, path: Path) -> EngineSubject:
    return EngineSubject(
        engine,
        weights="-".join(filter(None, (weights_fingerprint(runs.resolve(path)), cfg.weights))),
        writing=TextSettings(max_tokens=_max_tokens(cfg, path), temperature=cfg.temperature),
        drawing=engines.flow_settings(cfg.steps, cfg.guidance, path),
    )


def _max_tokens(cfg: Evaluation, path: Path) -> int:
    return cfg.max_tokens or (96 if engines.is_small(path) else 256)


def _rewarded(path: Path) -> tuple[str, ...]:
    """By any stage that led to the model."""
    return tuple(sorted({m for c in runs.read_info(path).lineage for m in rewarded_metrics(c)}))


def _settings(cfg: Evaluation, model: _Model) -> dict[str, Any]:
    return {
        "model": str(model.path),
        "steps": cfg.steps,
        "guidance": cfg.guidance,
        "temperature": cfg.temperature,
        "max_tokens": _max_tokens(cfg, model.path),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what decides numbers."""
    found = {"python": platform.python_version()}
    for name in ("unichar-jax", "jax", "jaxlib", "flax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# -- what is left in the folder -----------------------------------------------------------------------------


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", label)


def _sheet(results: list[Results], folder: Path) -> Path | None:
    drawn = compare(results, prompts=12)
    if not drawn.prompts:
        return None
    path = folder / "sheet.png"
    contact_sheet(drawn).save(path)
    return path


def _report(cfg: Evaluation, cases: list[Case], results: list[Results]) -> Report:
    names = [case.name for case in cases]
    who = names[0] if len(names) == 1 else f"{len(names)} characters"
    others = [r.label for r in results[:-1]]
    against = f", beside {', '.join(others)}" if others else ""
    tables = [Measurements(tuple(results), "" if len(names) == 1 else "Mean over the characters")]
    if len(names) > 1:
        tables += [Measurements(tuple(results), name, name) for name in names]
    last = results[-1]
    making = [("model", cfg.run), ("characters", ", ".join(names)), ("seeds", str(cfg.seeds))]
    making += [("drawing", f"{cfg.steps} steps, guidance {cfg.guidance:g}")]
    making += [("versions", ", ".join(f"{k} {v}" for k, v in last.settings.get("versions", {}).items()))]
    return Report(
        title=f"{last.label}: {who}",
        summary=f"What {last.label} makes of {who}{against}: questions, replies and pictures that training never saw.",
        kicker="UniChar-JAX evaluation",
        references=tuple(Picture(i.path) for i in cases[0].train.images) if len(cases) == 1 else (),
        comparison=compare(results, prompts=6 if len(cases) == 1 else 2 * len(cases)),
        measurements=tuple(tables),
        making=tuple(making),
        commands=(Command(f"unichar chat {cfg.run}", "Talk to the character:"),),
    )
