"""Scorers by name: what a configuration may call a term of the reward, and what is built for it.

The encoders lie in one folder: for the real model ``clip-vit-large-patch14/`` and ``dinov2-base/`` as on
the Hub and ``lpips_alex.safetensors``; for the mini world its own small encoders. Which of the two it is,
the folder's files say. Only what the named terms need is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unichar_jax.checkpoint import encoders as encoder_files
from unichar_jax.config.model import ModelConfig
from unichar_jax.errors import UserError, did_you_mean
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling.parts import Transforms
from unichar_jax.scoring import clip_score, identity, mini, preprocess
from unichar_jax.scoring.base import Scorer
from unichar_jax.scoring.clip_score import ClipScorer, clip_tokenizer
from unichar_jax.scoring.custom import CustomScorer
from unichar_jax.scoring.diversity import FeatureDiversity, LpipsDiversity
from unichar_jax.scoring.features import ImageEncoder
from unichar_jax.scoring.identity import IdentityScorer, dinov2_encoder
from unichar_jax.scoring.visual_questions import VisualQuestions

Options = Mapping[str, Any]

CLIP_FOLDER, DINOV2_FOLDER = "clip-vit-large-patch14", "dinov2-base"


@dataclass
class Sources:
    """Where scorers come from; encoders are loaded when a term first needs them.

    Attributes:
      folder: of the encoders.
      model: gives the unified model (for visual questions).
      cfg, tokenizer: of that model.
      timeout: seconds that a custom function may take.
    """

    folder: Path
    model: Callable[[], UnifiedModel]
    cfg: ModelConfig
    tokenizer: Any
    timeout: float = 300.0

    @property
    def is_mini(self) -> bool:
        return (self.folder / mini.DINOV2_FOLDER).is_dir()

    @cached_property
    def identity(self) -> ImageEncoder:
        """Pictures to who is in them."""
        if self.is_mini:
            return mini.identity_encoder(self.folder)
        return dinov2_encoder(encoder_files.load_dinov2(self.folder / DINOV2_FOLDER))

    def match(self, options: Options) -> Scorer:
        if self.is_mini:
            return mini.clip_scorer(self.folder, name="text_image_match", **options)
        folder = self.folder / CLIP_FOLDER
        if options.get("as_shipped"):
            options = dict(scale=clip_score.REFERENCE_SCALE, prepare=preprocess.CLIP_BILINEAR)
        return ClipScorer(encoder_files.load_clip(folder), clip_tokenizer(folder), **options)

    def diversity(self, options: Options) -> Scorer:
        if self.is_mini:
            return FeatureDiversity(self.identity)
        return LpipsDiversity(encoder_files.load_lpips(self.folder), **options)

    def band(self, options: Options) -> Scorer:
        low = options.get("low", identity.REFERENCE_BAND[0])
        high = options.get("high", identity.REFERENCE_BAND[1])
        return IdentityScorer(self.identity, band=(low, high))


BUILDERS: dict[str, Callable[[Sources, Options], Scorer]] = {
    "text_image_match": lambda s, o: s.match(o),
    "identity": lambda s, o: IdentityScorer(s.identity),
    "identity_band": lambda s, o: s.band(o),
    "diversity": lambda s, o: s.diversity(o),
    "feature_diversity": lambda s, o: FeatureDiversity(s.identity),
    "visual_questions": lambda s, o: VisualQuestions(s.model, s.tokenizer, Transforms.of(s.cfg).look, **o),
}
"""Name of a term -> its scorer. ``file.py:function`` names a function of the user's instead."""


def build(name: str, options: Options, sources: Sources) -> Scorer:
    """The scorer that a term names.

    Raises:
      UserError: an unknown name or option, or weights that are absent.
    """
    if ".py:" in name:
        return CustomScorer(name, timeout=sources.timeout)
    if name not in BUILDERS:
        raise UserError(
            f"reward term '{name}' is unknown{did_you_mean(name, BUILDERS)}; expected one of"
            f" {', '.join(BUILDERS)}, or path/to/file.py:function."
        )
    try:
        return BUILDERS[name](sources, options)
    except TypeError as error:
        raise UserError(f"reward term '{name}': options {dict(options)} do not fit ({error}).") from None
