"""What a round draws: its prompts, its random keys, and the pictures.

The prompts of round n are a pure function of (seed, n): an endless walk through permutations of the
training prompts, cut into rounds. So are all random keys; a picture's key depends on its place in the round
and not on how the round is cut into batches. Every prompt is read once for the whole run, because only the
understanding expert reads and it is frozen: its keys and values stay on the device as one row of a cache,
and a group shares its prompt's row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.config.grpo import GRPOConfig, RolloutConfig
from unichar_jax.config.model import ModelConfig
from unichar_jax.errors import UserError
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel.mesh import batch_sharding, constrain
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow, pixels
from unichar_jax.sampling.cache import KVCache
from unichar_jax.sampling.flow import Contexts, Grid, RolloutSettings
from unichar_jax.sampling.schedule import Noising
from unichar_jax.training.grpo.algorithm import Algorithm

_PURPOSES = {"picture": 0, "window": 1, "update": 2, "evaluation": 3}


def round_key(seed: int, number: int, purpose: str) -> jax.Array:
    """The key for one purpose in round ``number``."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.random.fold_in(key, _PURPOSES[purpose])


def picture_keys(key: jax.Array, count: int) -> jax.Array:
    """Keys ``[count]``, each from its place alone."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


# -- settings -----------------------------------------------------------------------------------------------


def settings_of(cfg: RolloutConfig) -> RolloutSettings:
    """The sampler's settings of a rollout."""
    guidance = flow.Guidance(cfg.text_scale, interval=tuple(cfg.guidance_interval))
    return RolloutSettings(
        flow.FlowSettings(cfg.num_timesteps, cfg.shift, guidance),
        Noising(cfg.solver, cfg.noise_level),
        cfg.window_size,
        tuple(cfg.window_range),
    )


def grid_of(height: int, width: int, model: ModelConfig) -> Grid:
    """Rows and columns of latent tokens of a picture."""
    pixels_per = model.pixels_per_latent
    largest = model.max_latent_size * pixels_per
    for name, side in (("height", height), ("width", width)):
        if side % pixels_per or side > largest:
            raise UserError(
                f"rollout.{name} {side}: expected a multiple of {pixels_per} up to {largest}, the model's"
                " size of a latent token and of its position table; try"
                f" {max(side // pixels_per, 1) * pixels_per}."
            )
    return height // pixels_per, width // pixels_per


# -- prompts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """Round ``number`` (counted from 0) draws a group for each of ``prompts`` (rows of the prompt cache)."""

    number: int
    prompts: np.ndarray


def round_of(number: int, num_prompts: int, per_round: int, seed: int) -> Round:
    """The prompts of a round: the next ``per_round`` of an endless walk through permutations."""
    places = number * per_round + np.arange(per_round)
    epochs = {
        e: np.random.default_rng([seed, e]).permutation(num_prompts)
        for e in np.unique(places // num_prompts).tolist()
    }
    prompts = [epochs[p // num_prompts][p % num_prompts] for p in places.tolist()]
    return Round(number, np.asarray(prompts, np.int32))


class Rounds:
    """The loop's data: all rounds in order; the position is one number."""

    def __init__(self, num_prompts: int, per_round: int, seed: int):
        self._make: Callable[[int], Round] = lambda n: round_of(n, num_prompts, per_round, seed)
        self._next = 0

    def __next__(self) -> Round:
        self._next += 1
        return self._make(self._next - 1)

    def state(self) -> dict[str, Any]:
        return {"round": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = int(state["round"])


@jax.jit
def _read(model: UnifiedModel, ids: jax.Array, lengths: jax.Array) -> KVCache:
    empty = kv.empty(model, ids.shape[0], ids.shape[1])
    return kv.prefill_text(model, empty, ids, lengths)


def read_prompts(model: UnifiedModel, prompts: Sequence[Sequence[int]]) -> KVCache:
    """Reads each prompt (token ids without delimiters) into a row of one cache, in one pass."""
    return _read(model, *kv.padded([model.cfg.special_tokens.frame(ids) for ids in prompts], 16))


# -- pictures -----------------------------------------------------------------------------------------------


def decode(autoencoder: Autoencoder, latents: jax.Array, grid: Grid, patch: int) -> jax.Array:
    """Pictures uint8 ``[B, H, W, 3]`` from latents; under a mesh every device decodes its own rows."""

    def local(autoencoder: Autoencoder, latents: jax.Array) -> jax.Array:
        return pixels.decode_images(autoencoder, latents, grid, patch)

    mesh = jax.sharding.get_abstract_mesh()
    rows = jax.sharding.PartitionSpec(("data", "fsdp"))
    if mesh.empty or latents.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return local(autoencoder, latents)
    whole = jax.sharding.PartitionSpec()
    return jax.shard_map(local, in_specs=(whole, rows), out_specs=rows)(autoencoder, latents)


@dataclass(frozen=True)
class Drawn:
    """Pictures of a round, groups one after the other, members of a group in order.

    Attributes:
      record: the algorithm's, leading with B.
      images: uint8 ``[B, H, W, 3]`` on the device.
      spread: mean distance of a group's latents from each other, ``[groups]``.
    """

    record: Any
    images: jax.Array
    spread: jax.Array


class Roller:
    """Draws rounds, batch by batch, with one compiled program.

    Args:
      cfg: the experiment.
      algorithm: how pictures are drawn and what is kept of them.
      settings: for the window.
      grid, patch: of latent tokens.
    """

    def __init__(
        self,
        cfg: GRPOConfig,
        algorithm: Algorithm,
        settings: RolloutSettings,
        grid: Grid,
        patch: int,
    ):
        self._cfg, self._settings = cfg, settings

        def draw(model, autoencoder, cache, prompts, keys, start):
            contexts = Contexts(kv.take(cache, prompts))
            final, record = algorithm.draw(model, contexts, keys, start)
            final = constrain(final, ("batch", None, None))
            images = decode(autoencoder, final, grid, patch)
            return final, record, images

        self.program = jax.jit(draw)
        self._join = jax.jit(self._joined)

    def __call__(self, model: UnifiedModel, autoencoder: Autoencoder, cache: KVCache, round_: Round) -> Drawn:
        """Draws all groups of a round with the policy ``model``."""
        cfg, seed = self._cfg, self._cfg.seed
        keys = picture_keys(round_key(seed, round_.number, "picture"), cfg.pictures)
        keys = keys.reshape(cfg.prompts_per_round, cfg.group)
        window = round_key(seed, round_.number, "window")
        starts = cfg.rollout.window_starts
        batches = []
        for batch, first in enumerate(range(0, cfg.prompts_per_round, cfg.prompts_per_batch)):
            chosen = slice(first, first + cfg.prompts_per_batch)
            lanes = [
                self.program(
                    model,
                    autoencoder,
                    cache,
                    round_.prompts[chosen],
                    keys[chosen, lane :: len(starts) or 1].reshape(-1),
                    start,
                )
                for lane, start in enumerate(
                    [jnp.int32(s) for s in starts]
                    or [self._settings.draw_start(jax.random.fold_in(window, batch))]
                )
            ]
            batches.append(lanes)
        final, record, images = self._join(batches)
        return Drawn(record, images, _spread(final, cfg.group))

    def _joined(self, batches: list[list[Any]]) -> Any:
        """Lanes back into groups (member g comes from lane g mod lanes), batches one after the other."""
        prompts = self._cfg.prompts_per_batch

        def lanes(*xs: jax.Array) -> jax.Array:
            x = jnp.stack([x.reshape(prompts, -1, *x.shape[1:]) for x in xs], axis=2)
            return x.reshape(-1, *x.shape[3:])

        joined = [jax.tree.map(lanes, *batch) for batch in batches]
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *joined)


@jax.jit(static_argnames="group")
def _spread(latents: jax.Array, group: int) -> jax.Array:
    """Root mean square distance between two pictures of each group, by the group's variance."""
    grouped = latents.reshape(-1, group, latents.shape[1] * latents.shape[2])
    return jnp.sqrt(2 * grouped.var(axis=1, ddof=1).mean(axis=-1))


def on_mesh(array: np.ndarray, mesh: Any) -> jax.Array:
    """A host array that every process has in full, split over the batch axis where it divides."""
    if mesh is None:
        return jnp.asarray(array)
    sharding = batch_sharding(mesh)
    if array.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
