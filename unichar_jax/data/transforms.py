"""How one run prepares pictures: those it looks at and those it draws, in training and ever after.

A ``Transforms`` is made once, from the ``DataConfig`` of stage 1 (``configured``), and stored with the run
(``checkpoint.runs``). Stage 2 takes over what its base has stored. Whoever loads a model (the engine, and with it
chat, draw, serve and evaluation; stage 2's rewards) asks ``of_folder``. A directory that is no run has nothing
stored: its model was trained with the sizes that ``usual`` gives.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unichar_jax.checkpoint import runs
from unichar_jax.config import presets
from unichar_jax.config.data import DataConfig
from unichar_jax.config.model import ModelConfig
from unichar_jax.data.images import (
    MINI_T2I_TRANSFORM,
    MINI_VIT_TRANSFORM,
    T2I_TRANSFORM,
    VIT_TRANSFORM,
    ImageTransform,
)
from unichar_jax.errors import UserError


@dataclass(frozen=True)
class Transforms:
    """Pictures to tokens: of those that are looked at (vision tower) and of those that are drawn (autoencoder)."""

    look: ImageTransform
    draw: ImageTransform

    @classmethod
    def configured(cls, cfg: DataConfig, model: ModelConfig) -> Transforms:
        """Sizes from the data configuration, strides and tables from the model.

        Raises:
          UserError: the pictures are larger than the model's position tables, or their sides are not
            multiples of a token's.
        """
        patch, cell = model.vision.patch_size, model.pixels_per_latent
        for what, stride, side in (
            ("look", patch, model.vision.max_patches_per_side),
            ("draw", cell, model.max_latent_size),
        ):
            for end in ("min", "max"):
                value = getattr(cfg, f"{what}_{end}")
                if value % stride:
                    raise UserError(
                        f"data.{what}_{end}: expected a multiple of {stride} (pixels of one token), got"
                        f" {value}; {value // stride * stride or stride} is near."
                    )
            if getattr(cfg, f"{what}_max") > side * stride:
                raise UserError(
                    f"data.{what}_max: expected at most {side * stride} ({side} tokens of {stride} pixels,"
                    f" the model's position table), got {getattr(cfg, f'{what}_max')}; lower it."
                )
        look, draw = (
            dataclasses.replace(t, stride=s, min_size=low, max_size=high, square=cfg.square)
            for t, s, low, high in (
                (VIT_TRANSFORM, patch, cfg.look_min, cfg.look_max),
                (T2I_TRANSFORM, cell, cfg.draw_min, cfg.draw_max),
            )
        )
        return cls(look, draw)

    @classmethod
    def usual(cls, model: ModelConfig) -> Transforms:
        """For a model that says nothing of its pictures: BAGEL's sizes where the position tables hold them, else
        the mini model's, a fixed square each."""
        if model.max_latent_size >= 64 and model.vision.max_patches_per_side >= 70:
            return cls(VIT_TRANSFORM, T2I_TRANSFORM)
        cell, patch = model.pixels_per_latent, model.vision.patch_size
        see = patch * min(MINI_VIT_TRANSFORM.max_size // patch, model.vision.max_patches_per_side)
        draw = cell * min(MINI_T2I_TRANSFORM.max_size // cell, model.max_latent_size)
        return cls(
            ImageTransform(patch, see, see, square=True),
            ImageTransform(cell, draw, draw, square=True),
        )

    @classmethod
    def of_folder(cls, path: str | Path) -> Transforms:
        """Those of a run, of a step of it, or of a model directory.

        A run of a version that stored none (0.1.0 and before) has those of its own data settings or of the run
        that it started from.
        """
        from unichar_jax.checkpoint import store  # takes long to import

        home = store.config_folder(path)
        model = store.load_config(home)
        info = runs.read_info(home)
        if info.transforms:
            return cls.from_json(info.transforms)
        for settings in info.lineage:
            if data := settings.get("data"):
                return cls.configured(presets.from_dict(DataConfig, data), model)
        return cls.usual(model)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Transforms:
        return cls(ImageTransform(**content["look"]), ImageTransform(**content["draw"]))
