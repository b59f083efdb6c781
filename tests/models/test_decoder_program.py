"""What the compiler makes of a decoder layer: no indexing, and no expert computed for another's tokens."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.config.model import DecoderConfig
from unichar_jax.models import flops, params
from unichar_jax.models.attention import prepare
from unichar_jax.models.decoder import DecoderLayer, rope_angles
from unichar_jax.models.streams import TokenMeta

CONFIG = DecoderConfig(
    hidden_size=512, mlp_size=2048, num_layers=1, num_heads=4, num_kv_heads=2, vocab_size=512
)
NUM_UND, NUM_GEN = 384, 256
LENGTH = NUM_UND + NUM_GEN
BENCH = Path(__file__).parents[2] / "scripts" / "bench_layer.py"

# The ops themselves, not the collectives all-gather and reduce-scatter.
INDEXING = re.compile(r"(?<![\w-])(gather|scatter|select-and-scatter)\(")


def layer_on_streams(layer, und, gen, meta):
    rope = rope_angles(meta.position, CONFIG.head_dim, CONFIG.rope_theta)
    return layer(und, gen, rope, prepare(meta, meta))[:2]


def both_and_select(layer, und, gen, meta):
    """What must not happen: every token through both experts."""
    rope = rope_angles(meta.position, CONFIG.head_dim, CONFIG.rope_theta)
    x, prepared = jnp.concatenate([und, gen], axis=1), prepare(meta, meta)
    (u, _, _), (_, g, _) = layer(x, None, rope, prepared), layer(None, x, rope, prepared)
    return jnp.where((meta.noisy == 0)[..., None], u, g)


def through_indices(layer, und, gen, meta):
    """What must not happen: rows taken by index."""
    order = jnp.argsort(meta.order[0])
    x = jnp.concatenate([und, gen], axis=1)[:, order]
    return layer_on_streams(layer, x[:, :NUM_UND], x[:, NUM_UND:], meta)


def gradient(f: Callable) -> Callable:
    def loss(layer, und, gen, meta):
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(f(layer, und, gen, meta)))

    return jax.grad(loss, argnums=(0, 1, 2))


def compiled(f: Callable) -> jax.stages.Compiled:
    struct = jax.ShapeDtypeStruct
    meta = TokenMeta(*[struct((1, LENGTH), jnp.int32)] * 5)
    tokens = [struct((1, n, CONFIG.hidden_size), jnp.float32) for n in (NUM_UND, NUM_GEN)]
    lowered = jax.jit(f).lower(params.abstract(DecoderLayer(CONFIG)), *tokens, meta)
    return lowered.compile({"xla_backend_optimization_level": 0})  # the program, not its machine code


def faults(program: jax.stages.Compiled, passes: int) -> list[str]:
    """Indexing ops, and work more than 2 % off one expert per token plus dense attention.

    The formula, per pass (forward 1, with gradients 3): ``2 * tokens * weights of one expert`` plus
    ``4 * heads * head_dim * L^2``; the reference kernel scores all L^2 pairs, masked or not.
    """
    found = sorted(set(INDEXING.findall(program.as_text())))
    expected = passes * flops.decoder_layer(CONFIG, LENGTH, LENGTH**2)
    ratio = program.cost_analysis()["flops"] / expected
    return found + ([f"{ratio:.3f} x the work"] if abs(ratio - 1) > 0.02 else [])


def test_expert_weights_are_those_of_the_modules():
    layer = params.flat(DecoderLayer(CONFIG).und)
    assert flops.expert_weights(CONFIG) == sum(
        np.prod(s.shape) for name, s in layer.items() if name.endswith("kernel")
    )


def test_forward_pass():
    assert faults(compiled(layer_on_streams), passes=1) == []


def test_gradient():
    assert faults(compiled(gradient(layer_on_streams)), passes=3) == []


def test_the_check_sees_experts_computed_in_vain():
    assert any("x the work" in f for f in faults(compiled(both_and_select), passes=1))


def test_the_check_sees_indexing():
    assert {"gather", "scatter"} <= set(faults(compiled(gradient(through_indices)), passes=3))


def test_benchmark_compares_the_same_mathematics():
    bench = runpy.run_path(str(BENCH))
    cfg = DecoderConfig(hidden_size=32, mlp_size=64, num_layers=1, num_heads=2, num_kv_heads=1)
    schemes = bench["build"](cfg, 24, 16, "float32")
    with jax.default_matmul_precision("highest"):
        ours, theirs = (f(*args) for f, args in schemes.values())
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
