"""What a round costs, by formula: model evaluations and floating-point operations.

An evaluation is one forward pass of one guidance branch of one picture. The backward pass costs twice the
forward pass, or once where only adapters learn (the weights' own gradients are not formed); full
rematerialisation adds one more. Counted is the decoder (``models.flops``) over a picture's tokens and its
cached prompt; the autoencoder and the scorers are left out. Nothing here runs a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.model import ModelConfig
from unichar_jax.models import flops
from unichar_jax.training.grpo.rollouts import grid_of, settings_of


@dataclass(frozen=True)
class RoundCost:
    """Of one round.

    Attributes:
      pictures: drawn.
      draw, learn: evaluations; ``learn`` counts a backward pass as the evaluations it costs.
      evaluation: FLOPs of one evaluation.
    """

    pictures: int
    draw: float
    learn: float
    evaluation: float

    @property
    def flops(self) -> float:
        return (self.draw + self.learn) * self.evaluation


def evaluation_flops(model: ModelConfig, tokens: int, prefix: int) -> float:
    """One branch of one picture of ``tokens`` latent tokens against ``prefix`` cached tokens."""
    queries = tokens + 2
    work = flops.Work(2, 0, tokens, 0, queries * (queries + prefix), 0)
    return flops.forward(model, work)


def round_cost(cfg: GRPOConfig, model: ModelConfig, prefix: int = 128) -> RoundCost:
    """The cost of a round; ``prefix`` is the padded length of a prompt."""
    settings = settings_of(cfg.rollout)
    rows, columns = grid_of(cfg.rollout.height, cfg.rollout.width, model)
    backward = (1 if cfg.trainable == "lora" else 2) + (cfg.compute.remat in ("full", "offload_inputs"))

    def steps_of(scale: float) -> list[int]:
        """Branches of each step of the schedule."""
        runs = settings.flow.runs()
        return [2 if guided and scale > 1 else 1 for a, b, guided in runs for _ in range(a, b)]

    if cfg.algorithm == "nft":
        scales = cfg.nft.scales or (cfg.rollout.text_scale,)
        draw = sum(sum(steps_of(scale)) for scale in scales) / len(scales)
        learn = cfg.nft.times * (1 + backward + 1 + (cfg.nft.kl > 0))
    else:
        steps, branches = steps_of(cfg.rollout.text_scale), 2 if cfg.rollout.text_scale > 1 else 1
        a, b = settings.window_range
        starts = cfg.rollout.window_starts or range(a, b - settings.window_size + 1)
        before = sum(sum(steps[:s]) for s in starts) / len(starts)
        sharers = cfg.group // len(cfg.rollout.window_starts or (0,)) if cfg.rollout.share_prefix else 1
        window = settings.window_size * branches
        after = sum(sum(steps[s + settings.window_size :]) for s in starts) / len(starts)
        draw = before / sharers + window + after
        learn = window * (1 + backward + (cfg.flow_grpo.kl > 0))
    return RoundCost(
        cfg.pictures,
        cfg.pictures * draw,
        cfg.pictures * learn,
        evaluation_flops(model, rows * columns, prefix),
    )
