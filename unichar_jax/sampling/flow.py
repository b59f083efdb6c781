"""Drawing pictures: guided velocity, deterministic sampling, and rollouts with a stochastic window.

A picture is drawn against what the model has read (``Contexts``). Classifier-free guidance compares the full
context with one that lacks the text and, when pictures were read too, one that lacks the pictures; these
branches are rows of one batch, laid side by side (``Branches``). ``guided_velocity`` is the one function
that samples, rolls out and, in the policy update, is differentiated.

Guidance acts on an interval of times only: steps outside of it run the full context alone, in a loop of
their own. Inside a larger program a drawing is one loop for each such run; the engine's go by chunks of steps,
between which they can be stopped. A rollout is deterministic but for a short window of steps; it keeps what
the update needs of these and nothing else. Nothing here knows of prompts, tokens or pixels.

Sources: BAGEL (arXiv 2505.14683) for guidance and renormalisation; Flow-GRPO (arXiv 2505.05470) and MixGRPO
(arXiv 2507.21802) for the window; UniCharacter (arXiv 2605.08129).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.data.images import position_ids
from unichar_jax.errors import UserError, require_known
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import schedule
from unichar_jax.sampling.cache import KVCache, bucket
from unichar_jax.sampling.schedule import Noising, Step
from unichar_jax.sampling.tracing import jitted

Grid = tuple[int, int]
"""Rows and columns of latent tokens."""

CHUNK_SECONDS = 0.25
"""How long a drawing that is to be stopped may go on: steps run in chunks of about this time."""

MIN_TIMES = 128
"""Schedules are padded to a ``bucket`` of at least so many times, so that their length compiles nothing."""

RENORMS = ("global", "channel", "text_channel")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance. The numbers are traced where this is passed to a compiled function.

    Attributes:
      text_scale: weight of the full context against the one without text; at most 1 turns all guidance off.
      image_scale: weight of that against the one without pictures; at most 1 turns this part off.
      renorm_min: lower bound of the factor that brings the guided velocity back to the norm of the unguided
        one.
      interval: guidance acts while ``interval[0] < t <= interval[1]``.
      renorm: norms over the whole image ("global"), over each token's channels ("channel"), or over each
        token's channels after text guidance and before image guidance ("text_channel").
    """

    text_scale: float = 4.0
    image_scale: float = 1.0
    renorm_min: float = 0.0
    interval: tuple[float, float] = field(default=(0.4, 1.0), metadata=dict(static=True))
    renorm: str = field(default="global", metadata=dict(static=True))

    def __post_init__(self) -> None:
        require_known("guidance.renorm:", self.renorm, RENORMS)

    @property
    def uses(self) -> tuple[bool, bool]:
        """Whether (text, image) guidance acts at all; the scales must be plain numbers here."""
        # Without text guidance image guidance is off too, as in the reference.
        return self.text_scale > 1, self.text_scale > 1 and self.image_scale > 1

    def acts(self, t: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """Whether guidance acts at the times ``t``."""
        return (self.interval[0] < t) & (t <= self.interval[1])


@dataclass(frozen=True)
class FlowSettings:
    """How pictures are drawn.

    Attributes:
      num_timesteps: times from 1 to 0; one less than this many model evaluations.
      shift: how far the times lean towards noise.
      guidance: classifier-free guidance.
    """

    num_timesteps: int = 50
    shift: float = 3.0
    guidance: Guidance = Guidance()

    @property
    def times(self) -> np.ndarray:
        return schedule.times(self.num_timesteps, self.shift)

    def runs(self) -> tuple[tuple[int, int, bool], ...]:
        """Steps ``(first, end, guided)`` in runs of equal guidance."""
        acts = self.guidance.acts(self.times[:-1])
        edges = [0, *(np.flatnonzero(np.diff(acts)) + 1).tolist(), len(acts)]
        return tuple((a, b, bool(acts[a])) for a, b in itertools.pairwise(edges))


@dataclass(frozen=True)
class RolloutSettings:
    """How a policy's pictures are drawn for reinforcement learning.

    Attributes:
      flow: times and guidance.
      noising: the stochastic steps.
      window_size: how many consecutive steps are stochastic.
      window_range: first and last bound of the window: it lies within steps [a, b).
    """

    flow: FlowSettings = FlowSettings(num_timesteps=15, guidance=Guidance(interval=(0.0, 1.0)))
    noising: Noising = field(default_factory=Noising)
    window_size: int = 3
    window_range: tuple[int, int] = (0, 7)

    def __post_init__(self) -> None:
        a, b = self.window_range
        if not (a >= 0 and self.window_size >= 1 and a + self.window_size <= b) or (
            b > self.flow.num_timesteps - 1
        ):
            raise UserError(
                f"rollout: window_size {self.window_size} in window_range {self.window_range} of"
                f" {self.flow.num_timesteps - 1} steps: expected 0 <= range[0], range[0] + window_size <="
                " range[1] <= num_timesteps - 1; change one of the three."
            )

    def draw_start(self, key: jax.Array) -> jax.Array:
        """First step of the window, uniform over its range, int32 scalar."""
        a, b = self.window_range
        return jax.random.randint(key, (), a, b - self.window_size + 1, jnp.int32)


# -- contexts and branches ----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Contexts:
    """What the pictures of a batch are drawn against, row for row.

    Attributes:
      full: everything.
      no_text: everything before the last text; None is the empty context (plain text to image).
      no_image: the texts without pictures; None where that is ``full`` itself, which then saves a branch
        exactly.
    """

    full: KVCache
    no_text: KVCache | None = None
    no_image: KVCache | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Branches:
    """Contexts laid side by side: row ``i * count + j`` of ``cache`` is branch j of picture i.

    Attributes:
      cache: branch 0 is the full context, 1 lacks the text, 2 lacks the pictures.
      count: branches of a picture, 1 to 3.
      guides_image: whether image guidance acts (with two branches: the full context is the one without
        pictures).
    """

    cache: KVCache
    count: int = field(metadata=dict(static=True))
    guides_image: bool = field(metadata=dict(static=True))

    def unguided(self) -> Branches:
        """The full context alone."""
        if self.count == 1:
            return self
        return Branches(kv.take(self.cache, jnp.arange(0, self.cache.batch, self.count)), 1, False)


def branches(
    model: UnifiedModel,
    contexts: Contexts,
    guidance: Guidance,
    uses: tuple[bool, bool] | None = None,
) -> Branches:
    """The branches that guidance needs: those that ``uses`` (default: ``guidance.uses``) names."""
    text, image = guidance.uses if uses is None else uses
    if not text:
        return Branches(contexts.full, 1, False)
    full = contexts.full
    rows = [full, contexts.no_text or kv.empty(model, full.batch, full.capacity)]
    if image and contexts.no_image is not None:
        rows.append(contexts.no_image)
    return Branches(kv.interleave(rows), len(rows), image)


# -- velocity -----------------------------------------------------------------------------------------------


def velocity(model: UnifiedModel, cache: KVCache, x: jax.Array, t: jax.Array, grid: Grid) -> jax.Array:
    """The model's velocity of noised latents against a context; the context stays as it is.

    Args:
      model: the model.
      cache: one context for each row.
      x: float32 ``[B, N, latent_dim]``, N = rows * columns of ``grid``.
      t: times, scalar or ``[B]``.
      grid: rows and columns of latent tokens.

    Returns:
      float32 like x, from data to noise.
    """
    batch, num_tokens, _ = x.shape
    places = jnp.asarray(position_ids(*grid, model.cfg.max_latent_size))[None]
    meta = kv.image_meta(cache, jnp.full(batch, num_tokens), num_tokens, noisy=1)
    t = jnp.broadcast_to(jnp.reshape(t, (-1, 1)), (batch, num_tokens))
    _, hidden, _ = model.backbone(
        kv.delimiters(model, batch),
        model.embed_latent(x, t, places),
        meta,
        prefixes=cache.prefixes,
    )
    return model.velocity(hidden)


def guided_velocity(
    model: UnifiedModel,
    branched: Branches,
    x: jax.Array,
    t: jax.Array,
    grid: Grid,
    guidance: Guidance,
    acts: jax.Array | None = None,
) -> jax.Array:
    """Velocity under classifier-free guidance.

    Args:
      model: the model.
      branched: from ``branches``.
      x: float32 ``[B, N, latent_dim]``.
      t: times, scalar or ``[B]``.
      grid: rows and columns of latent tokens.
      guidance: scales and renormalisation.
      acts: where guidance acts, bool scalar or ``[B]``; None: everywhere.
    """
    count = branched.count
    tiled = jnp.repeat(x, count, axis=0)
    t_tiled = jnp.repeat(t, count) if jnp.ndim(t) else t
    v = velocity(model, branched.cache, tiled, t_tiled, grid)
    v = v.reshape(-1, count, *x.shape[1:])
    if count == 1:
        return v[:, 0]
    no_image = v[:, -1] if count == 3 else v[:, 0]
    guided = guide(v[:, 0], v[:, 1], no_image if branched.guides_image else None, guidance)
    if acts is None:
        return guided
    return jnp.where(jnp.reshape(acts, (-1, 1, 1)), guided, v[:, 0])


def guide(full: jax.Array, no_text: jax.Array, no_image: jax.Array | None, guidance: Guidance) -> jax.Array:
    """Combines the branches' velocities ``[B, N, D]``; renormalisation is per image."""

    def toward(base: jax.Array, v: jax.Array, scale) -> jax.Array:
        return base + scale * (v - base)

    def with_image(v: jax.Array) -> jax.Array:
        return v if no_image is None else toward(no_image, v, guidance.image_scale)

    def renormed(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        factor = _norm(full, axes) / (_norm(v, axes) + 1e-8)
        return v * jnp.clip(factor, guidance.renorm_min, 1.0)

    v = toward(no_text, full, guidance.text_scale)
    if guidance.renorm == "text_channel":
        return with_image(renormed(v, (-1,)))
    return renormed(with_image(v), (-2, -1) if guidance.renorm == "global" else (-1,))


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Euclidean norm whose gradient is finite at zero (an untrained model's velocity is zero)."""
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=axes, keepdims=True), 1e-30))


# -- sampling -----------------------------------------------------------------------------------------------


def row_keys(seeds: jax.Array) -> jax.Array:
    """One random key for each row, from its seed (uint32 ``[B]``) alone."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def draw_noise(keys: jax.Array, index: jax.Array | int, grid: Grid, width: int) -> jax.Array:
    """Standard normal ``[B, N, width]``, each row from its key; ``index`` 0 is the picture's initial
    noise."""
    shape = (grid[0] * grid[1], width)
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def _euler(model, branched, x, times, grid, guidance, first, end):
    """Euler steps ``first <= i < end`` (traced or not) with one set of branches."""

    def body(i, x):
        v = guided_velocity(model, branched, x, times[i], grid, guidance)
        return schedule.euler(x, v, times[i], times[i + 1])

    return jax.lax.fori_loop(first, end, body, x)


def _ode(model, branched, x, times, runs, grid, guidance, first=0, end=None):
    """Euler steps ``first <= i < end`` (traced or not), one loop for each run of equal guidance."""
    alone = branched.unguided()
    for a, b, guided in runs:
        if end is not None:
            a, b = jnp.maximum(a, first), jnp.minimum(b, end)
        x = _euler(model, branched if guided else alone, x, times, grid, guidance, a, b)
    return x


@jitted(static_argnames=("grid", "runs", "uses"))
def _sample(model, contexts, noise, times, guidance, *, grid, runs, uses):
    branched = branches(model, contexts, guidance, uses)
    return _ode(model, branched, noise, times, runs, grid, guidance)


def sample_latents(
    model: UnifiedModel,
    contexts: Contexts,
    noise: jax.Array,
    grid: Grid,
    settings: FlowSettings,
) -> jax.Array:
    """Draws a picture for each row: from noise to clean latents along the deterministic flow, in one program.

    Args:
      model: the model.
      contexts: what to draw, one row for each picture.
      noise: float32 ``[B, N, latent_dim]`` (``draw_noise``).
      grid: rows and columns of latent tokens.
      settings: times and guidance; scales may change without a new compilation.

    Returns:
      Scaled latents in patches, float32 ``[B, N, latent_dim]``.
    """
    return _sample(
        model,
        contexts,
        noise,
        settings.times,
        settings.guidance,
        grid=grid,
        runs=settings.runs(),
        uses=settings.guidance.uses,
    )


@jitted(static_argnames="uses")
def _branches(model, contexts, guidance, *, uses):
    return branches(model, contexts, guidance, uses)


@jitted(static_argnames="grid")
def _some_steps(model, branched, x, times, first, end, guidance, *, grid):
    return _euler(model, branched, x, times, grid, guidance, first, end)


def sample_in_chunks(
    model: UnifiedModel, contexts: Contexts, noise: jax.Array, grid: Grid, settings: FlowSettings
) -> Iterator[jax.Array]:
    """``sample_latents`` by chunks of steps, bit for bit: yields the latents after each, the last ones clean.

    First and last step of a chunk are traced, so two programs (with and without guidance) serve any number of
    steps. A chunk takes about ``CHUNK_SECONDS``, as the one before it tells; a caller who stops iterating stops
    the drawing.
    """
    alone, branched = Branches(contexts.full, 1, False), None
    guidance = replace(settings.guidance, interval=Guidance.interval)  # told by the runs, so compiles nothing
    times = np.pad(settings.times, (0, bucket(settings.num_timesteps, MIN_TIMES) - settings.num_timesteps))
    x, size = noise, 1
    for first, run_end, guided in settings.runs():
        if guided and branched is None and guidance.uses[0]:
            branched = _branches(model, contexts, guidance, uses=guidance.uses)
        rows = branched if guided and branched is not None else alone
        while first < run_end:
            end, began = min(first + size, run_end), time.perf_counter()
            x = _some_steps(model, rows, x, times, first, end, guidance, grid=grid)
            jax.block_until_ready(x)
            seconds = (time.perf_counter() - began) / (end - first)
            # The first chunk may have waited for a compilation: sizes adapt, but grow no more than fourfold.
            first, size = end, max(1, min(4 * size, round(CHUNK_SECONDS / seconds)))
            yield x


# -- rollouts -----------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout:
    """Pictures of a policy, and their stochastic steps.

    Attributes:
      final: clean latents, float32 ``[B, N, latent_dim]``.
      latents: before each stochastic step and after the last, ``[B, w + 1, N, latent_dim]``.
      log_probs: of the stochastic steps as they were drawn, ``[B, w]``.
      steps: int32 ``[w]``, their indices in the schedule.
    """

    final: jax.Array
    latents: jax.Array
    log_probs: jax.Array
    steps: jax.Array


def policy_step(
    model: UnifiedModel,
    branched: Branches,
    x: jax.Array,
    index: jax.Array,
    grid: Grid,
    settings: RolloutSettings,
    *,
    noise: jax.Array | None = None,
    sample: jax.Array | None = None,
) -> Step:
    """One stochastic step of the policy: drawn with ``noise`` in a rollout, judged with ``sample`` in an
    update.

    Args:
      model, branched: the policy and its branches.
      x: latents before the step, float32 ``[B, N, latent_dim]``.
      index: the step's index in the schedule, int32 scalar or ``[B]``.
      grid, settings: as in the rollout.
      noise: standard normal like x, or
      sample: latents after the step.
    """
    flow = settings.flow
    times = jnp.asarray(flow.times)
    t = times[index]
    everywhere = bool(np.all(flow.guidance.acts(flow.times[:-1])))
    acts = None if everywhere else flow.guidance.acts(t)
    v = guided_velocity(model, branched, x, t, grid, flow.guidance, acts)
    return schedule.step(settings.noising, x, v, t, times[index + 1], times[1], noise=noise, sample=sample)


def rollout(
    model: UnifiedModel,
    contexts: Contexts,
    noise: jax.Array,
    keys: jax.Array,
    window_start: jax.Array,
    grid: Grid,
    settings: RolloutSettings,
    *,
    step_noise: jax.Array | None = None,
) -> Rollout:
    """Draws a group of pictures for each context, stochastic in one window of steps. Call it under
    ``jax.jit``.

    Args:
      model: the policy.
      contexts: one row for each of P prompts; a group shares its prompt's context.
      noise: initial noise ``[B, N, latent_dim]`` with B = P * group, or ``[P, ...]``: then a group shares
        its noise, and the steps before the window are computed once for all of it.
      keys: random keys ``[B]``, one for each picture.
      window_start: first stochastic step, int32 scalar (``RolloutSettings.draw_start``); traced, so that no
        start needs a compilation of its own.
      grid, settings: as in ``policy_step``.
      step_noise: noise of every step ``[steps, B, N, latent_dim]`` instead of the keys' (for tests).
    """
    flow, size = settings.flow, settings.window_size
    times, runs = jnp.asarray(flow.times), flow.runs()
    group = keys.shape[0] // contexts.full.batch
    spread = lambda tree: jax.tree.map(  # noqa: E731
        lambda c: kv.repeat(c, group), tree, is_leaf=lambda c: isinstance(c, KVCache)
    )
    shared = noise.shape[0] != keys.shape[0]
    wide = branches(model, spread(contexts), flow.guidance)
    before = branches(model, contexts, flow.guidance) if shared else wide

    def ode(rows, x, first, end):
        return _ode(model, rows, x, times, runs, grid, flow.guidance, first, end)

    x = ode(before, noise, 0, window_start)
    x = jnp.repeat(x, group, axis=0) if shared else x

    def stochastic(x, index):
        z = draw_noise(keys, index + 1, grid, x.shape[-1]) if step_noise is None else step_noise[index]
        taken = policy_step(model, wide, x, index, grid, settings, noise=z)
        return taken.next, (x, taken.log_prob)

    steps = window_start + jnp.arange(size, dtype=jnp.int32)
    x, (starts, log_probs) = jax.lax.scan(stochastic, x, steps)
    latents = jnp.moveaxis(jnp.concatenate([starts, x[None]]), 0, 1)
    final = ode(wide, x, window_start + size, flow.num_timesteps - 1)
    return Rollout(final, latents, log_probs.T, steps)
