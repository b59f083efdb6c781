"""The Qwen2 mixture-of-transformers decoder: two experts, one attention.

A layer takes two token arrays, ``und`` and ``gen``; each expert is plain dense matmuls over its own array.
Queries, keys and values of both are concatenated for one softmax and split again. There is no routing: no
gather, no scatter, no index list. Layers are stacked and walked by ``jax.lax.scan``; weights are cast and
gathered layer by layer inside it.

Source: BAGEL (arXiv 2505.14683), Qwen2.5 with QK-norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from unichar_jax.config.compute import Compute
from unichar_jax.config.model import DecoderConfig
from unichar_jax.models import params
from unichar_jax.models.attention import Prepared, attend
from unichar_jax.models.layers import Dense, RMSNorm, checkpointed
from unichar_jax.parallel.mesh import constrain

KeyValues = tuple[jax.Array, jax.Array]

EXPERTS = ("und", "gen")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


def rope_angles(position: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, float32 ``[B, L, 1, head_dim / 2]``."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = position.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding, halves convention (not interleaved); float32 in and out. RoFormer, arXiv
    2104.09864."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Expert(nnx.Module):
    """One expert's share of a layer: projections, norms and MLP."""

    def __init__(self, cfg: DecoderConfig):
        h, d, init = cfg.hidden_size, cfg.head_dim, params.normal(0.02)
        q_width, kv_width = cfg.num_heads * d, cfg.num_kv_heads * d
        self.attn_norm = RMSNorm(h, cfg.norm_eps)
        self.q = Dense(h, q_width, ("embed", "heads"), init=init)
        self.k = Dense(h, kv_width, ("embed", "kv_heads"), init=init)
        self.v = Dense(h, kv_width, ("embed", "kv_heads"), init=init)
        self.o = Dense(q_width, h, ("heads", "embed"), bias=False, init=init)
        self.q_norm = RMSNorm(d, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(d, cfg.norm_eps) if cfg.qk_norm else None
        self.mlp_norm = RMSNorm(h, cfg.norm_eps)
        self.gate = Dense(h, cfg.mlp_size, ("embed", "mlp"), bias=False, init=init)
        self.up = Dense(h, cfg.mlp_size, ("embed", "mlp"), bias=False, init=init)
        self.down = Dense(cfg.mlp_size, h, ("mlp", "embed"), bias=False, init=init)
        self.head_dim = d

    def qkv(self, x: jax.Array, rope: KeyValues) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries and keys, and values, each ``[B, L, heads, d]`` in x's dtype.

        Norm and rotation are float32 and rounded once; the reference rounds in between when training.
        """
        h = self.attn_norm(x)
        heads = lambda y: y.reshape(*y.shape[:-1], -1, self.head_dim)  # noqa: E731
        q, k, v = heads(self.q(h)), heads(self.k(h)), heads(self.v(h))
        q = self.q_norm(q, jnp.float32) if self.q_norm else q.astype(jnp.float32)
        k = self.k_norm(k, jnp.float32) if self.k_norm else k.astype(jnp.float32)
        q, k = rotate(q, *rope).astype(x.dtype), rotate(k, *rope).astype(x.dtype)
        return checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")

    def finish(self, x: jax.Array, attention_out: jax.Array) -> jax.Array:
        """Residual of the attention output, then the gated MLP."""
        x = x + self.o(attention_out.reshape(*x.shape[:-1], -1))
        h = self.mlp_norm(x)
        gate = checkpoint_name(self.gate(h), "gate")
        up = checkpoint_name(self.up(h), "up")
        return x + self.down(jax.nn.silu(gate) * up)


class DecoderLayer(nnx.Module):
    def __init__(self, cfg: DecoderConfig):
        self.und = Expert(cfg)
        self.gen = Expert(cfg)

    def __call__(
        self,
        und: jax.Array | None,
        gen: jax.Array | None,
        rope: KeyValues,
        prepared: Prepared,
        prefixes: Sequence[KeyValues] = (),
    ) -> tuple[jax.Array | None, jax.Array | None, KeyValues]:
        """One layer over understanding tokens ``[B, Lu, H]`` and generation tokens ``[B, Lg, H]``.

        Args:
          und, gen: either may be None.
          rope: cos, sin for the concatenation [und | gen].
          prepared: attention over the same concatenation.
          prefixes: this layer's cached keys and values, if any.

        Returns:
          und, gen, and the new keys and values ``[B, Lu + Lg, num_kv_heads, d]``.
        """
        split = 0 if und is None else und.shape[1]
        parts = []
        if und is not None:
            parts.append(self.und.qkv(und, (rope[0][:, :split], rope[1][:, :split])))
        if gen is not None:
            parts.append(self.gen.qkv(gen, (rope[0][:, split:], rope[1][:, split:])))
        q, k, v = (xs[0] if len(xs) == 1 else jnp.concatenate(xs, axis=1) for xs in zip(*parts, strict=True))
        out = attend(prepared, q, k, v, prefixes)
        if und is not None:
            und = self.und.finish(und, out[:, :split])
        if gen is not None:
            gen = self.gen.finish(gen, out[:, split:])
        return und, gen, (k, v)


class FinalNorm(nnx.Module):
    def __init__(self, cfg: DecoderConfig):
        self.und = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.gen = RMSNorm(cfg.hidden_size, cfg.norm_eps)


class Decoder(nnx.Module):
    def __init__(self, cfg: DecoderConfig):
        self.layers = params.stacked(DecoderLayer(cfg), cfg.num_layers)
        self.norm = FinalNorm(cfg)
        self.cfg = cfg

    def text_layers(self) -> list[DecoderLayer]:
        """The layers one by one, with the understanding expert alone.

        A scan copies a layer's weights before it uses them: nothing for many tokens, twice the traffic for one.
        """
        text = jax.tree.map(lambda x: x, self.layers)
        text.gen = nnx.data(None)
        return [jax.tree.map(lambda x, i=i: x[i], text) for i in range(self.cfg.num_layers)]

    def __call__(
        self,
        und: jax.Array | None,
        gen: jax.Array | None,
        position: jax.Array,
        prepared: Prepared,
        compute: Compute,
        prefixes: Sequence[KeyValues] = (),
        *,
        return_kv: bool = False,
        layers: Sequence[DecoderLayer] | None = None,
    ) -> tuple[jax.Array | None, jax.Array | None, KeyValues | None]:
        """All layers and the final norms.

        Args:
          und, gen: token embeddings, either may be None or empty.
          position: int32 ``[B, Lu + Lg]`` rotary positions.
          prepared: attention of these tokens (and of cached prefixes).
          compute: dtype, rematerialisation, scan.
          prefixes: cached keys and values of all layers, each ``[layers, B, num_kv_heads, Lp, d]``.
          return_kv: also return the new keys and values ``[layers, B, L, num_kv_heads, d]``.
          layers: from ``text_layers``, to be walked one by one; cached and new keys and values are then tuples of
            one array for each layer.
        """
        und = None if und is None or und.shape[1] == 0 else und
        gen = None if gen is None or gen.shape[1] == 0 else gen
        rope = rope_angles(position, self.cfg.head_dim, self.cfg.rope_theta)

        def body(carry, xs):
            layer, cached = xs
            carry = jax.tree.map(
                lambda x: checkpoint_name(constrain(x, ("batch", None, None)), "layer_input"), carry
            )
            layer = params.gathered(layer, compute.jax_dtype)
            u, g, kv = layer(*carry, rope, prepared, cached)
            return (u, g), (kv if return_kv else None)

        if layers is None:
            (und, gen), kv = jax.lax.scan(
                checkpointed(body, compute.remat),
                (und, gen),
                (self.layers, list(prefixes)),
                unroll=compute.unroll,
            )
        else:
            carry, kvs = (und, gen), []
            for i, layer in enumerate(layers):
                carry, kv = body(carry, (layer, [(k[i], v[i]) for k, v in prefixes]))
                kvs.append(kv)
            (und, gen), kv = carry, tuple(zip(*kvs, strict=True)) if return_kv else None
        norm = params.gathered(self.norm, compute.jax_dtype)
        und = None if und is None else norm.und(und)
        gen = None if gen is None else norm.gen(gen)
        return und, gen, kv
