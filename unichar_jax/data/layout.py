"""From the parts of a sample to the tokens of three streams, and from many samples to one batch.

``lay_out`` gives one sample its metadata (order, position, block, noisy), targets and loss weights;
``collate`` puts samples side by side into rows of fixed capacity; ``unpack`` takes them out again. A
laid-out sample is the three streams of ``models.streams`` without the batch axis, so collation is
copying and nothing else. Everything is numpy.

Rules of a sample (BAGEL, arXiv 2505.14683): a text is ``BOS ids EOS`` with consecutive positions; an
image is ``start tokens end``, all sharing one position, in a block of their own. A noised image is
seen by nobody outside it, so it takes a position but does not advance the counter. A text that was
dropped leaves no trace; a dropped image leaves its position behind.

This module draws no random number, reads no file, and never cuts a sample to make it fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from unichar_jax.config.model import ModelConfig
from unichar_jax.models.streams import Batch, LatentStream, TextStream, TokenMeta, VitStream


class Sizes(NamedTuple):
    """Numbers of tokens per stream; also the capacities of a row."""

    text: int
    vit: int
    latent: int

    @property
    def total(self) -> int:
        return self.text + self.vit + self.latent

    def fits(self, capacities: Sizes) -> bool:
        return all(n <= room for n, room in zip(self, capacities, strict=True))

    def plus(self, other: Sizes) -> Sizes:
        return Sizes(self.text + other.text, self.vit + other.vit, self.latent + other.latent)


@dataclasses.dataclass(frozen=True)
class TextPart:
    """A tokenised text, without its delimiters.

    Attributes:
      ids: token ids, ``[N]``.
      loss: the model learns to say it; every token and the end, but not the beginning.
      droppable: condition dropout may leave it out.
      dropped: it was left out.
    """

    ids: Sequence[int] | np.ndarray
    loss: bool = False
    droppable: bool = False
    dropped: bool = False

    @property
    def sizes(self) -> Sizes:
        return Sizes(len(self.ids) + 2, 0, 0)


@dataclasses.dataclass(frozen=True)
class VitPart:
    """An image to look at.

    Attributes:
      patches: float32 ``[N, patch * patch * 3]`` in [-1, 1].
      grid: int32 ``[N]``, rows of the vision tower's position table.
      droppable, dropped: as in ``TextPart``.
    """

    patches: np.ndarray
    grid: np.ndarray
    droppable: bool = False
    dropped: bool = False

    @property
    def sizes(self) -> Sizes:
        return Sizes(2, len(self.grid), 0)


@dataclasses.dataclass(frozen=True)
class LatentPart:
    """An image to draw (``loss``) or one given as a clean condition.

    Attributes:
      mean, logvar: float32 ``[N, latent_dim]``, patches of the autoencoder's posterior, unscaled.
      grid: int32 ``[N]``, rows of the latent position table.
      loss: noised, and the model learns to denoise it.
      timestep: the raw normal draw of its noise level; ignored without ``loss``.
      droppable, dropped: as in ``TextPart``.
    """

    mean: np.ndarray
    logvar: np.ndarray
    grid: np.ndarray
    loss: bool = True
    timestep: float = 0.0
    droppable: bool = False
    dropped: bool = False

    @property
    def sizes(self) -> Sizes:
        return Sizes(2, 0, len(self.grid))


Part = TextPart | VitPart | LatentPart


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One sample: the three streams with leaves ``[N, ...]`` in place of ``[B, L, ...]``.

    The segment is 1 everywhere; it becomes the sample's number in its row when collated.
    """

    text: TextStream
    vit: VitStream
    latent: LatentStream


def sizes(tokens: Tokens) -> Sizes:
    """How many tokens a sample has in each stream."""
    return Sizes(len(tokens.text.ids), len(tokens.vit.grid), len(tokens.latent.grid))


def _i32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def _f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def _blank(lead: tuple[int, ...], room: Sizes, model: ModelConfig) -> Tokens:
    """Streams of padding: leaves ``[*lead, capacity, ...]`` of zeros."""

    def meta(n: int) -> TokenMeta:
        return TokenMeta(*(_i32(*lead, n) for _ in range(5)))

    t, v, z = room
    return Tokens(
        TextStream(
            ids=_i32(*lead, t),
            meta=meta(t),
            targets=_i32(*lead, t),
            weight=_f32(*lead, t),
            task=_i32(*lead, t),
        ),
        VitStream(patches=_f32(*lead, v, model.vision.patch_dim), grid=_i32(*lead, v), meta=meta(v)),
        LatentStream(
            mean=_f32(*lead, z, model.latent_dim),
            logvar=_f32(*lead, z, model.latent_dim),
            grid=_i32(*lead, z),
            timestep=_f32(*lead, z),
            meta=meta(z),
            weight=_f32(*lead, z),
            task=_i32(*lead, z),
        ),
    )


def lay_out(
    parts: Sequence[Part], model: ModelConfig, *, task: int = 0, reweight_text: bool = False
) -> Tokens:
    """Tokens of one sample.

    Args:
      parts: what the sample consists of, in reading order.
      model: gives the four special tokens and the widths of absent streams.
      task: index of the task, written to every text and latent token.
      reweight_text: weigh each token of a learned text of n tokens by ``1 / sqrt(n + 1)`` in place
        of 1, so that long answers do not drown short ones (an option of the reference, off there).
    """
    kept = [part for part in parts if not part.dropped]
    total = Sizes(0, 0, 0)
    for part in kept:
        total = total.plus(part.sizes)
    tokens = _blank((), total, model)
    for stream in (tokens.text, tokens.vit, tokens.latent):
        stream.meta.segment[:] = 1
    tokens.text.task[:] = tokens.latent.task[:] = task

    special = model.special_tokens
    at = Sizes(0, 0, 0)  # where the next token of each stream goes
    order = position = block = 0
    for part in parts:
        if part.dropped:
            position += not isinstance(part, TextPart)
            continue
        end = at.plus(part.sizes)
        text = slice(at.text, end.text)
        n = end.total - at.total
        if isinstance(part, TextPart):
            tokens.text.ids[text] = special.frame(part.ids)
            tokens.text.meta.order[text] = order + np.arange(n)
            tokens.text.meta.position[text] = position + np.arange(n)
            if part.loss:
                learned = slice(at.text, end.text - 1)
                tokens.text.targets[learned] = tokens.text.ids[at.text + 1 : end.text]
                tokens.text.weight[learned] = (n - 1) ** -0.5 if reweight_text else 1.0
            position += n
        else:
            block += 1
            tokens.text.ids[text] = special.image_start, special.image_end
            tokens.text.meta.order[text] = order, order + n - 1
            if isinstance(part, VitPart):
                inside, noisy = slice(at.vit, end.vit), False
                image: VitStream | LatentStream = tokens.vit
                tokens.vit.patches[inside] = part.patches
            else:
                inside, noisy = slice(at.latent, end.latent), part.loss
                image, latent = tokens.latent, tokens.latent
                latent.mean[inside], latent.logvar[inside] = part.mean, part.logvar
                latent.timestep[inside] = part.timestep if part.loss else -np.inf
                latent.weight[inside] = part.loss
            image.grid[inside] = part.grid
            image.meta.order[inside] = order + 1 + np.arange(n - 2)
            for meta, where in ((tokens.text.meta, text), (image.meta, inside)):
                meta.position[where] = position
                meta.block[where] = block
                meta.noisy[where] = noisy
            position += not noisy
        order += n
        at = end
    return tokens


def collate(rows: Sequence[Sequence[Tokens]], capacities: Sizes, model: ModelConfig) -> Batch:
    """Packs samples into rows: numpy leaves ``[len(rows), capacity, ...]``, padded with zeros.

    Samples of a row are numbered 1, 2, ... in their ``segment``.

    Raises:
      ValueError: the samples of a row exceed its capacities.
    """
    packed = _blank((len(rows),), capacities, model)
    for r, row in enumerate(rows):
        at = Sizes(0, 0, 0)
        for number, tokens in enumerate(row, start=1):
            end = at.plus(sizes(tokens))
            if not end.fits(capacities):
                raise ValueError(
                    f"row {r}: its first {number} of {len(row)} samples need {end}, "
                    f"the capacities are {capacities}; plan fewer samples for it"
                )
            for name, first, last in zip(Sizes._fields, at, end, strict=True):
                into, stream = getattr(packed, name), getattr(tokens, name)
                jax.tree.map(lambda x, y: _put(x[r, first:last], y), into, stream)  # noqa: B023
                into.meta.segment[r, first:last] = number
            at = end
    return Batch(packed.text, packed.vit, packed.latent)


def _put(into: np.ndarray, values: np.ndarray) -> None:
    into[...] = values
