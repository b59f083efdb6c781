"""``unichar data annotate`` as a call: a model from an endpoint or a run, and everything it makes."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from unichar_jax.app.annotate import writing
from unichar_jax.app.annotate.annotation import Annotation, Tell, Wanted, annotate, shortfalls
from unichar_jax.app.annotate.asking import Answers, Ask
from unichar_jax.app.annotate.review import write_review
from unichar_jax.app.annotate.writing import Decisions, Places
from unichar_jax.data.rolescape import read_character
from unichar_jax.errors import UserError
from unichar_jax.evaluation.endpoint import Endpoint, chat, persist


@dataclass(frozen=True)
class AnnotateConfig:
    """What is annotated, by whom, and where to.

    Attributes:
      folder: a character's train folder, as 'unichar data new' makes it; it is only read.
      endpoint: an OpenAI-compatible address such as http://localhost:8000/v1; the model must see pictures.
      model: its name there.
      key_variable: environment variable that holds the key, if one is needed.
      run: a run or a model directory, in place of an endpoint.
      out: data root of the result; by default the folder's own root with '-annotated' at its end.
      wanted: how many items of each kind.
      decisions: what the review page saved; remembered for later.
      workers: questions at a time.
      timeout: seconds for one answer of an endpoint.
      attempts: tries before an endpoint is given up.
      max_tokens: of one answer of a run.
    """

    folder: Path
    endpoint: str = ""
    model: str = ""
    key_variable: str = "UNICHAR_ENDPOINT_KEY"
    run: Path | None = None
    out: Path | None = None
    wanted: Wanted = field(default_factory=Wanted)
    decisions: Path | None = None
    workers: int = 4
    timeout: float = 120.0
    attempts: int = 4
    max_tokens: int = 2000

    def __post_init__(self) -> None:
        if bool(self.endpoint) == (self.run is not None):
            raise UserError("name who annotates: --endpoint URL --model NAME, or --run RUN (one of them).")
        if self.workers < 1:
            raise UserError(f"annotate.workers: expected at least 1, got {self.workers}.")


@dataclass(frozen=True)
class Annotated:
    """What was made: the annotation, the folders, and the review page."""

    annotation: Annotation
    places: Places
    review: Path

    @property
    def summary(self) -> str:
        """For people."""
        found, places = self.annotation, self.places
        counts: dict[str, int] = {}
        for got in found.collected.values():
            counts[got.kind] = counts.get(got.kind, 0) + len(got.items)
        refused = sum(len(got.rejected) for got in found.collected.values())
        lines = [f"{kind}: {count}" for kind, count in counts.items()]
        short = shortfalls(found.collected.values())
        if short:
            lines += ["Less than wished for:", *(f"  {line}" for line in short)]
        lines.append(f"{found.asked} questions asked, {refused} items refused (reasons in the review page)")
        lines += [f"Wrote {p}" for p in (places.train, places.test, places.prompts) if p.exists()]
        lines.append(f"Review: {self.review}   then the same command with --decisions decisions.json")
        lines.append(f'Next: unichar data check "{places.train.parent.parent.parent}"')
        return "\n".join(lines)


def run(
    cfg: AnnotateConfig, tell: Tell = lambda *_: None, sleep: Callable[[float], None] = time.sleep
) -> Annotated:
    """Annotates a character, or goes on where it was interrupted.

    Args:
      cfg: what, by whom, where to.
      tell: of progress.
      sleep: waits before a service is asked again.

    Raises:
      UserError: a faulty folder or decision, a place that is taken, or a model that does not answer; what
        was answered is kept.
    """
    character = read_character(cfg.folder)
    places = Places.of(_root(cfg), character)
    writing.check_free(places)  # before anything is asked
    places.work.mkdir(parents=True, exist_ok=True)
    decisions = _decisions(cfg, places)
    with _model(cfg, sleep) as (ask, who):
        answers = Answers(ask, who, places.work / "answers.jsonl")
        found = annotate(cfg.folder, answers, cfg.wanted, cfg.workers, tell)
    review = write_review(found, decisions, places.work / "review.html")
    decided = writing.decide(found, decisions)
    writing.write(decided, places)
    return Annotated(decided, places, review)


def _root(cfg: AnnotateConfig) -> Path:
    if cfg.out is not None:
        return cfg.out
    folder = cfg.folder.absolute()
    if folder.parent.name != "train":
        raise UserError(
            f"{cfg.folder}: not a folder .../train/NAME, so name the place of the result with --out."
        )
    data = folder.parent.parent
    root = data.parent if data.name == "personalized_data" else data
    return root.with_name(f"{root.name}-annotated")


def _decisions(cfg: AnnotateConfig, places: Places) -> Decisions:
    kept = places.work / "decisions.json"
    if cfg.decisions is not None:
        made = Decisions.load(cfg.decisions)
        if not kept.exists() or not kept.samefile(cfg.decisions):
            shutil.copyfile(cfg.decisions, kept)
        return made
    return Decisions.load(kept) if kept.is_file() else Decisions()


@contextlib.contextmanager
def _model(cfg: AnnotateConfig, sleep: Callable[[float], None]) -> Iterator[tuple[Ask, str]]:
    """How to ask, and who is asked."""
    if cfg.run is None:
        endpoint = Endpoint(cfg.endpoint, cfg.model, cfg.key_variable, cfg.workers, cfg.timeout, cfg.attempts)
        kept = "What was answered so far is kept, and the same command goes on."
        yield (
            lambda prompt, image: persist(endpoint, lambda: chat(endpoint, prompt, image), kept, sleep),
            cfg.model,  # a service that moves to another address is still the same model
        )
        return
    from unichar_jax.app.engines import load_engine
    from unichar_jax.evaluation.subject import weights_fingerprint
    from unichar_jax.sampling.text import TextSettings

    settings = TextSettings(max_tokens=cfg.max_tokens)
    with load_engine(cfg.run) as engine:
        yield lambda prompt, image: engine.answer(image, prompt, settings), weights_fingerprint(cfg.run)
