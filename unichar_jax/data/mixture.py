"""How often each task and character is seen, and in which order: recipes, weights, schedule.

A ``Recipe`` groups tasks and says how groups share the training. ``resolve`` turns it into one weight
for each source (the samples of one task and one character). ``Schedule`` turns weights into an endless
order of draws that is fixed by a seed: at every moment each task has been drawn as often as its
weight says, to within one sample, and so has each character within its task; a source's samples come
in a new random order in each pass, and none comes again before all have come.

The schedule's position is a list of counts, so it can start anywhere. Nothing here reads samples.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from unichar_jax.data.tasks import TASKS
from unichar_jax.errors import UserError, did_you_mean, require_known


@dataclasses.dataclass(frozen=True)
class Group:
    """Tasks that share one portion of the training.

    Attributes:
      share: the group's portion, relative to the other groups'.
      tasks: weights of its tasks, relative to each other, or just names: then every sample of the
        group is seen equally often, so that tasks weigh what they have.
    """

    share: float
    tasks: Mapping[str, float] | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A mixture by name.

    Attributes:
      groups: what is mixed; shares are portions of the samples.
      why: the reason, for the reader.
    """

    groups: tuple[Group, ...]
    why: str


def _reference(drawings_per_text: float, t2i: tuple[str, ...], vlm: tuple[str, ...]) -> Recipe:
    """What the reference's configurations come to.

    They give drawings and texts the weights 8000 : 1 or 20000 : 1, but make one of each mandatory in
    every packed sequence, which is full at 8192 tokens: so each sequence holds exactly one text and as
    many drawings as it takes. ``drawings_per_text`` is that number on average, for RoleScape-20's
    image sizes (a simulation of its packing rule over six characters).
    """
    return Recipe(
        (Group(drawings_per_text, dict.fromkeys(t2i, 1.0)), Group(1.0, vlm)),
        "the reference's mixture: one text per packed sequence, the rest drawings",
    )


RECIPES: Mapping[str, Recipe] = {
    "default": Recipe(
        (
            Group(
                0.25,
                {
                    "t2i": 1.0,
                    "t2i_with_thinking": 1.0,
                    "pure_t2i": 1.0,
                    "t2i_generation_instruction_only": 1.0,
                },
            ),
            Group(0.25, {"vqa": 1.0}),
            Group(
                0.5,
                {"vlm_extension": 0.5, "knowledge_qa": 0.25, "vlm_thinking": 0.15, "vlm": 0.1},
            ),
        ),
        "a quarter of the samples drawn, a quarter looked at, half spoken: every step learns all three."
        " At BAGEL's sizes that is about as many image tokens looked at as drawn and a seventh for words;"
        " the reference shows a line of dialogue about once for every four drawings",
    ),
    "base": _reference(4.46, ("t2i",), ("vlm",)),
    "extension": _reference(4.49, ("t2i",), ("vlm_extension",)),
    "extension_with_thinking": _reference(
        4.22, ("t2i", "t2i_with_thinking"), ("vlm_extension", "vlm_thinking")
    ),
    "full": _reference(
        4.00,
        ("t2i", "t2i_with_thinking", "pure_t2i"),
        ("vlm_extension", "vlm_thinking", "knowledge_qa", "vqa"),
    ),
}
"""Recipes by name. ``default`` is ours; the others are the reference's four configurations
(UniCharacter, arXiv 2605.08129), except that ``full`` draws its questions from the current sets
rather than from the stale ``_full`` files' counts."""


def recipe_by_name(name: str) -> Recipe:
    """The recipe; a leading underscore, as in the reference's file names, is forgiven."""
    if name.lstrip("_") in RECIPES:
        return RECIPES[name.lstrip("_")]
    require_known("data.recipe", name, RECIPES, more=", or weights by task in data.tasks")
    return RECIPES[name]


def recipe_from_weights(weights: Mapping[str, float]) -> Recipe:
    """A recipe of the user's own: tasks weighed in samples."""
    for task in weights:
        require_known("data.tasks:", task, TASKS, "some of")
    return Recipe((Group(1.0, dict(weights)),), "weights given by the user")


class SourceKey(NamedTuple):
    """The samples of one task and one character."""

    task: str
    character: str


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Weights of the sources, in samples; they sum to 1.

    Attributes:
      weights: by source.
      notes: what the recipe asked for and the data lack.
    """

    keys: tuple[SourceKey, ...]
    weights: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def task_weights(self) -> dict[str, float]:
        """Weight of each task, over all characters."""
        totals: dict[str, float] = {}
        for key, weight in zip(self.keys, self.weights, strict=True):
            totals[key.task] = totals.get(key.task, 0.0) + weight
        return totals


def resolve(
    recipe: Recipe,
    counts: Mapping[SourceKey, int],
    character_weights: Mapping[str, float] | None = None,
) -> Mixture:
    """Weights of the sources under a recipe.

    A task's weight is divided among the characters that have it by ``character_weights`` (equally by
    default). What nobody has is left out, with a note.

    Args:
      counts: number of samples of each source.

    Raises:
      UserError: nothing of the recipe is there, or a character weight names nobody.
    """
    by_character = dict(character_weights or {})
    characters = sorted({key.character for key in counts})
    for name in by_character:
        if name not in characters:
            raise UserError(
                f"data.character_weights: '{name}' is not in the data"
                f"{did_you_mean(name, characters)}; expected some of {', '.join(characters)}."
            )
    keys: list[SourceKey] = []
    weights: list[float] = []
    notes: list[str] = []
    for group in recipe.groups:
        inside: dict[SourceKey, float] = {}
        for task in group.tasks:
            have = {k: by_character.get(k.character, 1.0) for k in counts if k.task == task}
            have = {k: w for k, w in have.items() if counts[k] and w > 0}
            if not have:
                notes.append(f"no character has samples for the task '{task}'; it is left out")
            elif isinstance(group.tasks, tuple):
                inside |= {k: counts[k] * w for k, w in have.items()}
            elif group.tasks[task] > 0:
                total = sum(have.values())
                inside |= {k: group.tasks[task] * w / total for k, w in have.items()}
        if not inside:
            continue
        total = sum(inside.values())
        keys += inside
        weights += [group.share * w / total for w in inside.values()]
    if not keys:
        asked = ", ".join(task for group in recipe.groups for task in group.tasks)
        raise UserError(
            f"the data have no sample for any task of the recipe ({asked}); choose another recipe or"
            " run `unichar data check` to see what the characters lack."
        )
    total = sum(weights)
    return Mixture(tuple(keys), tuple(w / total for w in weights), tuple(notes))


# -- order ---------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """The ``number``-th draw from a source; ``sample`` is the place of the drawn sample in it."""

    source: int
    number: int
    sample: int


class Schedule:
    """The endless order of draws.

    Each task, and inside it each character, comes at even intervals that its weight sets: source k's
    draw number j is due at time ``(j + u_k) / weight_k``, with ``u_k`` in (0, 1) from the seed.

    Args:
      keys, weights: of the sources.
      sizes: total tokens of each sample of a source, ``[n]``.
      seed: fixes everything.
    """

    def __init__(
        self,
        keys: Sequence[SourceKey],
        weights: Sequence[float],
        sizes: Sequence[np.ndarray],
        seed: int,
    ):
        self.keys, self.sizes, self.seed = tuple(keys), tuple(sizes), seed
        weight = np.asarray(weights, float)
        tasks: dict[str, list[int]] = {}
        for k, key in enumerate(self.keys):
            tasks.setdefault(key.task, []).append(k)
        self._members = [np.array(members) for members in tasks.values()]
        self._task_weight = np.array([weight[m].sum() for m in self._members])
        self._task_weight /= self._task_weight.sum()
        self._inner_weight = [weight[m] / weight[m].sum() for m in self._members]
        rng = np.random.default_rng([seed, 1])
        self._task_phase = rng.random(len(self._members))
        self._inner_phase = [rng.random(len(m)) for m in self._members]
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    @property
    def start(self) -> tuple[int, ...]:
        """The position before the first draw: how often each source was drawn."""
        return (0,) * len(self.keys)

    def draws(self, position: Sequence[int], count: int) -> list[Draw]:
        """The next ``count`` draws after ``position``."""
        at = np.asarray(position)
        order = _next(self._task_weight, self._task_phase, [int(at[m].sum()) for m in self._members], count)
        sources = np.empty(count, int)
        for t, members in enumerate(self._members):
            where = np.flatnonzero(order == t)
            inner = _next(self._inner_weight[t], self._inner_phase[t], at[members], len(where))
            sources[where] = members[inner]
        numbers = np.empty(count, int)
        for k in np.unique(sources):
            where = sources == k
            numbers[where] = at[k] + np.arange(where.sum())
        return [
            Draw(k, j, self._sample(k, j)) for k, j in zip(sources.tolist(), numbers.tolist(), strict=True)
        ]

    def after(self, position: Sequence[int], draws: Sequence[Draw]) -> tuple[int, ...]:
        """The position once ``draws``, which follow ``position``, are taken."""
        taken = np.bincount([d.source for d in draws], minlength=len(self.keys))
        return tuple((np.asarray(position) + taken).tolist())

    def _sample(self, source: int, number: int) -> int:
        sizes = self.sizes[source]
        turn, place = divmod(number, len(sizes))
        if (source, turn) not in self._orders:
            if len(self._orders) > 4 * len(self.keys) + 64:
                self._orders.clear()
            name = zlib.crc32("\0".join(self.keys[source]).encode())
            rng = np.random.default_rng([self.seed, 2, name, turn])
            self._orders[source, turn] = _spread(self.sizes[source], rng)
        return int(self._orders[source, turn][place])


def _spread(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order in which large and small samples alternate evenly.

    Sample sizes run through their quantiles in steps of the golden ratio, from a random start; samples
    of one size are shuffled. Any stretch then has nearly the sizes of the whole, so packed sequences
    are about equally full, and the pictures of a character come evenly.
    """
    count = len(sizes)
    quantile = (rng.random() + np.arange(count) * (5**0.5 - 1) / 2) % 1
    by_size = np.lexsort((rng.random(count), sizes))
    return by_size[quantile.argsort().argsort()]


def _next(
    weights: np.ndarray, phases: np.ndarray, taken: Sequence[int] | np.ndarray, count: int
) -> np.ndarray:
    """Which of several evenly spaced series the next ``count`` draws belong to."""
    times, which = [], []
    total = sum(taken) + count
    for k, weight in enumerate(weights):
        # enough of this series to reach the last draw's time, which is near ``total``
        ahead = max(0, int(np.ceil((total + len(weights) + 1) * weight)) + 1 - int(taken[k]))
        j = taken[k] + np.arange(ahead)
        times.append((j + phases[k]) / weight)
        which.append(np.full(ahead, k))
    order = np.argsort(np.concatenate(times), kind="stable")[:count]
    return np.concatenate(which)[order]
