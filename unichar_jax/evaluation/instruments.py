"""The scorers and the judge that are at hand: loaded from a folder of encoders, or reported as missing.

Metrics use the same encoders and the same scorer classes as rewards (``scoring``), under names of their own. What
is absent is no error: the metrics it would give are left out, and results say why.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unichar_jax.evaluation.judge import load_judge
from unichar_jax.evaluation.pictures import Instruments, MeanSimilarity
from unichar_jax.evaluation.rater import Rater
from unichar_jax.scoring.base import Scorer
from unichar_jax.scoring.folder import HUB, JUDGE, EncoderFolder

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
      folder: of encoders (``scoring.folder``), perhaps with a judge; None for none.
      rater: gives marks, if there is an endpoint.
    """
    if folder is None:
        return _none("no encoders were given; give --encoders FOLDER", rater)
    encoders = EncoderFolder(folder)
    there = {kind for kind in (*HUB, JUDGE) if encoders.place(kind)}
    if not there:
        kinds = f"{', '.join((*HUB, JUDGE))} (the model_type in a folder's config.json says which)"
        return _none(f"{folder} holds none of {kinds}", rater)
    scorers: list[Scorer] = []
    missing: dict[str, str] = {}
    if "clip" in there:
        scorers.append(encoders.text_image(name="clip_t"))
        scorers.append(MeanSimilarity(encoders.clip_images, "clip_i"))
    else:
        missing["clip_t, clip_i"] = encoders.absent("clip")
    if "dinov2" in there:
        scorers.append(MeanSimilarity(encoders.identity, "dino"))
    by = encoders.diversity_kind
    absent = {name: kind for name, kind in (("dino", "dinov2"), ("diversity", by)) if kind not in there}
    if absent:
        missing[", ".join(absent)] = encoders.absent(next(iter(absent.values())))
    diversity = encoders.diversity(size=256) if by in there else None
    judge = load_judge(encoders.need(JUDGE)) if JUDGE in there else None
    if judge is None:
        missing["identity, prompt_following, consistency"] = encoders.absent(JUDGE)
    return Instruments(tuple(scorers), diversity, judge, rater, missing, judge.voices if judge else {})


def _none(why: str, rater: Rater | None) -> Instruments:
    return Instruments(rater=rater, missing={"clip_t, clip_i, dino, diversity": why})
