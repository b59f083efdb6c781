"""Numbers from pictures: scorers, copies of training pictures, and what the independent judge reads.

Scorers are those of ``scoring``, the same implementation that gives rewards. The judge is another: it
reads attributes from a picture (``evaluation.judge``), and is never a reward. It is asked only about characters
whose folder says what is true (``<NAME>_attributes.json``). Which pictures are copies, and how much those of
one prompt vary, needs no network at all: pixels decide, on the scale that the training pictures set themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from unichar_jax.data.images import open_image
from unichar_jax.evaluation.attributes import Attributes, Voices, stated
from unichar_jax.evaluation.items import Case
from unichar_jax.evaluation.judge import Judge
from unichar_jax.evaluation.outputs import Output
from unichar_jax.evaluation.rater import Rater
from unichar_jax.evaluation.texts import Metrics
from unichar_jax.scoring.base import References, ScoreContext, Scorer, checked_scores
from unichar_jax.scoring.diversity import mean_distance_to_others
from unichar_jax.scoring.features import ImageEncoder

THUMBNAIL = 32
"""Side at which pictures are compared for copies."""

COPY = 0.5
"""A picture that is less than this ``apart`` from the originals repeats one of them."""


@dataclass(frozen=True)
class Instruments:
    """What measures.

    Attributes:
      scorers: each gives every picture a number of its own.
      diversity: gives pictures of one prompt a number together; asked where there are several.
      judge: reads attributes; never a reward.
      rater: gives replies marks from 1 to 7.
      missing: metrics that cannot be had here, and why.
      voices: by whose phrases replies are known; none leaves voices out.
    """

    scorers: tuple[Scorer, ...] = ()
    diversity: Scorer | None = None
    judge: Judge | None = None
    rater: Rater | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    voices: Voices = field(default_factory=dict)


class MeanSimilarity:
    """Mean cosine of a picture to all pictures of the character: CLIP-I and DINO as of DreamBooth
    (arXiv 2208.12242). ``scoring.identity`` takes the largest instead, which suits a reward."""

    def __init__(self, encode: ImageEncoder, name: str):
        self.name, self._encode = name, encode

    def __call__(self, images: jnp.ndarray, context: ScoreContext) -> jnp.ndarray:
        references = jnp.asarray(self._encode.references(context.references))
        return (self._encode(images) @ references.T).mean(axis=-1)


def measure(case: Case, outputs: Sequence[Output], instruments: Instruments) -> list[Metrics]:
    """Metrics of every output's picture; all are of one task and one character."""
    found: list[Metrics] = [{} for _ in outputs]
    pictures = [_open(o.data["picture"]) for o in outputs]
    originals = [_open(i.path) for i in case.train.images]
    small, small_originals = ([_shrunk(p) for p in some] for some in (pictures, originals))  # once for both
    new, various = (
        apart(small, small_originals),
        varied(small, [o.item.key for o in outputs], small_originals),
    )
    for one, to_originals, to_others in zip(found, new, various, strict=True):
        if to_originals is not None:
            one |= {"apart": to_originals, "copied": float(to_originals < COPY)}
        if to_others is not None:
            one["varied"] = to_others
    for places in _alike([p.shape for p in pictures]):
        stacked = np.stack([pictures[i] for i in places])
        group = [outputs[i] for i in places]
        for row, i in enumerate(places):
            found[i] |= {
                name: float(v[row]) for name, v in _scores(case, group, stacked, instruments).items()
            }
        if instruments.judge is not None and case.train.attributes.get("look"):
            readings = instruments.judge.read(stacked)
            judged = judge(case, group, readings, instruments.judge.attributes)
            for i, shares in zip(places, judged, strict=True):
                found[i] |= shares
    return found


def _scores(
    case: Case, outputs: Sequence[Output], pictures: np.ndarray, instruments: Instruments
) -> dict[str, np.ndarray]:
    items = sorted({o.item.key for o in outputs})
    context = ScoreContext(
        prompts=[shown_text(o) for o in outputs],
        groups=np.array([items.index(o.item.key) for o in outputs]),
        references=References.of(Image.fromarray(_open(i.path)) for i in case.train.images),
    )
    images = jnp.asarray(pictures, jnp.float32) / 255
    needs_others = [instruments.diversity] if instruments.diversity and len(outputs) > len(items) else []
    return {
        s.name: checked_scores(s.name, s(images, context), context)
        for s in (*instruments.scorers, *needs_others)
    }


def shown_text(output: Output) -> str:
    """What the picture should show: the reply where there is one, else the plain caption."""
    return output.data.get("text") or output.item.question


# -- copies -------------------------------------------------------------------------------------------------


def apart(pictures: Sequence[np.ndarray], originals: Sequence[np.ndarray]) -> list[float | None]:
    """How far pictures are from the nearest original; None without at least two originals to set the scale.

    Pictures are compared as 32 x 32 thumbnails by the root of the mean squared difference. The unit is the
    median distance from an original to its nearest other: 1 is as new as they are to each other.

    Args:
      pictures: uint8 ``[H, W, 3]`` of any sizes.
      originals: the same.
    """
    small = _thumbnails(originals)
    unit = _unit(small)
    if not unit:
        return [None] * len(pictures)
    nearest = _distances(_thumbnails(pictures), small).min(axis=1)
    return [float(d / unit) for d in nearest]


def varied(
    pictures: Sequence[np.ndarray], prompts: Sequence[str], originals: Sequence[np.ndarray]
) -> list[float | None]:
    """How far pictures are from the others of their prompt, on average, in the unit of ``apart``.

    The independent measure of diversity: no network reads it, and it is never a reward. (The distance that is
    rewarded may see little: an encoder may know looks alone, which a character should not vary.)

    Args:
      pictures: uint8 ``[H, W, 3]`` of any sizes.
      prompts: equal for pictures that are compared.
      originals: the training pictures, for the unit; fewer than two give None, as a prompt's only picture does.
    """
    unit = _unit(_thumbnails(originals))
    found: list[float | None] = [None] * len(pictures)
    for prompt in dict.fromkeys(prompts):
        places = [i for i, other in enumerate(prompts) if other == prompt]
        if unit and len(places) > 1:
            small = _thumbnails([pictures[i] for i in places])
            everyone = np.ones(len(places), bool)
            for i, d in zip(places, mean_distance_to_others(_distances(small, small), everyone), strict=True):
                found[i] = float(d) / unit
    return found


def _unit(originals: np.ndarray) -> float | None:
    """Median distance from an original's thumbnail to its nearest other; None where there is no such scale."""
    if len(originals) < 2:
        return None
    between = _distances(originals, originals)
    np.fill_diagonal(between, np.inf)
    return float(np.median(between.min(axis=1))) or None  # 0: most originals are there twice


def _thumbnails(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Float32 ``[N, 32 * 32 * 3]`` in [0, 1]."""
    return np.array([np.asarray(_shrunk(p), np.float32).ravel() / 255 for p in pictures])


def _shrunk(picture: np.ndarray) -> np.ndarray:
    """A thumbnail, uint8 ``[32, 32, 3]``; one that is a thumbnail already stays as it is."""
    return np.asarray(Image.fromarray(picture).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([np.sqrt(np.square(b - one).mean(axis=1)) for one in a])


# -- the independent judge ----------------------------------------------------------------------------------


def judge(
    case: Case, outputs: Sequence[Output], readings: Mapping[str, np.ndarray], attributes: Attributes
) -> list[Metrics]:
    """Shares of attributes that the judge reads as they should be.

    Args:
      case: its folder's ``look`` is the character's fixed attributes.
      outputs: what was asked (``item.question``) and replied (``data["text"]``).
      readings: probabilities ``{attribute: [N, values]}``.
      attributes: what the judge knows of each.

    Returns:
      For each output: ``identity``; ``prompt_following``, where the prompt asks for something of the scene;
        and
      ``consistency``, where the subject's own reply states something that a picture can show.
    """
    seen = {name: [attributes[name].values[k] for k in np.argmax(p, axis=-1)] for name, p in readings.items()}
    look = {name: case.train.attributes["look"][name] for name, a in attributes.items() if a.fixed}
    found = []
    for row, output in enumerate(outputs):
        read = {name: values[row] for name, values in seen.items()}
        asked = stated(output.item.question, attributes)
        scene = {name: value for name, value in asked.items() if not attributes[name].fixed}
        said = stated(output.data.get("text", ""), attributes)
        shares = {
            "identity": _share(look, read),
            "prompt_following": _share(scene, read),
            "consistency": _share(said, read),
        }
        found.append({name: share for name, share in shares.items() if share is not None})
    return found


def _share(wanted: Mapping[str, str], read: Mapping[str, str]) -> float | None:
    return sum(read[n] == v for n, v in wanted.items()) / len(wanted) if wanted else None


# -- files --------------------------------------------------------------------------------------------------


def _open(path: str | Path) -> np.ndarray:
    return np.asarray(open_image(path))


def _alike(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Places of pictures of equal size."""
    found: dict[tuple[int, ...], list[int]] = {}
    for place, shape in enumerate(shapes):
        found.setdefault(shape, []).append(place)
    return list(found.values())
