"""What is evaluated: something that writes, draws, and says how likely an answer is.

``EngineSubject`` is one model of an engine. ``Piped`` is two specialists in a row, one for words and one
for pictures: the baseline that a unified model has to beat. Every call takes one seed for each prompt, so a
result depends on its own prompt and seed only. A subject knows nothing of tasks or metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from unichar_jax.evaluation.likelihood import answer_log_probs
from unichar_jax.files import digest
from unichar_jax.sampling.batching import Job, gather
from unichar_jax.sampling.context import Part
from unichar_jax.sampling.engine import EDITING, Engine
from unichar_jax.sampling.flow import FlowSettings
from unichar_jax.sampling.text import TextSettings


@dataclass(frozen=True)
class Prompt:
    """What is asked. ``image`` is looked at before the text (or, for a drawing, changed)."""

    text: str
    image: Path | None = None


class Subject(Protocol):
    """What can be evaluated."""

    @property
    def fingerprint(self) -> str:
        """Names weights and settings: outputs of one fingerprint are interchangeable."""
        ...

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int], *, greedy: bool = False) -> list[str]:
        """A reply to every prompt."""
        ...

    def draw(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture of every prompt."""
        ...

    def log_probs(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]
    ) -> list[list[np.ndarray]]:
        """See ``likelihood.answer_log_probs``."""
        ...


@dataclass(frozen=True)
class EngineSubject:
    """One model of an engine.

    Attributes:
      engine: answers and draws.
      model: which of its models.
      weights: names the weights, e.g. ``weights_fingerprint(folder)``.
      writing: how replies are decoded.
      drawing: times and guidance of pictures.
    """

    engine: Engine
    model: str = "base"
    weights: str = ""
    writing: TextSettings = field(default_factory=lambda: TextSettings(max_tokens=256, temperature=0.7))
    drawing: FlowSettings = field(default_factory=FlowSettings)

    @property
    def fingerprint(self) -> str:
        return _digest(self.weights or self.model, repr(self.writing), repr(self.drawing))

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int], *, greedy: bool = False) -> list[str]:
        settings = replace(self.writing, temperature=0.0) if greedy else self.writing
        return self._all(
            self.engine.submit_parts(
                self._parts(prompt), replace(settings, seed=seed), model=self.model, wait=True
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        )

    def draw(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        changing = replace(EDITING, num_timesteps=self.drawing.num_timesteps)
        drawn = self._all(
            self.engine.submit_images(
                prompt.text,
                1,
                changing if prompt.image else self.drawing,
                seed=seed,
                image=prompt.image,
                model=self.model,
                wait=True,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        )
        return [pictures[0] for pictures in drawn]

    def log_probs(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]
    ) -> list[list[np.ndarray]]:
        contexts = [self._parts(prompt) for prompt in prompts]
        return answer_log_probs(self.engine, contexts, answers, model=self.model)

    def _all(self, jobs: Iterable[Job]) -> list[Any]:
        return gather(jobs, self.engine.together())

    def _parts(self, prompt: Prompt) -> list[Part]:
        seen: list[Part] = [] if prompt.image is None else [self.engine.parts.look(prompt.image)]
        return [*seen, self.engine.parts.text(prompt.text)]


@dataclass(frozen=True)
class Piped:
    """One specialist writes (and answers), another draws."""

    writer: Subject
    painter: Subject

    @property
    def fingerprint(self) -> str:
        return _digest(self.writer.fingerprint, self.painter.fingerprint)

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int], *, greedy: bool = False) -> list[str]:
        return self.writer.write(prompts, seeds, greedy=greedy)

    def draw(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        return self.painter.draw(prompts, seeds)

    def log_probs(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]
    ) -> list[list[np.ndarray]]:
        return self.writer.log_probs(prompts, answers)


def weights_fingerprint(folder: str | Path) -> str:
    """Names the weights in a folder (a model, a run, a training step) by its files' names, sizes and times.

    Gigabytes are not read: a copy with other times counts as another model, which costs time and no more.
    """
    folder = Path(folder)
    kept = [p for p in folder.glob("*") if p.suffix in (".safetensors", ".json") and p.is_file()]
    for part in (folder / "model", folder / "autoencoder", folder / "weights", folder / "ema"):
        kept += [p for p in part.rglob("*") if p.is_file()]
    states = [f"{p.relative_to(folder)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in sorted(kept)]
    return _digest(*states)


def _digest(*texts: str) -> str:
    return digest("\n".join(texts))[:16]
