"""The interface of an algorithm: how it draws, what it keeps of a drawing, and its loss.

An algorithm is three pure functions. ``draw`` makes a group of pictures for each context and returns a
record with everything that learning needs and nothing else. ``items`` unfolds a record into items, J for
each picture, each small enough to be a row of a batch. ``loss`` judges a batch of items. Advantages,
batching, gradients and the optimiser are the trainer's and the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax

from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling.flow import Contexts

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Policies:
    """The models that a loss may compare.

    Attributes:
      learner: is differentiated.
      drawer: drew the pictures (its weights; None where the record says enough).
      reference: the model before stage 2 (None where it is not asked for).
    """

    learner: UnifiedModel
    drawer: UnifiedModel | None = None
    reference: UnifiedModel | None = None


class Algorithm(Protocol):
    """See the module's docstring. Attributes:

    follows: the drawing policy is a moving average that follows the learner (``decay``); otherwise the
      learner draws.
    kl: weight of the reference model in the loss; 0 needs none.
    """

    @property
    def follows(self) -> bool: ...

    @property
    def kl(self) -> float: ...

    def decay(self, round_: int) -> float:
        """Decay of the moving average after a round (counted from 1)."""
        ...

    def draw(
        self, model: UnifiedModel, contexts: Contexts, keys: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Draws ``len(keys)`` pictures, a group of equal size for each of the contexts, under ``jax.jit``.

        Args:
          model: the policy.
          contexts: one row for each prompt.
          keys: a random key for each picture, groups one after the other.
          start: first stochastic step, int32 scalar.

        Returns:
          Clean latents float32 ``[B, N, latent_dim]``, and a record whose arrays lead with B.
        """
        ...

    def items(self, record: Any, key: jax.Array) -> Any:
        """The record as items ``[B, J, ...]``."""
        ...

    def loss(
        self, policies: Policies, contexts: Contexts, items: Any, advantages: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Loss of each item ``[M]``, and numbers ``[M]`` for the log.

        Args:
          policies: the models.
          contexts: one row for each item.
          items: a batch of items, leading with M.
          advantages: float32 ``[M]``.
        """
        ...
