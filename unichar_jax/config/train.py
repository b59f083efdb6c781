"""Configuration of training runs: optimiser, checkpoints, and the Unified-SFT experiment.

Frozen dataclasses, validated on construction. A file in ``configs/`` names a whole experiment; any field can
be overridden on the command line (``config/presets.py``). The resolved configuration is saved with the run
and is enough to repeat it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from unichar_jax.config.data import DataConfig
from unichar_jax.errors import UserError
from unichar_jax.models.decoder import Compute
from unichar_jax.parallel.mesh import MeshConfig


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), or Muon on the matrices of the layers, with global-norm clipping.

    Attributes:
      name: "adamw"; or "muon" (orthogonalised momentum, with updates scaled to AdamW's size so that learning
        rates carry over, arXiv 2502.16982) for the layers' kernels and AdamW for everything else.
      learning_rate: peak.
      warmup_steps: linear warm-up; 0 starts at the peak.
      schedule: "constant", or "cosine" down to ``min_learning_rate`` at the last step.
      beta1, beta2, eps, weight_decay: of AdamW.
      max_grad_norm: global L2 norm that gradients are clipped to; 0 switches clipping off.
      first_moment_dtype: "float32", or "bfloat16" to save memory.
      ema_decay: decay of the exponential moving average of the weights; 0 keeps none.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-5
    min_learning_rate: float = 1e-7
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        require(
            0 <= self.ema_decay < 1,
            f"optimizer.ema_decay: expected 0 (off) or a decay below 1, got {self.ema_decay}.",
        )
        require(
            self.learning_rate > 0,
            f"optimizer.learning_rate: expected a positive number, got {self.learning_rate}.",
        )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) on the decoder's experts.

    Attributes:
      rank: of the update; 0 trains no adapter.
      alpha: the update is scaled by alpha / rank.
      experts: which experts carry adapters.
      targets: which projections.
    """

    rank: int = 0
    alpha: float = 16.0
    experts: tuple[Literal["und", "gen"], ...] = ("und", "gen")
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = (
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    )


@dataclass(frozen=True)
class SaveConfig:
    """Checkpoints: every ``every`` steps and at the end; the latest ``keep`` stay."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        require(self.every > 0, f"save.every: expected a positive number of steps, got {self.every}.")
        require(self.keep > 0, f"save.keep: expected at least 1 checkpoint, got {self.keep}.")


@dataclass(frozen=True)
class SFTConfig:
    """Stage 1, Unified-SFT (UniCharacter, arXiv 2605.08129, section on Unified-SFT).

    Attributes:
      base: model directory, BAGEL directory or run to start from; a preset name (``debug``, ``mini``,
        ``bagel-7b``) starts from random weights of that size.
      run_dir: where checkpoints, metrics and the resolved configuration go.
      data: characters, recipe, packing.
      steps: optimiser steps.
      accumulate: micro-batches per step; equals the large batch exactly.
      trainable: "all", or only the generation expert ("gen"), only what understands ("und"), or adapters
        ("lora").
      ce_weight, mse_weight: weights of the two loss terms.
      timestep_shift: shift of the training times; 1 is none.
      seed: of everything random in training.
      log_every, sample_every: steps between log lines, and between sample pictures (0: never).
    """

    base: str = "mini"
    run_dir: str = "runs/sft"
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: Compute = field(default_factory=Compute)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    steps: int = 501
    accumulate: int = 1
    trainable: Literal["all", "gen", "und", "lora"] = "all"
    ce_weight: float = 0.25
    mse_weight: float = 1.0
    timestep_shift: float = 1.0
    ce_chunk: int = 1024
    seed: int = 4396
    log_every: int = 10
    sample_every: int = 0

    def __post_init__(self) -> None:
        require(self.steps > 0, f"steps: expected a positive number, got {self.steps}.")
        require(self.accumulate > 0, f"accumulate: expected a positive number, got {self.accumulate}.")
        require(
            (self.trainable == "lora") == (self.lora.rank > 0),
            f"trainable is '{self.trainable}' and lora.rank is {self.lora.rank}: adapters need"
            " trainable = 'lora' together with a positive lora.rank.",
        )
