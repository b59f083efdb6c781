"""Pictures to rewards: the weighted terms that the configuration names, each checked.

A term is a scorer of ``scoring``, the same code as evaluation runs. Whatever a scorer does wrong ends the
run with one message that names the term (``RewardError``); nothing has been learned from the round then,
and the trainer saves what came before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.config.grpo import RewardTerm
from unichar_jax.data.rl_prompts import RLPrompt
from unichar_jax.errors import UserError
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.scoring.base import References, ScoreContext, Scorer, checked_scores, weighted_sum


class RewardError(UserError):
    """A term of the reward failed."""


@dataclass(frozen=True)
class Scores:
    """Rewards float32 ``[B]`` and their terms ``{name: [B]}``."""

    rewards: np.ndarray
    terms: Mapping[str, np.ndarray]


def term_label(name: str) -> str:
    """What curves call a term: its name, or the function of ``file.py:function``."""
    return name.rpartition(":")[2]


class Rewards:
    """Scores batches of pictures.

    Args:
      terms: names and weights.
      scorers: a scorer for each term, in the same order.
      references: pictures of the character.
    """

    def __init__(self, terms: Sequence[RewardTerm], scorers: Sequence[Scorer], references: References):
        labels = [term_label(t.name) for t in terms]
        if len(set(labels)) != len(labels):
            raise UserError(f"reward: two terms are called alike in {labels}; rename a function.")
        self._scorers = dict(zip(labels, scorers, strict=True))
        self._weights = {label: t.weight for label, t in zip(labels, terms, strict=True)}
        self._references = references

    @property
    def labels(self) -> list[str]:
        return list(self._scorers)

    def __call__(
        self,
        images: jax.Array,
        prompts: Sequence[RLPrompt],
        groups: np.ndarray,
        model: UnifiedModel | None = None,
    ) -> Scores:
        """Scores pictures.

        Args:
          images: uint8 ``[B, H, W, 3]``.
          prompts: of each picture.
          groups: int ``[B]``; pictures with the same number are compared with each other.
          model: as it is now; visual questions need it.

        Raises:
          RewardError: a term raised, or gave numbers that are not one finite number for each picture.
        """
        context = ScoreContext(
            [p.text for p in prompts], groups, self._references, [p.questions for p in prompts], model
        )
        pictures = images.astype(jnp.float32) / 255
        terms = {label: self._score(label, s, pictures, context) for label, s in self._scorers.items()}
        return Scores(weighted_sum(terms, self._weights), terms)

    def _score(self, label: str, scorer: Scorer, images: jax.Array, context: ScoreContext) -> np.ndarray:
        try:
            return checked_scores(label, scorer(images, context), context)
        except UserError as error:
            raise RewardError(str(error)) from error
        except Exception as error:
            raise RewardError(f"reward term '{label}' raised {type(error).__name__}: {error}") from error
