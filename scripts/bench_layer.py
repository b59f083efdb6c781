"""Times one decoder layer, forward and backward, against the reference's way of choosing experts.

The reference keeps one interleaved sequence: wherever weights differ it takes each expert's rows by index,
multiplies twice, and writes both results back by index (norms, q, k, v, their norms, o, MLP). Here the
streams are apart and nothing is indexed. Both run the same weights on the same tokens with the same kernel;
outputs are compared before timing.

    python scripts/bench_layer.py --hidden 1024 --mlp 4096 --heads 8 --kv-heads 4 --und 1408 --gen 640
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.config.model import DecoderConfig
from unichar_jax.models import params
from unichar_jax.models.attention import Prepared, attend, prepare
from unichar_jax.models.decoder import DecoderLayer, Expert, KeyValues, rope_angles, rotate
from unichar_jax.models.streams import TokenMeta


def by_index(x: jax.Array, und_at: jax.Array, gen_at: jax.Array, und: Callable, gen: Callable) -> jax.Array:
    """Each expert's function on its rows of ``x [B, L, ...]``, written back into one array."""
    y_und, y_gen = und(x[:, und_at]), gen(x[:, gen_at])
    y = jnp.zeros((*x.shape[:2], *y_und.shape[2:]), y_und.dtype)
    return y.at[:, und_at].set(y_und).at[:, gen_at].set(y_gen)


def indexed_layer(
    layer: DecoderLayer,
    x: jax.Array,
    und_at: jax.Array,
    gen_at: jax.Array,
    rope: KeyValues,
    prepared: Prepared,
) -> jax.Array:
    """The layer on one interleaved sequence ``[B, L, H]``, experts chosen by index lists."""

    def route(x: jax.Array, f: Callable[[Expert], Callable]) -> jax.Array:
        return by_index(x, und_at, gen_at, f(layer.und), f(layer.gen))

    heads = lambda y: y.reshape(*y.shape[:2], -1, layer.und.head_dim)  # noqa: E731
    h = route(x, lambda e: e.attn_norm)
    q, k, v = (heads(route(h, lambda e, n=n: getattr(e, n))) for n in "qkv")
    q = rotate(route(q, lambda e: lambda y: e.q_norm(y, jnp.float32)), *rope).astype(x.dtype)
    k = rotate(route(k, lambda e: lambda y: e.k_norm(y, jnp.float32)), *rope).astype(x.dtype)
    x = x + route(attend(prepared, q, k, v).reshape(x.shape), lambda e: e.o)
    h = route(x, lambda e: e.mlp_norm)
    return x + route(h, lambda e: lambda y: e.down(jax.nn.silu(e.gate(y)) * e.up(y)))


def tokens(num_und: int, num_gen: int) -> tuple[np.ndarray, np.ndarray, TokenMeta]:
    """Places of both kinds in one sequence (text, a noised image, text, ...), and its metadata ``[1, L]``."""
    length, images = num_und + num_gen, 4
    kind = np.concatenate(
        [
            np.repeat([0, i + 1], [len(u), len(g)])
            for i, (u, g) in enumerate(
                zip(
                    np.array_split(np.arange(num_und), images),
                    np.array_split(np.arange(num_gen), images),
                    strict=True,
                )
            )
        ]
    )
    order = np.arange(length)
    fields = (np.ones(length), order, order, kind, kind > 0)
    meta = TokenMeta(*(jnp.asarray(f[None], jnp.int32) for f in fields))
    return np.flatnonzero(kind == 0), np.flatnonzero(kind > 0), meta


def build(cfg: DecoderConfig, num_und: int, num_gen: int, dtype: str) -> dict[str, tuple[Callable, tuple]]:
    """``{scheme: (f(layer, *x) -> [und | gen], arguments)}`` on the same weights and tokens."""
    und_at, gen_at, meta = tokens(num_und, num_gen)
    key = jax.random.key(0)
    layer = params.gathered(params.initialize(DecoderLayer(cfg), 0), jnp.dtype(dtype))
    x = jax.random.normal(key, (1, num_und + num_gen, cfg.hidden_size), jnp.dtype(dtype))
    streams_meta = jax.tree.map(lambda m: m[:, np.concatenate([und_at, gen_at])], meta)

    def streams(layer, und, gen):
        rope = rope_angles(streams_meta.position, cfg.head_dim, cfg.rope_theta)
        und, gen, _ = layer(und, gen, rope, prepare(streams_meta, streams_meta))
        return jnp.concatenate([und, gen], axis=1)

    def indexed(layer, x):
        rope = rope_angles(meta.position, cfg.head_dim, cfg.rope_theta)
        y = indexed_layer(layer, x, jnp.asarray(und_at), jnp.asarray(gen_at), rope, prepare(meta, meta))
        return jnp.concatenate([y[:, und_at], y[:, gen_at]], axis=1)

    return {
        "streams": (streams, (layer, x[:, und_at], x[:, gen_at])),
        "indexed": (indexed, (layer, x)),
    }


def gradient(f: Callable) -> Callable:
    """Gradients of a scalar of f's result wrt weights and inputs."""

    def loss(args):
        return jnp.square(f(*args).astype(jnp.float32)).mean()

    return lambda *args: jax.grad(loss)(args)


def measure(schemes: dict[str, tuple[Callable, tuple]], repeats: int) -> dict[str, float]:
    """Best seconds of forward and backward, the schemes taking turns."""
    steps = {}
    for name, (f, args) in schemes.items():
        steps[name] = (jax.jit(gradient(f)).lower(*args).compile(), args)
        jax.block_until_ready(steps[name][0](*args))
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats):
        for name, (step, args) in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*args))
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in dict(hidden=512, mlp=2048, heads=4, kv_heads=2, und=704, gen=320).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    cfg = DecoderConfig(
        hidden_size=a.hidden, mlp_size=a.mlp, num_layers=1, num_heads=a.heads, num_kv_heads=a.kv_heads
    )
    schemes = build(cfg, a.und, a.gen, a.dtype)
    ours, theirs = (jax.jit(f)(*args).astype(jnp.float32) for f, args in schemes.values())
    difference = float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())
    seconds = measure(schemes, a.repeats)
    result = {
        "device": jax.devices()[0].device_kind,
        **vars(a),
        "relative_difference": difference,
        "streams_ms": round(seconds["streams"] * 1e3, 2),
        "indexed_ms": round(seconds["indexed"] * 1e3, 2),
        "ratio": round(seconds["streams"] / seconds["indexed"], 3),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
