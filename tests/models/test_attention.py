"""Attention over a cache: blocks of queries give the numbers of one, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.models import attention
from unichar_jax.models.kernels import reference


def case(rng, queries, cached, dtype=jnp.float32):
    """Two rows; some queries see nothing, as padding does."""
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    q = draw(2, queries, 4, 8)
    k, v = draw(2, queries, 2, 8), draw(2, queries, 2, 8)
    prefix = draw(2, 2, cached, 8), draw(2, 2, cached, 8)
    seen = rng.random((2, queries, queries + cached)) < 0.5
    seen[:, ::7] = False
    masks = jnp.asarray(seen[..., cached:]), jnp.asarray(seen[..., :cached])
    return attention.Prepared("reference", masks[0], (masks[1],)), q, k, v, [prefix]


@pytest.mark.parametrize("queries", [513, 1100])
def test_blocks_of_queries_change_no_number(queries, monkeypatch):
    prepared, *arrays = case(np.random.default_rng(queries), queries, 70)

    def run(q, k, v, prefixes):
        out = attention.attend(prepared, q, k, v, prefixes)
        return (out * jnp.arange(out.size).reshape(out.shape) / out.size).sum(), out

    got = jax.value_and_grad(run, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)
    monkeypatch.setattr(reference, "QUERIES_AT_ONCE", 10_000)
    want = jax.value_and_grad(run, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    assert not np.any(got[0][1][:, ::7])


@pytest.mark.parametrize("backward", [False, True])
def test_a_big_picture_needs_the_memory_of_one_block(backward, monkeypatch):
    """A picture of 1,024 pixels at BAGEL's head sizes, compiled and not run."""
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    arguments = (
        shape(1, 4096, 28, 128),
        *(shape(1, 4096, 4, 128),) * 2,
        *(shape(1, 4, 1024, 128),) * 2,
        shape(1, 4096, 4096, dtype=bool),
        shape(1, 4096, 1024, dtype=bool),
    )

    def temporaries() -> int:
        def run(q, k, v, k0, v0, mask, mask0):
            prepared = attention.Prepared("reference", mask, (mask0,))
            return attention.attend(prepared, q, k, v, [(k0, v0)]).astype(jnp.float32).sum()

        compiled = jax.jit(jax.grad(run, argnums=(0, 1, 2)) if backward else run).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    blocks = temporaries()
    monkeypatch.setattr(reference, "QUERIES_AT_ONCE", 10_000)
    whole = temporaries()
    print(f"temporaries: {blocks / 2**30:.2f} GiB in blocks, {whole / 2**30:.2f} GiB whole")
    assert blocks < whole / 4
