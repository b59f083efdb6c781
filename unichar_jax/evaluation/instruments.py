"""The scorers and the judge that are at hand: loaded from a folder of encoders, or reported as missing.

Metrics use the same encoders and the same scorer classes as rewards (``scoring``), under names of their own. What
is absent is no error: the metrics it would give are left out, and results say why.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from unichar_jax.checkpoint import encoders as files
from unichar_jax.evaluation.pictures import Instruments, MeanSimilarity
from unichar_jax.evaluation.rater import Rater
from unichar_jax.models.encoders.clip import Clip
from unichar_jax.scoring import mini, preprocess
from unichar_jax.scoring.base import Scorer
from unichar_jax.scoring.clip_score import ClipScorer, clip_tokenizer
from unichar_jax.scoring.diversity import FeatureDiversity, LpipsDiversity
from unichar_jax.scoring.features import ImageEncoder
from unichar_jax.scoring.identity import dinov2_encoder

CLIP_FOLDER, DINOV2_FOLDER = "clip-vit-large-patch14", "dinov2-base"
PUBLISHED_FILES = (CLIP_FOLDER, DINOV2_FOLDER, files.LPIPS_FILE)
"""What a folder of the published encoders holds: two folders as on the Hub, one file."""

MINI_FILES = (mini.CLIP_FOLDER, mini.DINOV2_FOLDER, mini.JUDGE_FILE)
"""What the mini model's folder holds besides."""

TRAINED_BY: Mapping[str, tuple[str, ...]] = {
    "text_image_match": ("clip_t",),
    "identity": ("dino",),
    "identity_band": ("dino",),
    "diversity": ("diversity",),
    "feature_diversity": ("diversity",),
}
"""Name of a reward's term -> the metrics that it raises directly, by the same encoder."""


def rewarded_metrics(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Metrics that a run's configuration trained its model to raise; none for a run without rewards."""
    terms = [t["name"] for t in config.get("reward", ()) if t.get("weight", 1.0) > 0]
    return tuple(dict.fromkeys(metric for name in terms for metric in TRAINED_BY.get(name, ())))


def find_instruments(folder: Path | None, rater: Rater | None = None) -> Instruments:
    """Everything that a folder of encoders offers.

    Args:
      folder: of the mini world's encoders (``checkpoints/mini``) or of the published ones; None for none.
      rater: gives marks, if there is an endpoint.
    """
    if folder is None:
        return _none("no encoders were given; give --encoders FOLDER", rater)
    if any((folder / name).exists() for name in MINI_FILES):
        return _mini(folder, rater)
    if any((folder / name).exists() for name in PUBLISHED_FILES):
        return _published(folder, rater)
    return _none(f"{folder} holds none of {', '.join((*PUBLISHED_FILES, *MINI_FILES))}", rater)


def _none(why: str, rater: Rater | None) -> Instruments:
    return Instruments(rater=rater, missing={"clip_t, clip_i, dino, diversity": why})


def _mini(folder: Path, rater: Rater | None) -> Instruments:
    scorers: list[Scorer] = []
    missing: dict[str, str] = {}
    diversity, judge = None, None
    if _present(folder / mini.CLIP_FOLDER, "clip_t, clip_i", missing):
        clip = files.load_clip(folder / mini.CLIP_FOLDER)
        scorers.append(ClipScorer(clip, mini.tokenize, prepare=mini.PREPROCESS, name="clip_t"))
        scorers.append(MeanSimilarity(mini.clip_image_encoder(clip), "clip_i"))
    if _present(folder / mini.DINOV2_FOLDER, "dino, diversity", missing):
        encoder = mini.identity_encoder(folder)
        scorers.append(MeanSimilarity(encoder, "dino"))
        diversity = FeatureDiversity(encoder)
    if _present(folder / mini.JUDGE_FILE, "identity, prompt_following, consistency", missing):
        reader = mini.load_judge(folder)
        judge = lambda pictures: reader.probabilities(jnp.asarray(pictures, jnp.float32) / 255)  # noqa: E731
    return Instruments(tuple(scorers), diversity, judge, rater, missing)


def _published(folder: Path, rater: Rater | None) -> Instruments:
    scorers: list[Scorer] = []
    missing: dict[str, str] = {}
    diversity = None
    if _present(folder / CLIP_FOLDER, "clip_t, clip_i", missing):
        clip = files.load_clip(folder / CLIP_FOLDER)
        scorers.append(ClipScorer(clip, clip_tokenizer(folder / CLIP_FOLDER), name="clip_t"))
        scorers.append(MeanSimilarity(ImageEncoder(clip, Clip.encode_images, preprocess.CLIP), "clip_i"))
    if _present(folder / DINOV2_FOLDER, "dino", missing):
        encoder = dinov2_encoder(files.load_dinov2(folder / DINOV2_FOLDER))
        scorers.append(MeanSimilarity(encoder, "dino"))
    if _present(folder / files.LPIPS_FILE, "diversity", missing):
        diversity = LpipsDiversity(files.load_lpips(folder), size=256)
    return Instruments(tuple(scorers), diversity, None, rater, missing)


def _present(path: Path, metrics: str, missing: dict[str, str]) -> bool:
    if path.exists():
        return True
    missing[metrics] = f"{path} is absent"
    return False
