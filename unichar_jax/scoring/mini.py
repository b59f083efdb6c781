"""Small scorers for the mini world, and the judge that only reports.

The scorers are CLIP and DINOv2 as for pictures of any kind, at small sizes (``CLIP``, ``DINOV2``): the
same modules, files and scorer classes. Two things are their own: pictures are taken at 96 px
(``PREPROCESS``), and words are hashed (``tokenize``), so that the text side needs no vocabulary file and
no other model's tokenizer.

The ``Judge`` reads all attributes that the drawing code knows. It is a convolutional network trained from
another seed on other pictures than the scorers (which are transformers), so that what is optimised is not
what judges. It must never be used as a reward. Training of all three is in ``workshop/minimodel/encoders.py``.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from unichar_jax.checkpoint import table
from unichar_jax.checkpoint.encoders import load_clip, load_dinov2
from unichar_jax.checkpoint.safetensors_io import open_file, write_file
from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Conv, GroupNorm, Level
from unichar_jax.models.encoders.clip import Clip, ClipConfig
from unichar_jax.models.encoders.dinov2 import Dinov2, Dinov2Config
from unichar_jax.models.encoders.transformer import TransformerConfig
from unichar_jax.models.layers import Dense
from unichar_jax.scoring.base import in_batches
from unichar_jax.scoring.clip_score import ClipScorer
from unichar_jax.scoring.features import ImageEncoder
from unichar_jax.scoring.preprocess import Preprocess
from workshop.miniworld.world import ATTRIBUTES

SIZE = 96
PREPROCESS = Preprocess(SIZE, SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Pictures in [0, 1] of any size to ``[B, 96, 96, 3]`` in [-1, 1]."""

DINOV2 = Dinov2Config(
    TransformerConfig(128, 384, 4, 4, 1e-6, "gelu", layer_scale=True), image_size=SIZE, patch_size=8
)
CLIP = ClipConfig(
    text=TransformerConfig(128, 384, 2, 4, 1e-5, "gelu"),
    vision=TransformerConfig(128, 384, 4, 4, 1e-5, "gelu"),
    projection_dim=96,
    vocab_size=1024,
    max_length=48,
    end_of_text=1023,
    image_size=SIZE,
    patch_size=8,
)
CLIP_FOLDER, DINOV2_FOLDER, JUDGE_FILE = "text_image", "image_encoder", "judge.safetensors"
"""Where the three lie in a model's folder."""

_WORD = re.compile(r"[a-z]+")
_OWN = {
    word: i for i, word in enumerate(sorted({w for v in ATTRIBUTES.values() for w in _WORD.findall(str(v))}))
}


def tokenize(texts: Sequence[str], cfg: ClipConfig = CLIP) -> np.ndarray:
    """Texts to int32 ``[N, max_length]``: one id for each lower-case word, then end tokens.

    The words of ``ATTRIBUTES`` have an id each, other words share hashed ones; longer texts are cut.
    """
    first = len(_OWN)

    def word_id(word: str) -> int:
        return _OWN.get(word, first + zlib.crc32(word.encode()) % (cfg.end_of_text - first))

    ids = np.full((len(texts), cfg.max_length), cfg.end_of_text, np.int32)
    for row, text in zip(ids, texts, strict=True):
        words = _WORD.findall(text.lower())[: cfg.max_length - 1]
        row[: len(words)] = [word_id(word) for word in words]
    return ids


def clip_scorer(folder: str | Path, *, scale: float = 1.0, name: str = "clip") -> ClipScorer:
    """The mini world's text-image match; ``folder`` is the model's (``checkpoints/mini``)."""
    model = load_clip(Path(folder) / CLIP_FOLDER)
    return ClipScorer(model, tokenize, scale=scale, prepare=PREPROCESS, name=name)


def clip_image_encoder(model: Clip) -> ImageEncoder:
    """The picture side of the mini world's CLIP, for features and diversity."""
    return ImageEncoder(model, Clip.encode_images, PREPROCESS)


def image_encoder(model: Dinov2) -> ImageEncoder:
    """Features for identity: the cosine of two pictures is near the share of looks they have in common."""
    return ImageEncoder(model, Dinov2.__call__, PREPROCESS)


def identity_encoder(folder: str | Path) -> ImageEncoder:
    """The mini world's identity encoder; ``folder`` is the model's (``checkpoints/mini``)."""
    return image_encoder(load_dinov2(Path(folder) / DINOV2_FOLDER))


# -- the judge ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeConfig:
    """Widths at 48, 24, 12 and 6 cells a side."""

    widths: tuple[int, ...] = (24, 40, 72, 112)
    groups: int = 4


class Judge(nnx.Module):
    """Reads every attribute from a picture: a residual network, and its own places to look at for each."""

    def __init__(self, cfg: JudgeConfig = JudgeConfig()):
        last = len(cfg.widths) - 1
        inputs = [cfg.widths[0], *cfg.widths]
        self.conv_in = Conv(3, cfg.widths[0], stride=2)
        self.levels = nnx.List(
            [Level(inputs[i], width, 1, cfg.groups, down=i < last) for i, width in enumerate(cfg.widths)]
        )
        self.norm = GroupNorm(cfg.widths[-1], cfg.groups)
        cells = (SIZE // 2 ** (last + 1)) ** 2
        self.places = params.declare((len(ATTRIBUTES), cells), (None, None), params.zeros)
        self.heads = nnx.List([Dense(cfg.widths[-1], len(v), (None, None)) for v in ATTRIBUTES.values()])
        self.cfg = cfg

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Images ``[B, 96, 96, 3]`` in [-1, 1] to logits ``{attribute: [B, values]}``."""
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        x = jax.nn.silu(self.norm(x))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        seen = jnp.einsum("bpc,ap->bac", x, jax.nn.softmax(self.places[...], axis=-1))
        return {
            name: head(seen[:, i]) for i, (name, head) in enumerate(zip(ATTRIBUTES, self.heads, strict=True))
        }

    def probabilities(self, images: jax.Array) -> dict[str, jax.Array]:
        return {name: jax.nn.softmax(logits) for name, logits in self(images).items()}


class AttributeReader:
    """The judge as a function of pictures.

    Args:
      judge: with its weights.
      batch_size: pictures in one call of the compiled function.
    """

    def __init__(self, judge: Judge, batch_size: int = 32):
        def read(judge: Judge, images: jax.Array) -> jax.Array:
            return jnp.concatenate(list(judge.probabilities(PREPROCESS(images)).values()), axis=-1)

        self.judge, self._batch_size, self._read = judge, batch_size, jax.jit(read)

    def probabilities(self, images: jax.Array) -> dict[str, np.ndarray]:
        """Pictures ``[N, H, W, 3]`` in [0, 1] to ``{attribute: [N, values]}``, as ``ATTRIBUTES`` has them."""
        joined = np.asarray(in_batches(lambda x: self._read(self.judge, x), images, self._batch_size))
        ends = np.cumsum([len(values) for values in ATTRIBUTES.values()])[:-1]
        return dict(zip(ATTRIBUTES, np.split(joined, ends, axis=-1), strict=True))

    def __call__(self, images: jax.Array) -> list[dict[str, str]]:
        """The most probable value of every attribute, for each picture ``[N, H, W, 3]`` in [0, 1]."""
        best = {name: p.argmax(axis=-1) for name, p in self.probabilities(images).items()}
        return [{n: ATTRIBUTES[n][int(best[n][i])] for n in best} for i in range(len(images))]


def save_judge(path: Path, judge: Judge) -> None:
    """Writes the weights in bfloat16; complete or not at all."""
    arrays = {n: np.asarray(x).astype(ml_dtypes.bfloat16) for n, x in params.flat(judge).items()}
    temporary = path.with_name(path.name + ".partial")
    write_file(temporary, {n: (x.shape, x.dtype) for n, x in arrays.items()}, arrays.items())
    temporary.replace(path)


def load_judge(path: str | Path) -> AttributeReader:
    """Reads ``judge.safetensors``, or a model's folder that holds it.

    Raises:
      UserError: the file is absent, damaged or not the judge's.
    """
    path = Path(path)
    path = path / JUDGE_FILE if path.is_dir() else path
    file, declared = open_file(path), Judge()
    expected = {n: s.shape for n, s in params.named_leaves(declared)}
    found = {n: info.shape for n, info in file.tensors.items()}
    if expected != found:
        different = sorted(n for n in expected | found if expected.get(n) != found.get(n))
        raise UserError(
            f"{path}: not the weights of this judge; {len(different)} arrays differ, the first is"
            f" {different[0]}. Make them again with: python -m workshop.minimodel.encoders judge"
        )
    arrays = {n: jnp.asarray(file.read(n).astype(np.float32)) for n in found}
    return AttributeReader(table.module_from_flat(declared, arrays))
