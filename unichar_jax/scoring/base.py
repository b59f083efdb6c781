"""One interface for rewards and for evaluation: pictures in, one number for each picture out.

A ``Scorer`` has a name and is called with a batch of pictures and a ``ScoreContext`` that says what was
asked for, which pictures belong together, and what the character looks like. It keeps no state that a
caller can see (features of references and prompts are cached by their content), so one scorer serves many
characters and any order of calls. ``checked_scores`` says what is wrong with what one
returns; ``weighted_sum`` makes a reward of several. A scorer decides nothing about training: advantages, clipping and
logging are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unichar_jax.data.images import to_rgb
from unichar_jax.data.rl_prompts import RLQuestion
from unichar_jax.errors import UserError, did_you_mean
from unichar_jax.files import digest
from unichar_jax.models.unified import UnifiedModel


@dataclass(frozen=True)
class References:
    """Pictures of a character on white, uint8 ``[H, W, 3]`` of any sizes, and a key of each one's content."""

    pictures: tuple[np.ndarray, ...] = ()
    keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, images: Iterable[Image.Image]) -> References:
        """From opened pictures of any mode; transparency is composited on white."""
        pictures = tuple(np.asarray(to_rgb(image)) for image in images)
        return cls(pictures, tuple(content_key(p) for p in pictures))


def content_key(array: np.ndarray) -> str:
    """A digest of an array's shape, dtype and bytes."""
    head = f"{array.shape}{array.dtype}".encode()
    return digest(head, np.ascontiguousarray(array).tobytes())


@dataclass(frozen=True)
class ScoreContext:
    """What a scorer may know besides the pixels; sequences have one item for each of the N pictures.

    Attributes:
      prompts: what was asked for.
      groups: integers ``[N]``; pictures with the same number are one group (one prompt of one rollout).
      references: pictures of the character.
      questions: visual questions of each picture's prompt, or empty.
      model: the one that drew, as it is now: it answers visual questions. None where there is none.
    """

    prompts: Sequence[str]
    groups: np.ndarray
    references: References = field(default_factory=References)
    questions: Sequence[Sequence[RLQuestion]] = ()
    model: UnifiedModel | None = None

    def __post_init__(self) -> None:
        counts = [len(self.prompts), len(self.groups), *([len(self.questions)] if self.questions else [])]
        if len(set(counts)) != 1:
            raise ValueError(f"prompts, groups and questions of different lengths: {counts}")


class Scorer(Protocol):
    """A judge of pictures. ``name`` is what weights and curves call it."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: jax.Array, context: ScoreContext) -> np.ndarray | jax.Array:
        """Scores ``[N]`` of pictures ``[N, H, W, 3]``, float in [0, 1]; larger is better.

        The scores of a picture may depend on the others of its group and on nothing else of the batch: not on
        the order of pictures, nor on the device that each is on.
        """
        ...


def checked_scores(name: str, scores: Any, context: ScoreContext) -> np.ndarray:
    """Scores as float32 ``[N]``, or a ``UserError`` that says what is wrong with them."""
    count = len(context.prompts)
    try:
        array = np.asarray(scores, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"scorer '{name}': expected {count} numbers, got {type(scores).__name__} ({error})."
        ) from None
    if array.shape != (count,):
        raise UserError(
            f"scorer '{name}': expected one number for each picture, shape ({count},), got shape"
            f" {array.shape}."
        )
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array))
        raise UserError(
            f"scorer '{name}': {bad.size} of {count} scores are not finite; the first is {array[bad[0]]} for"
            f" picture {bad[0]}, prompt {context.prompts[bad[0]]!r}. Give such pictures a low finite score."
        )
    return array


def weighted_sum(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The reward ``[N]``: each scorer's scores times its weight. A scorer without a weight only reports."""
    if not weights:
        raise UserError("reward weights: expected at least one scorer with a weight, got none.")
    for name in weights:
        if name not in scores:
            raise UserError(
                f"reward weights: there is no scorer '{name}'{did_you_mean(name, scores)}; expected one of"
                f" {', '.join(scores)}."
            )
    return np.asarray(sum(w * scores[n] for n, w in weights.items()), np.float32)


# -- helpers for scorers ------------------------------------------------------------------------------------


def in_batches(function: Callable[[jax.Array], jax.Array], images: Any, size: int) -> jax.Array:
    """``function`` over slices of ``size`` pictures, joined; the last is padded, so it compiles once."""
    outs = []
    for start in range(0, len(images), size):
        part = jnp.asarray(images[start : start + size])
        short = min(size, len(images)) - len(part)
        if short:
            part = jnp.concatenate([part, jnp.repeat(part[-1:], short, axis=0)])
        outs.append(function(part))
    return jnp.concatenate(outs)[: len(images)]


def group_table(groups: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the members of each group are.

    Returns:
      index: int32 ``[number of groups, largest size]``, places in the batch, in the batch's order.
      valid: bool of the same shape; places that a smaller group lacks are False (and their index is 0).
    """
    groups = np.asarray(groups)
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    width = max(len(m) for m in members)
    index = np.zeros((len(members), width), np.int32)
    valid = np.zeros((len(members), width), bool)
    for row, m in enumerate(members):
        index[row, : len(m)], valid[row, : len(m)] = m, True
    return index, valid


class FeatureCache:
    """Features by key, each computed once; keys are contents (``References.keys``, prompts)."""

    def __init__(self) -> None:
        self._features: dict[str, np.ndarray] = {}

    def get(self, keys: Sequence[str], compute: Callable[[list[int]], Iterable[np.ndarray]]) -> np.ndarray:
        """Features ``[len(keys), ...]``; ``compute`` is asked for the places of the keys that are new."""
        new = {k: i for i, k in enumerate(keys) if k not in self._features}
        if new:
            features = compute(list(new.values()))
            self._features |= {k: np.asarray(f) for k, f in zip(new, features, strict=True)}
        return np.stack([self._features[k] for k in keys])
