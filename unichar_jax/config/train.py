"""Configuration of training runs: optimiser, checkpoints, and the Unified-SFT experiment.

Frozen dataclasses, validated on construction. A file in ``configs/`` names a whole experiment; any field can
be overridden on the command line (``config/presets.py``). The resolved configuration is saved with the run
and is enough to repeat it.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Literal

from unichar_jax.config.compute import Compute, MeshConfig
from unichar_jax.config.data import DataConfig
from unichar_jax.config.ranges import POSITIVE, at_least, check, require


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), or Muon on the matrices of the layers, with global-norm clipping.

    Attributes:
      name: "adamw"; or "muon" (orthogonalised momentum, with updates scaled to AdamW's size so that learning
        rates carry over, arXiv 2502.16982) for the layers' kernels and AdamW for everything else.
      learning_rate: peak.
      warmup_steps: linear warm-up; 0 starts at the peak.
      schedule: "constant"; "cosine" down to ``min_learning_rate`` at the last step; or "trapezoid", constant
        and then linear down to ``min_learning_rate`` over the last ``decay_steps`` (arXiv 2404.06395): a run
        can be continued from before the decay, or ended early, without having planned its length.
      beta1, beta2, eps, weight_decay: of AdamW.
      max_grad_norm: global L2 norm that gradients are clipped to; 0 switches clipping off.
      first_moment_dtype: "float32", or "bfloat16" to save memory.
      ema_decay: decay of the exponential moving average of the weights; 0 keeps none.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-5
    min_learning_rate: float = 1e-7
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "trapezoid"] = "constant"
    decay_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        decay = "0 (off) or a decay below 1", lambda d: 0 <= d < 1
        check(self, "optimizer.", ema_decay=decay, learning_rate=POSITIVE)
        require(
            (self.decay_steps > 0) == (self.schedule == "trapezoid"),
            f"optimizer.decay_steps: expected a positive number with schedule trapezoid and 0 with any other, got"
            f" {self.decay_steps} with {self.schedule}.",
        )


Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


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
    targets: tuple[Target, ...] = typing.get_args(Target)

    def require_rank(self, trainable: str) -> None:
        """Adapters have a rank, and nothing else has."""
        require(
            (trainable == "lora") == (self.rank > 0),
            f"trainable is '{trainable}' and lora.rank is {self.rank}: adapters need trainable = 'lora' together"
            " with a positive lora.rank.",
        )


@dataclass(frozen=True)
class SaveConfig:
    """Checkpoints: every ``every`` steps and at the end; the latest ``keep`` stay."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        every = "a positive number of steps", lambda n: n > 0
        check(self, "save.", every=every, keep=at_least(1, " checkpoint"))


@dataclass(frozen=True)
class RunOptions:
    """How a run is watched; nothing here changes what it computes.

    Attributes:
      writers: told what ``metrics.jsonl`` is told: "tensorboard", "wandb" (extras of the same names).
      profile: first and last step that JAX's profiler traces, into ``profile/`` of the run.
      dump_hlo: write the compiler's input and output for the large programs into ``hlo/`` of the run.
      compilation_cache: folder where compiled programs are kept between starts, shared by hosts if they share
        it; "auto" is the user's cache folder, empty keeps none.
    """

    writers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    profile: tuple[int, ...] | None = None
    dump_hlo: bool = False
    compilation_cache: str = "auto"

    def __post_init__(self) -> None:
        window = self.profile
        require(
            window is None or (len(window) == 2 and 0 < window[0] <= window[1]),
            f"run.profile: expected the first and the last step, such as [10, 12], got {window}.",
        )


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
      trainable: "all", only the generation expert ("gen"), only what understands ("und"), all but the vision
        tower ("not_vision"; the reference's ``freeze_vit``), or adapters ("lora").
      ce_weight, mse_weight: weights of the two loss terms.
      timestep_shift: shift of the training times; 1 is none.
      seed: of everything random in training.
      log_every: steps between log lines.
      sample_every: steps between sheets of sample pictures in ``pictures/`` (0: never).
      validate_every: steps between measurements of the loss on held-out dialogue (0: never).
      run: how the run is watched.
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
    trainable: Literal["all", "gen", "und", "not_vision", "lora"] = "all"
    ce_weight: float = 0.25
    mse_weight: float = 1.0
    timestep_shift: float = 1.0
    ce_chunk: int = 1024
    seed: int = 4396
    log_every: int = 10
    sample_every: int = 0
    validate_every: int = 0
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        check(self, "", steps=POSITIVE, accumulate=POSITIVE, log_every=at_least(1))
        check(self, "", sample_every=at_least(0), validate_every=at_least(0))
        self.lora.require_rank(self.trainable)
