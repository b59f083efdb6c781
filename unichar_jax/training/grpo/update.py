"""One optimiser step on stored drawings: items in micro-batches, one gradient over all of them.

The loss of an update is the mean over its pictures' items; micro-batches only bound memory, so their size
changes nothing but rounding. Every micro-batch holds the same item number of different pictures, taken so
that no picture leaves its device. The prompts' keys and values are gathered for each micro-batch from the
cache that was read once for the run; they carry no gradient, because the understanding expert is frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unichar_jax.parallel.mesh import constrain
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling.cache import KVCache
from unichar_jax.sampling.flow import Contexts
from unichar_jax.training.grpo.algorithm import Algorithm, Metrics, Policies
from unichar_jax.training.state import Arrays, Layout, TrainState
from unichar_jax.training.step import apply_gradients, split_rows

Update = Callable[..., tuple[TrainState, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Share:
    """What one update learns from; B pictures.

    Attributes:
      record: the algorithm's, leading with B.
      prompts: rows of the prompt cache, int32 ``[B]``.
      advantages: float32 ``[B]``.
    """

    record: Any
    prompts: jax.Array
    advantages: jax.Array


def gradients_of(
    layout: Layout,
    algorithm: Algorithm,
    state: TrainState,
    reference: Arrays | None,
    cache: KVCache,
    share: Share,
    key: jax.Array,
    micro_batch: int = 0,
) -> tuple[Arrays, Metrics]:
    """Gradients of the mean loss over all items, and means of the algorithm's metrics.

    Args:
      layout: assembles the models.
      algorithm: its items and loss.
      state: the learner; its average is the drawing policy of an algorithm that follows.
      reference: weights of the reference model in place of the trained ones, or None.
      cache: the prompts as they were read.
      share: drawings and advantages.
      key: for what the algorithm draws when it unfolds its record.
      micro_batch: pictures at a time, a divisor of B; 0: all.
    """
    pictures = share.prompts.shape[0]
    items = algorithm.items(share.record, key)
    per_picture = jax.tree.leaves(items)[0].shape[1]
    total = pictures * per_picture
    drawer = layout.assemble(state.ema, state.frozen) if algorithm.follows else None
    before = None if reference is None else layout.assemble(reference, state.frozen)

    def loss(trained: Arrays, items: Any, prompts: jax.Array, advantages: jax.Array):
        policies = Policies(layout.assemble(trained, state.frozen), drawer, before)
        contexts = Contexts(kv.take(cache, prompts))
        losses, metrics = algorithm.loss(policies, contexts, items, advantages)
        sums = {name: value.sum() / total for name, value in {"loss": losses, **metrics}.items()}
        return losses.sum() / total, sums

    def flat(x: jax.Array) -> jax.Array:
        """``[parts, m, J, ...]`` to ``[parts * J, m, ...]``."""
        x = jnp.moveaxis(x, 2, 1)
        return x.reshape(-1, *x.shape[2:])

    parts = pictures // (micro_batch or pictures)
    split_items = jax.tree.map(flat, split_rows(items, parts))
    again = lambda x: jnp.repeat(split_rows(x, parts), per_picture, axis=0)  # noqa: E731
    batches = (split_items, again(share.prompts), again(share.advantages))
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts * per_picture == 1:
        (_, metrics), grads = gradient(state.params, *jax.tree.map(lambda x: x[0], batches))
        return grads, metrics

    def body(total, batch):
        batch = jax.tree.map(lambda x: constrain(x, ("batch",) + (None,) * (x.ndim - 1)), batch)
        (_, metrics), grads = gradient(state.params, *batch)
        return jax.tree.map(jnp.add, total, (grads, metrics)), None

    first = jax.tree.map(lambda x: x[0], batches)
    (_, shapes), grads = jax.eval_shape(lambda: gradient(state.params, *first))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, shapes))
    return jax.lax.scan(body, zero, batches)[0]


def jit_update(
    layout: Layout, algorithm: Algorithm, optimizer: optax.GradientTransformation, micro_batch: int = 0
) -> Update:
    """``(moving, frozen, reference, cache, share, key) -> (moving, metrics)``, compiled.

    ``moving`` is the state without its frozen weights; it is given away, while they outlive every step. The average
    and the count of rounds stay as they are: they move once a round (``finish_round``).
    """

    def update(
        moving: TrainState,
        frozen: Arrays,
        reference: Arrays | None,
        cache: KVCache,
        share: Share,
        key: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        state = dataclasses.replace(moving, frozen=frozen)
        grads, metrics = gradients_of(layout, algorithm, state, reference, cache, share, key, micro_batch)
        learned = apply_gradients(dataclasses.replace(moving, ema=None), grads, optimizer, ema_decay=0.0)
        metrics["grad_norm"] = optax.global_norm(grads)
        return dataclasses.replace(learned, step=moving.step, ema=moving.ema), metrics

    return jax.jit(update, donate_argnums=0)


def finish_round(state: TrainState, decay: jax.Array) -> TrainState:
    """Counts the round and moves the average: ``decay * average + (1 - decay) * weights``."""
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, state.params)
    return dataclasses.replace(state, step=state.step + 1, ema=ema)
