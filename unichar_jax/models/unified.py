"""The unified understand-and-generate model: BAGEL-MoT on three streams.

``UnifiedModel`` embeds each stream, runs the decoder over [text | vit | latent], and offers the two heads
(``logits`` on text, ``velocity`` on latents). It does not know about packing, noise schedules, caches or
losses: those call it. The autoencoder is a module of its own (``models/autoencoder.py``).

Source: BAGEL (arXiv 2505.14683).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unichar_jax.config.compute import Compute
from unichar_jax.config.model import ModelConfig
from unichar_jax.models import params
from unichar_jax.models.attention import prepare
from unichar_jax.models.decoder import Decoder, DecoderLayer, KeyValues
from unichar_jax.models.layers import Dense, Embedding
from unichar_jax.models.streams import TextStream, TokenMeta, VitStream
from unichar_jax.models.vision import Connector, VisionTower

_TIME_FEATURES = 256


@functools.lru_cache(maxsize=8)
def _half_table(side: int, width: int) -> np.ndarray:
    """[sin(z w), cos(z w)] for z < side: half of the 2-D table, computed in float64, float32 ``[side,
    width/2]``."""
    omega = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    angle = np.arange(side, dtype=np.float64)[:, None] * omega
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def position_table(side: int, width: int) -> np.ndarray:
    """The frozen 2-D sin-cos table, float32 ``[side * side, width]``: column first, then row."""
    half = _half_table(side, width)
    columns, rows = np.tile(half, (side, 1)), np.repeat(half, side, axis=0)
    return np.concatenate([columns, rows], axis=1)


def position_embedding(grid: jax.Array, side: int, width: int) -> jax.Array:
    """Rows of ``position_table`` for ids ``row * side + column``, without holding the whole table."""
    half = jnp.asarray(_half_table(side, width))
    return jnp.concatenate([half[grid % side], half[grid // side]], axis=-1)


def timestep_features(t: jax.Array) -> jax.Array:
    """[cos(t f), sin(t f)] with f geometric from 1 to 1/10000, float32 ``[..., 256]``; t raw in [0, 1]."""
    half = _TIME_FEATURES // 2
    f = jnp.exp(-np.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t.astype(jnp.float32)[..., None] * f
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedder(nnx.Module):
    def __init__(self, width: int):
        self.fc1 = Dense(_TIME_FEATURES, width, (None, "embed"))
        self.fc2 = Dense(width, width, (None, "embed"))

    def __call__(self, t: jax.Array, dtype) -> jax.Array:
        return self.fc2(jax.nn.silu(self.fc1(timestep_features(t).astype(dtype))))


class UnifiedModel(nnx.Module):
    """See the module's docstring. Constructed, it is a tree of declarations: ``params.initialize`` fills
    it."""

    def __init__(self, cfg: ModelConfig, compute: Compute | None = None):
        d, h = cfg.decoder, cfg.decoder.hidden_size
        self.embed = Embedding(d.vocab_size, h, ("vocab", "embed"), params.normal(0.02))
        self.decoder = Decoder(d)
        self.lm_head = Dense(h, d.vocab_size, ("embed", "vocab"), bias=False, init=params.normal(0.02))
        self.vision = VisionTower(cfg.vision)
        self.connector = Connector(cfg.vision, d)
        self.time_embedder = TimeEmbedder(h)
        self.latent_in = Dense(cfg.latent_dim, h, (None, "embed"))
        self.latent_out = Dense(h, cfg.latent_dim, ("embed", None), init=params.zeros)
        self.cfg = cfg
        self.compute = compute or Compute()

    # -- embeddings -------------------------------------------------------------------------------------

    def embed_text(self, ids: jax.Array) -> jax.Array:
        """``[B, L]`` ids to ``[B, L, H]``."""
        return params.gathered(self.embed, self.compute.jax_dtype)(ids)

    def embed_vit(self, vit: VitStream) -> jax.Array:
        """Patches to decoder tokens ``[B, L, H]``: tower, connector, frozen position table."""
        dtype, cfg = self.compute.jax_dtype, self.cfg
        features = self.vision(vit.patches, vit.grid, vit.meta, self.compute)
        side, width = cfg.vision.max_patches_per_side, cfg.decoder.hidden_size
        position = position_embedding(vit.grid, side, width)
        return params.gathered(self.connector, dtype)(features) + position.astype(dtype)

    def embed_latent(self, x_t: jax.Array, t: jax.Array, grid: jax.Array) -> jax.Array:
        """Latent tokens ``[B, L, latent_dim]`` at time t ``[B, L]`` to decoder tokens ``[B, L, H]``."""
        dtype, cfg = self.compute.jax_dtype, self.cfg
        position = position_embedding(grid, cfg.max_latent_size, cfg.decoder.hidden_size)
        return (
            params.gathered(self.latent_in, dtype)(x_t.astype(dtype))
            + params.gathered(self.time_embedder, dtype)(t, dtype)
            + position.astype(dtype)
        )

    # -- decoder and heads ------------------------------------------------------------------------------

    def backbone(
        self,
        und: jax.Array | None,
        gen: jax.Array | None,
        meta: TokenMeta,
        *,
        prefixes: Sequence[tuple[KeyValues, TokenMeta]] = (),
        return_kv: bool = False,
        layers: Sequence[DecoderLayer] | None = None,
    ) -> tuple[jax.Array | None, jax.Array | None, KeyValues | None]:
        """Decoder over [und | gen] with metadata of the same concatenation; see ``Decoder.__call__``.

        ``prefixes`` are what was read before: cached keys and values, and their metadata.
        """
        prepared = prepare(meta, meta, self.compute.attention, [m for _, m in prefixes])
        cached = [kv for kv, _ in prefixes]
        return self.decoder(
            und, gen, meta.position, prepared, self.compute, cached, return_kv=return_kv, layers=layers
        )

    def forward(
        self,
        text: TextStream,
        vit: VitStream,
        x_t: jax.Array,
        t: jax.Array,
        latent_grid: jax.Array,
        latent_meta: TokenMeta,
    ) -> tuple[jax.Array, jax.Array]:
        """A packed batch in one pass.

        Args:
          text, vit: streams; either may be empty.
          x_t: noised (or clean) latent tokens ``[B, Ll, latent_dim]``.
          t: their times in [0, 1], float32 ``[B, Ll]``; 0 is clean.
          latent_grid: int32 ``[B, Ll]``.
          latent_meta: metadata of the latent tokens.

        Returns:
          Final-normed states of the text tokens ``[B, Lt, H]`` and of the latent tokens ``[B, Ll, H]``.
        """
        num_text = text.ids.shape[1]
        metas, und = [text.meta], [self.embed_text(text.ids)]
        if vit.grid.shape[1]:
            metas.append(vit.meta)
            und.append(self.embed_vit(vit))
        gen = self.embed_latent(x_t, t, latent_grid) if latent_grid.shape[1] else None
        if gen is not None:
            metas.append(latent_meta)
        u, g, _ = self.backbone(jnp.concatenate(und, axis=1), gen, TokenMeta.concatenate(*metas))
        if u is None:
            u = jnp.zeros((x_t.shape[0], 0, self.cfg.decoder.hidden_size), self.compute.jax_dtype)
        if g is None:
            g = jnp.zeros((x_t.shape[0], 0, self.cfg.decoder.hidden_size), self.compute.jax_dtype)
        return u[:, :num_text], g

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits in float32 from final-normed states."""
        head = params.gathered(self.lm_head, self.compute.jax_dtype)
        return head(hidden).astype(jnp.float32)

    def velocity(self, hidden: jax.Array) -> jax.Array:
        """Flow velocity (data to noise) in float32 from final-normed states."""
        return params.gathered(self.latent_out, self.compute.jax_dtype)(hidden).astype(jnp.float32)
