"""A small random model to score with, a cast member on disk, and subjects whose answers are known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.sampling.conftest import autoencoder, model, tokenizer  # noqa: F401 - fixtures
from unichar_jax.evaluation.items import Case, read_cases
from unichar_jax.evaluation.subject import Prompt
from workshop.miniworld.cast import CAST
from workshop.miniworld.write import write_character


def gray(shade: int) -> Image.Image:
    return Image.new("RGB", (96, 96), (shade % 256,) * 3)


@dataclass
class Scripted:
    """A subject that answers by rule and counts what it was asked.

    Attributes:
      score: log-probability of an answer after a prompt; spread evenly over its words and the end.
      say: reply to a prompt with a seed.
      paint: picture of a prompt with a seed.
    """

    score: Callable[[Prompt, str], float] = lambda prompt, answer: 0.0
    say: Callable[[Prompt, int], str] = lambda prompt, seed: f"reply {seed}"
    paint: Callable[[Prompt, int], Image.Image] = lambda prompt, seed: gray(seed)
    fingerprint: str = "scripted"
    asked: list[str] = field(default_factory=list)

    def write(self, prompts, seeds, *, greedy=False):
        self.asked += [f"write {p.text}" for p in prompts]
        return [self.say(p, s) for p, s in zip(prompts, seeds, strict=True)]

    def draw(self, prompts, seeds):
        self.asked += [f"draw {p.text}" for p in prompts]
        return [self.paint(p, s) for p, s in zip(prompts, seeds, strict=True)]

    def log_probs(self, prompts, answers):
        self.asked += [f"score {p.text}" for p in prompts]
        return [
            [np.full(len(a.split()) + 1, self.score(p, a) / (len(a.split()) + 1)) for a in some]
            for p, some in zip(prompts, answers, strict=True)
        ]


@pytest.fixture(scope="session")
def _pip_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cast")
    write_character(CAST["Pip"], root, train_images=5, test_images=3, rl_prompts=4)
    return root


@pytest.fixture
def pip_root(_pip_template: Path, tmp_path: Path) -> Path:
    """A fresh copy of Pip's folders: the directory that holds ``train/`` and ``test/``."""
    return shutil.copytree(_pip_template / "personalized_data", tmp_path / "cast")


@pytest.fixture
def pip(pip_root: Path) -> Case:
    return read_cases(pip_root)[0]
