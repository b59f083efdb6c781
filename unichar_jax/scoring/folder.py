"""A folder of encoders: what is in it, and the scorers that are made of it.

An encoder is a folder whose ``config.json`` says its kind, as ``model_type`` does on the Hub:

    clip              a picture and a text in one space
    dinov2            who is in a picture
    attribute_judge   for reports alone: read by ``evaluation.judge``, and refused as a reward

and LPIPS is the file ``lpips_alex.safetensors``. Folders may have any names; where several are of one kind, the Hub's
name counts. What is not done as for the published encoders, ``config.json`` says too:

    preprocess   resize, crop, mean, std and perhaps filter of pictures (``Preprocess``)
    tokenizer    {"kind": "hashed_words", "words": [...]} (clip; by default CLIP's own files are in the folder)
    diversity    true if its features tell how much pictures differ (dinov2; by default LPIPS does)

Nothing is loaded before it is asked for, and nothing twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from unichar_jax.checkpoint import encoders as files
from unichar_jax.errors import UserError
from unichar_jax.models.encoders.clip import Clip, ClipConfig
from unichar_jax.models.encoders.dinov2 import Dinov2
from unichar_jax.records import Findings, Record, read_settings
from unichar_jax.scoring import preprocess
from unichar_jax.scoring.base import Scorer
from unichar_jax.scoring.clip_score import REFERENCE_SCALE, ClipScorer, Tokenize, clip_tokenizer, hashed_words
from unichar_jax.scoring.diversity import FeatureDiversity, LpipsDiversity
from unichar_jax.scoring.features import ImageEncoder
from unichar_jax.scoring.preprocess import Preprocess

JUDGE = "attribute_judge"
"""The kind that reports and never rewards."""

HUB = {"clip": "clip-vit-large-patch14", "dinov2": "dinov2-base", "lpips": files.LPIPS_FILE}
"""Kind -> what the published encoder is called in a folder of encoders."""


def kind_of(folder: Path) -> str:
    """The kind that a folder's ``config.json`` names; empty if it names none, or is not there."""
    found = Findings()
    kind = read_settings(found, folder / "config.json").data.get("model_type")
    found.refuse()
    return kind if isinstance(kind, str) else ""


def preparation(config: Record, default: Preprocess | None, side: int) -> Preprocess:
    """How an encoder wants its pictures.

    Args:
      config: its ``config.json``.
      default: of the published encoder of its kind, if there is one.
      side: of the pictures that it was trained on, in pixels.

    Raises:
      UserError: ``preprocess`` is wrong, or pictures would be larger than ``side``.
    """
    told, found = config.inner("preprocess"), default
    if told is not None:
        mean, std = told.numbers("mean", 3, -10, 10), told.numbers("std", 3, 1e-6, 10)
        filter = told.choice("filter", "bicubic", "bilinear")
        found = Preprocess(told.whole("resize"), told.whole("crop"), mean, std, filter)
    if found is None or found.crop > side:
        expected = f"resize, crop, mean and std, for an encoder that was trained on pictures of {side} px"
        got = "nothing" if found is None else f"a crop of {found.crop}" + ("" if told else ", as published")
        config.error("preprocess", expected, got, "copy config.json from where the encoder is from")
    config.found.refuse()
    assert found is not None
    return found


@dataclass(frozen=True)
class EncoderFolder:
    """See the module's docstring. ``path`` need not exist: then nothing is in it."""

    path: Path

    def place(self, kind: str) -> Path | None:
        """Where the encoder of a kind is; None if there is none.

        Raises:
          UserError: there are several, or a ``config.json`` is no JSON.
        """
        published = self.path / HUB[kind] if kind in HUB else None
        if published is not None and published.exists():
            return published
        found = [p.parent for p in sorted(self.path.glob("*/config.json")) if kind_of(p.parent) == kind]
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise UserError(f"{self.path}: several encoders of kind '{kind}' ({names}); leave one.")
        return found[0] if found else None

    def absent(self, kind: str) -> str:
        """Why there is no encoder of a kind."""
        if kind == "lpips":
            return f"{self.path / HUB[kind]} is absent"
        return f"{self.path} holds no folder whose config.json says model_type '{kind}'"

    def need(self, kind: str) -> Path:
        """Where the encoder of a kind is; a ``UserError`` if there is none."""
        if (place := self.place(kind)) is None:
            like = f", such as {HUB[kind]} from the Hugging Face Hub" if kind in HUB else ""
            raise UserError(f"{self.absent(kind)}. Put one there{like}, or name another folder of encoders.")
        return place

    # -- what is made of them

    @cached_property
    def _clip(self) -> tuple[Clip, Preprocess, Tokenize]:
        folder = self.need("clip")
        config, model = files.read_config(folder, "clip"), files.load_clip(folder)
        prepare = preparation(config, preprocess.CLIP, model.cfg.image_size)
        return model, prepare, _tokenize(config, folder, model.cfg)

    def text_image(self, *, as_shipped: bool = False, **options: Any) -> ClipScorer:
        """The cosine of picture and prompt.

        Args:
          as_shipped: with the reference's scale and resizing, which only the published encoder has.
          options: of ``ClipScorer``.
        """
        model, prepare, tokenize = self._clip
        if as_shipped:
            if prepare != preprocess.CLIP:
                raise UserError(f"{self.need('clip')}: as_shipped is for CLIP as published; leave it out.")
            options |= {"scale": REFERENCE_SCALE, "prepare": preprocess.CLIP_BILINEAR}
        return ClipScorer(model, tokenize, **{"prepare": prepare, **options})

    @cached_property
    def clip_images(self) -> ImageEncoder:
        """CLIP's side for pictures."""
        model, prepare, _ = self._clip
        return ImageEncoder(model, Clip.encode_images, prepare)

    @cached_property
    def identity(self) -> ImageEncoder:
        """Pictures to who is in them."""
        folder = self.need("dinov2")
        config, model = files.read_config(folder, "dinov2"), files.load_dinov2(folder)
        prepare = preparation(config, preprocess.DINOV2, model.cfg.image_size)
        return ImageEncoder(model, Dinov2.__call__, prepare)

    @property
    def diversity_kind(self) -> str:
        """The kind of encoder that tells how much pictures differ."""
        place = self.place("dinov2")
        return "dinov2" if place and files.read_config(place, "dinov2").flag("diversity") else "lpips"

    def diversity(self, **options: Any) -> Scorer:
        """How much a picture differs from its group's others; ``options`` are those of ``LpipsDiversity``."""
        if self.diversity_kind == "dinov2":
            return FeatureDiversity(self.identity)
        return LpipsDiversity(files.load_lpips(self.need("lpips")), **options)


def _tokenize(config: Record, folder: Path, cfg: ClipConfig) -> Tokenize:
    if (told := config.inner("tokenizer")) is None:
        return clip_tokenizer(folder)
    told.choice("kind", "hashed_words")
    words = told.texts("words", required=True)
    if len(words) >= cfg.end_of_text:
        told.error("words", f"fewer than {cfg.end_of_text}", str(len(words)), "leave some out")
    config.found.refuse()
    return hashed_words(words, cfg)
