"""The ablation study of the mini world: its variants, its settings, and the order of its jobs.

A *job* is one variant of one character with one training seed. Jobs come in the order of what they tell: whoever
stops early has the claims that matter most. ``work`` does them, ``summary`` keeps their numbers, ``claims``
judges and ``report`` tells. Nothing here trains or asks a model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import Any

from unichar_jax.config import presets
from unichar_jax.errors import UserError, did_you_mean
from unichar_jax.evaluation.items import Context
from unichar_jax.scoring.folder import JUDGE, EncoderFolder
from workshop.miniworld.cast import CAST, member

ALL_PICTURES = 10
"""Training pictures of every variant that does not say otherwise."""

TASKS = ("knowledge_mcq", "unseen_image_mcq", "vqa", "reply_likelihood", "dialogue", "t2i", "t2t2i")
"""What every job measures: each ability once."""

STAGE2 = "stage2"
"""The task of Character-GRPO's own held-out prompts, drawn while it trains."""

REWARDS = ("reward", "published_reward")
"""Metrics of ``STAGE2``: by the run's own weights, and by those of the published recipe (one scale for all)."""


# -- variants -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to have a character.

    Attributes:
      name: in commands, folders and tables.
      title: for readers.
      group: jobs of a lower number come first, for all characters and seeds.
      sft: Unified-SFT with these fields changed (dotted names); None if there is none of its own.
      grpo: which recipe of stage 2 follows: the field of ``Study`` that names it; empty for none.
      stage2: fields of that recipe that are changed (dotted names).
      reward_of: which recipe's reward it gets; by default its own.
      weights: of its reward's terms, where they are not the recipe's.
      start: variant whose run stage 2 starts from.
      context: what prompts tell of the character.
      pictures: how many there are to train on.
      pipe: variants that write and draw.
      held_out: the held-out replies and pictures themselves, which need no model.
      tasks: what is measured; empty: all that the study measures.
    """

    name: str
    title: str
    group: int
    sft: Mapping[str, Any] | None = None
    grpo: str = ""
    stage2: Mapping[str, Any] = field(default_factory=dict)
    reward_of: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    start: str = "sft"
    context: Context = "name"
    pictures: int = ALL_PICTURES
    pipe: tuple[str, str] | None = None
    held_out: bool = False
    tasks: tuple[str, ...] = ()

    @property
    def seeded(self) -> bool:
        """Whether a training seed changes anything."""
        return self.sft is not None or bool(self.grpo or self.pipe)

    @property
    def runs(self) -> tuple[str, ...]:
        """Variants whose training runs this one needs."""
        if self.pipe:
            return self.pipe
        return (self.start, self.name) if self.grpo else () if self.sft is None else (self.name,)


_SPEAKING = {"vlm_extension": 0.5, "knowledge_qa": 0.25, "vlm_thinking": 0.15, "vlm": 0.1}
_WORDS = {"data.tasks": {"vqa": 0.5} | _SPEAKING}
_DRAWINGS = {
    "data.tasks": dict.fromkeys(
        ("t2i", "t2i_with_thinking", "pure_t2i", "t2i_generation_instruction_only"), 1.0
    )
}
# Muon is for whole matrices.
_LORA = {
    "trainable": "lora",
    "lora.rank": 16,
    "lora.alpha": 32.0,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-3,
}

_DRAWN = ("t2i", "t2t2i")
"""Stage 2 leaves the understanding expert alone: there is nothing new to ask."""

EARLY_STEPS = 40
"""Of 150: where stage 1 has not yet learned all that stage 2 could teach."""

OURS, PUBLISHED = "early_grpo", "early_flow_grpo"
FEW_OURS, FEW_GUIDED, FEW_PUBLISHED = "few_grpo", "few_guided_grpo", "few_flow_grpo"
FEW_GENTLE, FEW_FREE = "few_gentle_flow_grpo", "few_free_flow_grpo"
RECIPES = {OURS: PUBLISHED, FEW_OURS: FEW_PUBLISHED, FEW_GUIDED: FEW_PUBLISHED}
"""The recipes of stage 2 that are compared, from the same start: ours -> the published one."""

FEW_PICTURES = 3
_AFTER_FEW: Mapping[str, Any] = {"group": 5, "start": f"pictures_{FEW_PICTURES}", "tasks": _DRAWN}
_FEW: Mapping[str, Any] = _AFTER_FEW | {
    # Whoever learned from three pictures draws them again: a group hardly differs, and what little its rewards do
    # counts only by the group's own deviation. After a few rounds prompts gain no more, and looks pay for it.
    "grpo": "grpo",
    "stage2": {"whole_std": False, "rounds": 5, "eval.every": 1},
}
# Guided pictures leave what was memorised: where half of a group is drawn so, the group differs, and the learner,
# which draws without guidance, takes over those that the rewards prefer. Looks must weigh more then.
_GUIDED: Mapping[str, Any] = _FEW | {
    "stage2": {"whole_std": False, "rounds": 12, "eval.every": 3, "nft.scales": (1.0, 3.0)},
    "weights": {"identity_band": 0.4, "diversity": 0.5},
}
# Without guidance flow_grpo starts from copies, as nft does, and its stochastic steps make a group differ. The usual
# ones (sde) leave noise in pictures, and where the whole expert learns or rounds go on, blots grow: hence cps,
# adapters, and few rounds.
_FREE: Mapping[str, Any] = _FEW | {
    "stage2": {
        "algorithm": "flow_grpo",
        "whole_std": False,
        "rounds": 9,
        "eval.every": 3,
        "rollout.solver": "cps",
        "rollout.noise_level": 0.7,
        "rollout.num_timesteps": 11,
        "rollout.window_size": 3,
        "rollout.window_range": (0, 6),
    },
    "weights": _GUIDED["weights"],
}

_ALL = (
    Variant("originals", "held-out originals", 0, held_out=True),
    Variant("base", "base, name only", 0),
    Variant("profile", "base, told the profile", 0, context="profile"),
    Variant("profile_picture", "base, told the profile and shown a picture", 0, context="profile+picture"),
    Variant("sft", "Unified-SFT", 1, sft={}),
    Variant("text_only", "SFT on words only", 2, sft=_WORDS),
    Variant("image_only", "SFT on drawings only", 2, sft=_DRAWINGS),
    Variant("piped", "the two specialists piped", 2, pipe=("text_only", "image_only")),
    Variant("grpo", "+ Character-GRPO (nft)", 3, grpo="grpo", tasks=_DRAWN),
    Variant("early", "Unified-SFT stopped early", 4, sft={"steps": EARLY_STEPS}, tasks=_DRAWN),
    Variant(OURS, "stopped early + nft", 4, grpo="grpo", start="early", tasks=_DRAWN),
    Variant(PUBLISHED, "stopped early + flow_grpo", 4, grpo="published", start="early", tasks=_DRAWN),
    Variant("pictures_1", "Unified-SFT from 1 picture", 5, sft={}, pictures=1),
    Variant("pictures_3", "Unified-SFT from 3 pictures", 5, sft={}, pictures=FEW_PICTURES),
    Variant("pictures_5", "Unified-SFT from 5 pictures", 5, sft={}, pictures=5),
    Variant(FEW_OURS, "3 pictures + nft", **_FEW),
    Variant(FEW_GUIDED, "3 pictures + nft, half of it drawn with guidance", **_GUIDED),
    Variant(FEW_PUBLISHED, "3 pictures + flow_grpo", grpo="published", **_AFTER_FEW),
    Variant(
        FEW_GENTLE,
        "3 pictures + flow_grpo, our reward, smaller steps",
        grpo="published",
        stage2={"rounds": 9, "eval.every": 3, "optimizer.learning_rate": 1e-4},
        reward_of="grpo",
        weights={"identity_band": 0.4, "diversity": 1.5},
        **_AFTER_FEW,
    ),
    Variant(FEW_FREE, "3 pictures + flow_grpo, our reward, no guidance, adapters", **_FREE),
    Variant("lora", "Unified-SFT, adapters only", 6, sft=_LORA),
    *(
        Variant(
            f"no_{term}",
            f"3 pictures + nft without {term.replace('_', ' ')}",
            weights={term: 0.0},
            **_FEW | {"group": 7},
        )
        for term in ("visual_questions", "text_image_match", "identity_band", "diversity")
    ),
)
VARIANTS: Mapping[str, Variant] = {v.name: v for v in _ALL}
"""By name, in the order of tables."""


# -- settings and jobs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Trains and measures every variant of every character with every seed, and goes on where it was.

    Attributes:
      out: folder of everything that is made.
      characters: of the mini world's cast; by default the eight for experiments.
      seeds: of training.
      variants: by default all.
      minutes: stop after the job under way when they are over.
      base: a model directory, or the name of one that ships.
      sft, grpo, published: configurations of stage 1, of our stage 2 and of the published one.
      encoders: folder of the scorers and the judge, or the name of one that ships; empty measures without.
      steps, rounds: of the two stages; by default what the configurations say.
      tasks: what is measured.
      repetitions: pictures of every held-out prompt, and replies to every held-out line.
      test_pictures: held-out pictures of a character.
      held_out: prompts that stage 2 never trains on.
      draw_steps, guidance, max_tokens, temperature: of pictures and replies.
    """

    out: Path = Path("runs/study")
    characters: tuple[str, ...] = tuple(name for name, m in CAST.items() if m.role == "experiment")
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = tuple(VARIANTS)
    minutes: float | None = None
    base: str = "mini"
    sft: str = "sft-mini"
    grpo: str = "grpo-mini"
    published: str = "grpo-mini-reference"
    encoders: str = "mini"
    steps: int | None = None
    rounds: int | None = None
    tasks: tuple[str, ...] = TASKS
    repetitions: int = 2
    test_pictures: int = 6
    held_out: int = 8
    draw_steps: int = 30
    guidance: float = 4.0
    max_tokens: int = 96
    temperature: float = 0.7

    def __post_init__(self) -> None:
        for name in self.variants:
            if name not in VARIANTS:
                raise UserError(
                    f"variant '{name}' is unknown{did_you_mean(name, VARIANTS)}; expected some of"
                    f" {', '.join(VARIANTS)}."
                )
        for name in self.characters:
            member(name)

    def settings(self) -> dict[str, Any]:
        """What decides numbers: it must be the same for all that is in ``out``."""
        plan = ("out", "characters", "seeds", "variants", "minutes")
        decided = {k: v for k, v in dataclasses.asdict(self).items() if k not in plan}
        files = {"base_sha256": shipped(self.base) / "ema.safetensors"}
        if self.encoders and (judge := EncoderFolder(shipped(self.encoders)).place(JUDGE)):
            files["judge_sha256"] = judge / "model.safetensors"
        for name, path in files.items():
            if path.is_file():
                with path.open("rb") as file:
                    decided[name] = file_digest(file, "sha256").hexdigest()
        return json.loads(json.dumps(decided))


@dataclass(frozen=True)
class Job:
    """One variant of one character; ``seed`` is None where nothing is trained."""

    variant: Variant
    character: str
    seed: int | None

    @property
    def place(self) -> str:
        """Its folder below ``jobs/``."""
        return place(self.variant.name, self.character, self.seed)

    @property
    def runs(self) -> tuple[str, ...]:
        """Folders of the training runs it needs."""
        return tuple(place(name, self.character, self.seed) for name in self.variant.runs)


def place(variant: str, character: str, seed: int | None) -> str:
    return f"{variant}/{character}/{'untrained' if seed is None else f'seed-{seed}'}"


def jobs(variants: Sequence[str], characters: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Everything, in the order in which it is done."""
    chosen = [v for v in VARIANTS.values() if v.name in variants]
    found: list[Job] = []
    for group in sorted({v.group for v in chosen}):
        for turn, seed in enumerate(seeds):
            for character in characters:
                for variant in (v for v in chosen if v.group == group):
                    if variant.seeded:
                        found.append(Job(variant, character, seed))
                    elif turn == 0:
                        found.append(Job(variant, character, None))
    return found


def plan_of(*parts: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The variants, characters and seeds that any part of a study plans, in the order of tables."""
    orders = {"variants": list(VARIANTS), "characters": list(CAST), "seeds": None}
    return {
        name: sorted({x for part in parts for x in part.get(name, ())}, key=order.index if order else None)
        for name, order in orders.items()
    }


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings of two studies that are not equal: their numbers do not compare."""
    names = [*other, *(name for name in one if name not in other)]
    return {n: (one.get(n), other.get(n)) for n in names if one.get(n) != other.get(n)}


def shipped(name: str) -> Path:
    """A folder as given, or one that ships under ``checkpoints/``."""
    found = presets.folder_or_shipped(name)
    if not found.is_dir():
        raise UserError(f"'{name}': not a directory, and nothing of that name ships; give a folder.")
    return found
