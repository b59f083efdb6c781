"""What an engine's jobs carry: checked requests, ready to be read and run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from unichar_jax.sampling import context, flow
from unichar_jax.sampling.context import Part
from unichar_jax.sampling.flow import FlowSettings
from unichar_jax.sampling.text import TextSettings


@dataclass(frozen=True)
class TextRequest:
    """What to read, and how to go on."""

    parts: tuple[Part, ...]
    settings: TextSettings
    model: str


@dataclass(frozen=True)
class ImageRequest:
    """What to read for each guidance branch (as in ``flow.Contexts``), and how to draw.

    ``noise``, float32 ``[n, N, latent_dim]``, takes the place of the seeds'.
    """

    full: tuple[Part, ...]
    no_text: tuple[Part, ...]
    no_image: tuple[Part, ...]
    settings: FlowSettings
    grid: flow.Grid
    seeds: tuple[int, ...]
    model: str
    noise: np.ndarray | None

    @property
    def key(self) -> tuple[Any, ...]:
        shapes = (context.shape_of(p) for p in (self.full, self.no_text, self.no_image))
        return ("images", self.model, self.settings, self.grid, *shapes)
