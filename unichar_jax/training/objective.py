"""The Unified-SFT objective: cross-entropy on text plus flow error on latents, as (sum, weight) pairs.

A term is never divided here. ``Terms`` are added over rows, devices and accumulated micro-batches, and
divided once by the weight of the whole global batch (``combine``), so that accumulation and sharding change
nothing. The two terms have different denominators: labelled tokens, and noised latent tokens.

Rectified flow: ``x_t = (1 - t) x_0 + t n`` with velocity ``n - x_0`` (data to noise). Sources: BAGEL (arXiv
2505.14683), UniCharacter (arXiv 2605.08129) for the weights 0.25 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from unichar_jax.config.model import AutoencoderConfig
from unichar_jax.models.streams import Batch, LatentStream
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel.mesh import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Terms:
    """Sums and weights of both losses, in all and per task; float32.

    ``ce``, ``mse``: sums; ``ce_weight``, ``mse_weight``: their denominators; ``task_*``: the same split by
    task index, ``[num_tasks]`` each.
    """

    ce: jax.Array
    ce_weight: jax.Array
    mse: jax.Array
    mse_weight: jax.Array
    task_ce: jax.Array
    task_ce_weight: jax.Array
    task_mse: jax.Array
    task_mse_weight: jax.Array


def weights_of(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Denominators of both terms, known from the batch alone."""
    return batch.text.weight.sum(), batch.latent.weight.sum()


def shifted_time(raw: jax.Array, shift: float) -> jax.Array:
    """Raw normal draws to flow times in [0, 1]: sigmoid, then the resolution shift; -inf gives 0 (clean)."""
    t = jax.nn.sigmoid(raw.astype(jnp.float32))
    return shift * t / (1 + (shift - 1) * t)


def noised(
    latent: LatentStream, x0: jax.Array, noise: jax.Array, shift: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``x_t``, ``t`` and the target velocity of every latent token; all float32."""
    t = shifted_time(latent.timestep, shift)
    mix = t[..., None]
    return (1 - mix) * x0 + mix * noise, t, noise - x0


def sample_latent(latent: LatentStream, ae: AutoencoderConfig, eps: jax.Array) -> jax.Array:
    """A scaled latent from the cached posterior, ``[B, L, latent_dim]``."""
    z = latent.mean + jnp.exp(0.5 * latent.logvar) * eps
    return ae.scale * (z - ae.shift)


def token_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target, float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _per_task(values: jax.Array, task: jax.Array, num_tasks: int) -> jax.Array:
    one_hot = task[..., None] == jnp.arange(num_tasks)
    return jnp.where(one_hot, values[..., None], 0).sum(axis=tuple(range(values.ndim)))


def cross_entropy_sums(
    model: UnifiedModel, hidden: jax.Array, batch: Batch, num_tasks: int, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted cross-entropy, in all and per task, over labelled tokens only.

    Labelled tokens are brought to the front of each row and the head runs chunk by chunk; a chunk without
    labels is not computed, and logits of at most ``[B, chunk, vocab]`` exist at a time (also in the backward
    pass).
    """
    text = batch.text
    length = text.ids.shape[1]
    chunk = min(chunk, length)
    padded = -(-length // chunk) * chunk
    front = jnp.argsort(text.weight == 0, axis=1, stable=True)

    def arrange(x: jax.Array) -> jax.Array:
        index = front if x.ndim == 2 else front[..., None]
        x = jnp.take_along_axis(x, index, axis=1)
        x = jnp.pad(x, [(0, 0), (0, padded - length)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], padded // chunk, chunk, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    parts = tuple(arrange(x) for x in (hidden, text.targets, text.weight, text.task))

    def chunk_sums(hidden, targets, weight, task):
        # Pinned, or the compiler computes every device's rows on all of them.
        hidden = constrain(hidden, ("batch", None, None))
        logits = constrain(model.logits(hidden), ("batch", None, "vocab"))
        ce = token_cross_entropy(logits, targets) * weight
        return ce.sum(), _per_task(ce, task, num_tasks)

    # Around the condition: what a branch keeps, the scan would stack, the head's weights included.
    @jax.checkpoint
    def body(total, part):
        nothing = (jnp.zeros((), jnp.float32), jnp.zeros((num_tasks,), jnp.float32))
        sums = jax.lax.cond((part[2] != 0).any(), lambda p: chunk_sums(*p), lambda p: nothing, part)
        return jax.tree.map(jnp.add, total, sums), None

    zero = (jnp.zeros((), jnp.float32), jnp.zeros((num_tasks,), jnp.float32))
    return jax.lax.scan(body, zero, parts)[0]


def unified_terms(
    model: UnifiedModel,
    batch: Batch,
    x0: jax.Array,
    noise: jax.Array,
    *,
    shift: float = 1.0,
    num_tasks: int = 1,
    chunk: int = 1024,
) -> Terms:
    """Both losses of a packed batch.

    Args:
      model: the unified model.
      batch: streams; any may be empty.
      x0: scaled latents ``[B, Ll, latent_dim]``.
      noise: standard normal, like ``x0``.
      shift: timestep shift (1 in training).
      num_tasks: length of the per-task sums.
      chunk: labelled tokens per row whose logits exist at a time.
    """
    latent, text = batch.latent, batch.text
    x_t, t, target = noised(latent, x0, noise, shift)
    hidden, gen = model.forward(text, batch.vit, x_t, t, latent.grid, latent.meta)
    zeros = jnp.zeros((num_tasks,), jnp.float32)
    if text.ids.shape[1]:
        ce, task_ce = cross_entropy_sums(model, hidden, batch, num_tasks, chunk)
    else:
        ce, task_ce = jnp.zeros(()), zeros
    if latent.grid.shape[1]:
        error = jnp.square(model.velocity(gen) - target).mean(axis=-1)
        # Unweighted tokens (clean images, padding) may hold anything; keep them out before multiplying.
        mse = jnp.where(latent.weight > 0, error, 0) * latent.weight
    else:
        mse = jnp.zeros(latent.weight.shape)
    ce_weight, mse_weight = weights_of(batch)
    return Terms(
        ce,
        ce_weight,
        mse.sum(),
        mse_weight,
        task_ce,
        _per_task(text.weight, text.task, num_tasks),
        _per_task(mse, latent.task, num_tasks),
        _per_task(latent.weight, latent.task, num_tasks),
    )


def combine(
    terms: Terms, denominators: tuple[jax.Array, jax.Array], ce_weight: float, mse_weight: float
) -> jax.Array:
    """The scalar loss, given the denominators of the whole global batch; an absent term counts zero."""
    ce_n, mse_n = (jnp.maximum(n, 1e-9) for n in denominators)
    return ce_weight * terms.ce / ce_n + mse_weight * terms.mse / mse_n
