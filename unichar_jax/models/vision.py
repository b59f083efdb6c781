"""SigLIP's tower over packed patches (NaViT style), and the connector into the decoder.

Patches of several images lie in one stream; attention is full inside an image and nothing outside. Positions
are a learned table indexed by the patch's row and column, without interpolation.

Source: SigLIP (arXiv 2303.15343), NaViT (arXiv 2307.06304), as configured by BAGEL.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from unichar_jax.config.compute import Compute
from unichar_jax.config.model import DecoderConfig, VisionConfig
from unichar_jax.models import params
from unichar_jax.models.attention import Prepared, attend, prepare
from unichar_jax.models.layers import Dense, Embedding, LayerNorm, checkpointed
from unichar_jax.models.streams import TokenMeta
from unichar_jax.parallel.mesh import constrain


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


class VisionLayer(nnx.Module):
    """Pre-norm transformer block with biases."""

    def __init__(self, cfg: VisionConfig):
        h, inner = cfg.hidden_size, cfg.mlp_size
        wide, narrow = ("vision_embed", "vision_heads"), ("vision_heads", "vision_embed")
        self.norm1 = LayerNorm(h, cfg.norm_eps)
        self.q = Dense(h, h, wide)
        self.k = Dense(h, h, wide)
        self.v = Dense(h, h, wide)
        self.out = Dense(h, h, narrow)
        self.norm2 = LayerNorm(h, cfg.norm_eps)
        self.fc1 = Dense(h, inner, ("vision_embed", "vision_mlp"))
        self.fc2 = Dense(inner, h, ("vision_mlp", "vision_embed"))
        self.num_heads = cfg.num_heads

    def __call__(self, x: jax.Array, prepared: Prepared) -> jax.Array:
        h = self.norm1(x)
        heads = lambda y: y.reshape(*y.shape[:-1], self.num_heads, -1)  # noqa: E731
        out = attend(prepared, heads(self.q(h)), heads(self.k(h)), heads(self.v(h)))
        x = x + self.out(out.reshape(x.shape))
        return x + self.fc2(_gelu(self.fc1(self.norm2(x))))


class VisionTower(nnx.Module):
    def __init__(self, cfg: VisionConfig):
        h = cfg.hidden_size
        self.patch_embedding = Dense(cfg.patch_dim, h, (None, "vision_embed"))
        self.position_embedding = Embedding(
            cfg.max_patches_per_side**2, h, (None, "vision_embed"), params.normal(h**-0.5)
        )
        self.layers = params.stacked(VisionLayer(cfg), cfg.num_layers)
        self.post_norm = LayerNorm(h, cfg.norm_eps)

    def __call__(self, patches: jax.Array, grid: jax.Array, meta: TokenMeta, compute: Compute) -> jax.Array:
        """Patches ``[B, L, patch_dim]`` and their grid ids ``[B, L]`` to features ``[B, L, hidden]``."""
        # Inside the tower an image sees itself alone: as if every image were a noised block.
        alone = TokenMeta(meta.segment, meta.order, meta.position, meta.block, jnp.ones_like(meta.noisy))
        prepared = prepare(alone, alone, compute.attention)
        dtype = compute.jax_dtype
        x = params.gathered(self.patch_embedding, dtype)(patches.astype(dtype))
        x = x + params.gathered(self.position_embedding, dtype)(grid)

        def body(x, layer):
            x = constrain(x, ("batch", None, None))
            return params.gathered(layer, dtype)(x, prepared), None

        x, _ = jax.lax.scan(checkpointed(body, compute.remat), x, self.layers, unroll=compute.unroll)
        return params.gathered(self.post_norm, dtype)(x)


class Connector(nnx.Module):
    """Two-layer MLP from the tower's width to the decoder's."""

    def __init__(self, vision: VisionConfig, decoder: DecoderConfig):
        h = decoder.hidden_size
        self.fc1 = Dense(vision.hidden_size, h, ("vision_embed", "embed"))
        self.fc2 = Dense(h, h, (None, "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(_gelu(self.fc1(x)))
