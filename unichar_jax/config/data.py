"""What the training data is: which characters, mixed how, at what sizes, packed into what.

A ``DataConfig`` says what the model sees and in which order; the batch of step n is a function of it and of
the global batch alone. Nothing here depends on the machine, except for ``workers`` and ``cache_dir``, which
change the speed only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from unichar_jax.config.ranges import at_least, check
from unichar_jax.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """The training data of one experiment.

    Attributes:
      path: the folder that holds ``train/<NAME>/``.
      characters: folder names or short names; empty for all of the folder.
      recipe: a name from ``data.mixture.RECIPES``; what is shown how often.
      tasks: own weights by task, in samples, in place of a recipe.
      character_weights: weights by character; absent ones have 1.
      seed: of the order of samples, condition dropout and noise levels.
      rows_per_device: packed sequences per device and micro-batch.
      tokens_per_row: about how many tokens a row has in all streams; derived capacities keep within -10 % and
        +6 %.
      long_samples: what to do with samples that are longer than a row by its ``tokens_per_row``: "raise", "cut" the
        end of their longest text, or "drop" them. With given capacities, what does not fit is always left out.
      capacities: tokens of a row in the streams text, vit, latent; none to derive them from the mixture.
      draw_min, draw_max: bounds of the sides of pictures that are drawn, in pixels.
      look_min, look_max: bounds of the sides of pictures that are looked at, in pixels.
      square: cut the centre square out of every picture first.
      text_dropout: how often the prompt of a drawing is left out.
      timestep_mean, timestep_std: of the normal draw of noise levels, before sigmoid and shift.
      reweight_text: weigh the tokens of a learned text of n tokens by ``1 / sqrt(n + 1)``.
      window: sequences that are planned together; no sample waits longer than this.
      workers: processes that prepare batches; 0 does it in this one.
      cache_dir: where prepared pictures are kept; empty to keep them in memory.
    """

    path: str = ""
    characters: tuple[str, ...] = ()
    recipe: str = "default"
    tasks: dict[str, float] = field(default_factory=dict)
    character_weights: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    rows_per_device: int = 1
    tokens_per_row: int = 12_288
    long_samples: str = "raise"
    capacities: tuple[int, ...] | None = None
    draw_min: int = 512
    draw_max: int = 1024
    look_min: int = 378
    look_max: int = 980
    square: bool = False
    text_dropout: float = 0.1
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    reweight_text: bool = False
    window: int = 50
    workers: int = 0
    cache_dir: str = "~/.cache/unichar_jax"

    def __post_init__(self) -> None:
        one, none = at_least(1), at_least(0)
        check(self, "data.", rows_per_device=one, tokens_per_row=one, window=one, workers=none, seed=none)
        check(self, "data.", text_dropout=("a probability", lambda p: 0 <= p <= 1))
        if self.long_samples not in ("raise", "cut", "drop"):
            raise UserError(f'data.long_samples: expected raise, cut or drop, got "{self.long_samples}".')
        if self.capacities is not None and (len(self.capacities) != 3 or min(self.capacities) < 0):
            raise UserError(
                f"data.capacities: expected three numbers (text, vit, latent), got {self.capacities};"
                " remove the field to derive them."
            )
        for what in ("draw", "look"):
            low, high = getattr(self, f"{what}_min"), getattr(self, f"{what}_max")
            if not 0 < low <= high:
                raise UserError(
                    f"data.{what}_min {low} and data.{what}_max {high}: expected 0 < min <= max;"
                    " change one of the two."
                )
        for what in ("tasks", "character_weights"):
            for name, weight in getattr(self, what).items():
                if not (math.isfinite(weight) and weight >= 0):
                    raise UserError(f"data.{what}.{name}: expected a weight of at least 0, got {weight}.")
