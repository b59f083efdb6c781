"""Configuration of stage 2, Character-GRPO: rollouts, algorithm, rewards, evaluation.

The dataclasses' defaults are this project's own recipe, with the reason beside each choice;
``configs/grpo-reference.toml`` is the recipe that UniCharacter shipped. A *round* is one rollout of
``prompts_per_round`` groups and the ``updates`` optimiser steps that learn from it; everything counted here
is counted in rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from unichar_jax.config.compute import Compute, MeshConfig
from unichar_jax.config.ranges import POSITIVE, at_least, check, require, require_multiple
from unichar_jax.config.train import LoraConfig, OptimizerConfig, RunOptions, SaveConfig


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy draws.

    Attributes:
      height, width: of the pictures, in pixels.
      num_timesteps, shift: of the schedule; ``num_timesteps - 1`` model evaluations for each guidance
        branch.
      text_scale: classifier-free guidance while drawing and learning; at most 1 is guidance-free: half the
        work, and learning soon recovers what guidance gave (arXiv 2509.16117). A policy is then drawn with
        the same scale.
      guidance_interval: guidance acts while ``a < t <= b``.
      solver, noise_level: of the stochastic steps.
      window_size: stochastic (and learned) steps of a picture.
      window_range: the window lies within these steps.
      window_starts: empty: one start is drawn for each batch of the rollout, the same for a whole group.
        Otherwise member g of a group starts at ``window_starts[g mod length]``.
      share_prefix: a group shares its initial noise, so the steps before its window are computed once for
        all of it; members then differ by their stochastic steps alone.
      batch: pictures drawn at once; 0: all of a round.
    """

    height: int = 512
    width: int = 512
    num_timesteps: int = 11
    shift: float = 3.0
    text_scale: float = 1.0
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    solver: Literal["sde", "cps"] = "sde"
    noise_level: float = 0.8
    window_size: int = 2
    window_range: tuple[int, ...] = (0, 5)
    window_starts: tuple[int, ...] = ()
    share_prefix: bool = False
    batch: int = 0

    def __post_init__(self) -> None:
        bounds = "two bounds", lambda pair: len(pair) == 2
        check(self, "rollout.", height=POSITIVE, width=POSITIVE, window_size=POSITIVE, batch=at_least(0))
        check(self, "rollout.", guidance_interval=bounds, window_range=bounds)
        a, b = self.window_range
        outside = [s for s in self.window_starts if not a <= s <= b - self.window_size]
        require(
            not outside,
            f"rollout.window_starts: {outside} leave the window outside of window_range {self.window_range}"
            f" with window_size {self.window_size}; change one of the three.",
        )


@dataclass(frozen=True)
class FlowGRPOConfig:
    """Flow-GRPO (``training/grpo/flow_grpo.py``).

    Attributes:
      clip_low, clip_high: the ratio is clipped to [1 - low, 1 + high]. Log-probabilities are means over a
        picture's elements, so ratios stay very close to 1 and the range belongs to that mean.
      kl: weight of the divergence from the reference model; 0 needs none.
      ratio_norm: GRPO-Guard's normalised ratio; clip ranges then mean something else (about 1e-4 there).
    """

    clip_low: float = 1e-5
    clip_high: float = 1e-5
    kl: float = 0.0
    ratio_norm: bool = False

    def __post_init__(self) -> None:
        check(self, "flow_grpo.", clip_low=POSITIVE, clip_high=POSITIVE, kl=at_least(0))


@dataclass(frozen=True)
class NFTConfig:
    """DiffusionNFT (``training/grpo/nft.py``).

    Attributes:
      beta: how far the implicit positive and negative policies stand from the one that drew.
      kl: weight of the squared distance from the reference model's velocity; 0 needs no reference.
      times: noised copies of a picture in an update, each at a time of its own.
      scales: classifier-free guidance of the members of a group, in turn; empty: all have the rollout's. A
        group drawn with several compares them, so that the learner, who has no guidance, takes from it what
        the reward prefers: where all pictures of a prompt agree, nothing else tells them apart.
      old_rate, old_max: the policy that draws follows the learner with decay ``min(old_rate * round,
        old_max)``.
    """

    beta: float = 1.0
    kl: float = 1e-4
    times: int = 2
    scales: tuple[float, ...] = ()
    old_rate: float = 0.001
    old_max: float = 0.5

    def __post_init__(self) -> None:
        decay = "a decay in [0, 1)", lambda d: 0 <= d < 1
        check(self, "nft.", beta=POSITIVE, kl=at_least(0), times=at_least(1), old_max=decay)


@dataclass(frozen=True)
class RewardTerm:
    """One term of the reward.

    Attributes:
      name: a scorer's name (``scoring``), or ``file.py:function`` for a function of your own.
      weight: its factor in the sum; 0 only reports it.
      options: arguments of the scorer.
    """

    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalConfig:
    """Drawing held-out prompts at intervals, along the deterministic flow.

    Attributes:
      every: rounds between evaluations; 0: never.
      pictures: of each held-out prompt, from fixed noise.
      num_timesteps: of the schedule.
    """

    every: int = 5
    pictures: int = 4
    num_timesteps: int = 50

    def __post_init__(self) -> None:
        check(self, "eval.", every=at_least(0), pictures=POSITIVE)


def _own_reward() -> tuple[RewardTerm, ...]:
    """Questions first: they are the only term that knows what the prompt asks for in detail. A plain identity
    similarity
        is left to evaluation, because rewarding it without the dead band breeds copies of the training
        pictures.
    """
    return (
        RewardTerm("visual_questions", 0.4),
        RewardTerm("text_image_match", 0.25),
        RewardTerm("identity_band", 0.2),
        RewardTerm("diversity", 0.15),
    )


@dataclass(frozen=True)
class GRPOConfig:
    """Stage 2 (UniCharacter, arXiv 2605.08129, section on Character-GRPO).

    Attributes:
      base: what stage 1 made: a run, a training step, or a model directory.
      run_dir: where checkpoints, metrics, pictures and the resolved configuration go.
      prompts: a prompt file ``*_pure_t2i_with_vqa.jsonl``, or the folder that holds it.
      references: folder of the character's pictures; empty: the folder of ``prompts``.
      encoders: folder of the scorers' encoders, or the name of one that ships under ``checkpoints/``.
      held_out: prompts that are never trained on and score the run.
      algorithm: "nft" or "flow_grpo"; the table of the same name has its settings.
      trainable: the generation expert ("gen_expert") or adapters on it ("lora").
      rounds: of the whole run.
      prompts_per_round, group: pictures of a round are their product.
      updates: optimiser steps of a round; each learns from its share of the groups.
      micro_batch: pictures whose gradient is computed at once; 0: all of an update.
      advantage_clip: bound of an advantage.
      whole_std: divide by the deviation of all rewards of a round instead of the group's.
      reward: terms of the reward.
      reward_timeout: seconds that scoring a batch may take before the run stops.
      seed: of everything random.
      log_every, pictures_every: rounds between log lines and between sheets of best and worst pictures.
      run: how the run is watched; ``run.profile`` counts rounds.
    """

    base: str = "mini"
    run_dir: str = "runs/grpo"
    prompts: str = ""
    references: str = ""
    encoders: str = "mini"
    held_out: int = 6
    algorithm: Literal["flow_grpo", "nft"] = "nft"
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    flow_grpo: FlowGRPOConfig = field(default_factory=FlowGRPOConfig)
    nft: NFTConfig = field(default_factory=NFTConfig)
    reward: tuple[RewardTerm, ...] = field(default_factory=_own_reward)
    reward_timeout: float = 600.0
    trainable: Literal["gen_expert", "lora"] = "lora"
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=32, alpha=64.0, experts=("gen",)))
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-4, beta2=0.999, eps=1e-8, weight_decay=1e-4)
    )
    rounds: int = 100
    prompts_per_round: int = 16
    group: int = 12
    updates: int = 1
    micro_batch: int = 0
    advantage_clip: float = 5.0
    whole_std: bool = False
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: Compute = field(default_factory=Compute)
    save: SaveConfig = field(default_factory=lambda: SaveConfig(every=10))
    seed: int = 42
    log_every: int = 1
    pictures_every: int = 5
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        check(self, "", rounds=POSITIVE, prompts_per_round=POSITIVE, updates=POSITIVE)
        check(self, "", group=at_least(2, " pictures to compare"), held_out=at_least(0, " prompts"))
        prompts, updates, why = (
            self.prompts_per_round,
            self.updates,
            ": every update learns from whole groups",
        )
        require_multiple("prompts_per_round", prompts, f"updates {updates}", updates, why)
        lanes, scales = len(self.rollout.window_starts) or 1, len(self.nft.scales) or 1
        for name, factor, one in (("rollout.window_starts", lanes, "start"), ("nft.scales", scales, "scale")):
            why = f": every {one} serves as many members"
            require_multiple("group", self.group, f"the {factor} {name}", factor, why)
        lane = self.group // lanes
        prompts = self.prompts_per_batch
        require(
            prompts * lane == (self.rollout.batch or prompts * lane)
            and prompts > 0
            and self.prompts_per_round % prompts == 0,
            f"rollout.batch {self.rollout.batch}: expected a multiple of {lane} pictures (a prompt's share"
            f" of a batch) that makes a divisor of the round's {self.prompts_per_round} prompts, or 0.",
        )
        share = self.pictures // self.updates
        require(
            self.micro_batch == 0 or share % self.micro_batch == 0,
            f"micro_batch {self.micro_batch}: expected a divisor of the {share} pictures of an update, or 0.",
        )
        self.lora.require_rank(self.trainable)
        require(
            self.lora.experts == ("gen",) or self.trainable != "lora",
            f"lora.experts {self.lora.experts}: only the generation expert learns here, so that prompts are"
            " read once for the whole run; give ['gen'].",
        )
        require(sum(t.weight > 0 for t in self.reward) > 0, "reward: no term has a positive weight; add one.")
        names = [t.name for t in self.reward]
        require(len(set(names)) == len(names), f"reward: a term is named twice in {names}.")

    @property
    def pictures(self) -> int:
        """Pictures of a round."""
        return self.prompts_per_round * self.group

    @property
    def prompts_per_batch(self) -> int:
        """Prompts of a batch of the rollout."""
        lane = self.group // (len(self.rollout.window_starts) or 1)
        return self.rollout.batch // lane if self.rollout.batch else self.prompts_per_round
