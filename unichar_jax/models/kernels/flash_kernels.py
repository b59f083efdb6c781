"""The three Pallas kernels (Triton) of ``flash.py``, and the calls around them.

A program gets one line of a walk (``intervals.walks``) and all rows of its head, and reads those that it wants: rows
are cut into tiles, a head's numbers into pieces of powers of two (72, padded to 80, is 64 + 16), because Triton's
arrays have no other sizes. Lengths are whole tiles.

What was learned from the compiled programs: a tile in which every query sees every key leaves out the mask's
arithmetic (half of the instructions); the longest walks start first, so that the last programs are short; heads run
fastest, so that those that share a key head find it in the cache. 128 rows need 8 warps, with 4 they spill.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_UNSEEN = -1e30  # the running maximum's start: finite, so that exp(-inf - it) is 0 and never NaN
_LOG2E = math.log2(math.e)

Pieces = list[jax.Array]


@dataclass(frozen=True)
class Tile:
    """Queries and keys that a program holds at a time (powers of two), and how it is compiled."""

    q: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Settings:
    """``scale`` of the scores; ``interpret``: run step by step."""

    scale: float
    interpret: bool

    @property
    def scale2(self) -> float:
        """The scale for powers of two, which is what the hardware has."""
        return self.scale * _LOG2E


# -- inside a kernel -----------------------------------------------------------------------------------------


def _pieces(d: int) -> list[slice]:
    sizes = [1 << bit for bit in reversed(range(d.bit_length())) if d >> bit & 1]
    return [slice(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(len(sizes))]


def _load(ref: Any, at: jax.Array, size: int, *head: jax.Array) -> Pieces:
    """Rows of tile ``at``."""
    return [ref[(pl.ds(at * size, size), *head, piece)] for piece in _pieces(ref.shape[-1])]


def _store(ref: Any, at: jax.Array, size: int, pieces: Pieces) -> None:
    for piece, x in zip(_pieces(ref.shape[-1]), pieces, strict=True):
        ref[pl.ds(at * size, size), piece] = x.astype(ref.dtype)


def _zeros(rows: int, d: int) -> Pieces:
    return [jnp.zeros((rows, p.stop - p.start), jnp.float32) for p in _pieces(d)]


def _dot_t(xs: Pieces, ys: Pieces) -> jax.Array:
    """``x @ y.T`` in float32."""
    contract = (((1,), (1,)), ((), ()))
    return functools.reduce(
        jnp.add,
        (
            jax.lax.dot_general(x, y, contract, preferred_element_type=jnp.float32)
            for x, y in zip(xs, ys, strict=True)
        ),
    )


def _add_dot(acc: Pieces, x: jax.Array, ys: Pieces) -> Pieces:
    """``acc + x @ y``, piece by piece."""
    return [
        a + jnp.dot(x.astype(y.dtype), y, preferred_element_type=jnp.float32)
        for a, y in zip(acc, ys, strict=True)
    ]


def _walk(ref: Any) -> tuple[jax.Array, jax.Array, Callable, Callable]:
    """Reads a line: whose it is, how many tiles it has, the t-th of them, and whether a tile is full."""
    a0, a1, b0, b1, c0, c1, d0, d1, mine = (ref[n] for n in range(9))

    def tile(t: jax.Array) -> jax.Array:
        return jnp.where(t < a1 - a0, a0 + t, b0 - (a1 - a0) + t)

    def full(at: jax.Array) -> jax.Array:
        return ((at >= c0) & (at < c1)) | ((at >= d0) & (at < d1))

    return mine, a1 - a0 + b1 - b0, tile, full


def _hide(
    scores: jax.Array, full: jax.Array, bounds: Any, rows: Any, keys: jax.Array, axis: int
) -> jax.Array:
    """-inf where a query (``axis``) does not see a key. Full tiles are left as they are."""

    def hide(scores: jax.Array) -> jax.Array:
        a0, a1, b0, b1 = (jnp.expand_dims(bounds[n, rows], 1 - axis) for n in range(4))
        at = jnp.expand_dims(keys, axis)
        return jnp.where(((at >= a0) & (at < a1)) | ((at >= b0) & (at < b1)), scores, -jnp.inf)

    return jax.lax.cond(full, lambda s: s, hide, scores)


def _exp2(x: jax.Array, scale: float, minus: jax.Array, interpret: bool) -> jax.Array:
    """``exp2(x * scale - minus)``, ``minus`` of one row or column, in two instructions.

    Written out, the compiler neither fuses the product and the difference nor leaves out the care for results below
    2^-126 (0 here): six instructions for each score.
    """
    minus = jnp.broadcast_to(minus, x.shape)
    if interpret:
        return jnp.exp2(x * scale - minus)
    bits = np.float32(scale).view(np.uint32)
    (y,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 t; fma.rn.f32 t, $1, 0f{bits:08X}, $2; ex2.approx.ftz.f32 $0, t; }}",
        args=[x, -minus],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return y


def _forward_kernel(line, bounds, q_ref, k_ref, v_ref, out_ref, lse_ref, *, tile: Tile, settings: Settings):
    """One tile of queries of one head."""
    i, count, key_tile, is_full = _walk(line)
    rows, scale = pl.ds(i * tile.q, tile.q), settings.scale2
    exp2 = functools.partial(_exp2, scale=scale, interpret=settings.interpret)
    q = _load(q_ref, i, tile.q)

    def step(t, carry):
        top, total, out = carry
        j = key_tile(t)
        s = _dot_t(q, _load(k_ref, j, tile.k))
        s = _hide(s, is_full(j), bounds, rows, j * tile.k + jnp.arange(tile.k), 0)
        new_top = jnp.maximum(top, s.max(axis=1))
        p = exp2(s, minus=(new_top * scale)[:, None])
        # The difference first: as a fused product of its own, -1e30 * scale minus the same would not be 0.
        keep = exp2(top - new_top, minus=jnp.float32(0))
        out = _add_dot([x * keep[:, None] for x in out], p, _load(v_ref, j, tile.k))
        return new_top, total * keep + p.sum(axis=1), out

    start = (
        jnp.full(tile.q, _UNSEEN, jnp.float32),
        jnp.zeros(tile.q, jnp.float32),
        _zeros(tile.q, q_ref.shape[-1]),
    )
    top, total, out = jax.lax.fori_loop(0, count, step, start)
    sees = total > 0
    inverse = 1 / jnp.where(sees, total, 1)
    _store(out_ref, i, tile.q, [x * inverse[:, None] for x in out])
    # Infinite where nothing is seen: such a query gets no weight in the backward pass.
    lse_ref[rows] = jnp.where(sees, top * scale + jnp.log2(jnp.where(sees, total, 1)), jnp.inf)


def _dq_kernel(
    line, bounds, q_ref, k_ref, v_ref, g_ref, lse_ref, delta_ref, dq_ref, *, tile: Tile, settings: Settings
):
    """One tile of queries of one head."""
    i, count, key_tile, is_full = _walk(line)
    rows = pl.ds(i * tile.q, tile.q)
    q, g = _load(q_ref, i, tile.q), _load(g_ref, i, tile.q)
    lse, delta = lse_ref[rows][:, None], delta_ref[rows][:, None]

    def step(t, dq):
        j = key_tile(t)
        k = _load(k_ref, j, tile.k)
        s = _hide(_dot_t(q, k), is_full(j), bounds, rows, j * tile.k + jnp.arange(tile.k), 0)
        p = _exp2(s, settings.scale2, lse, settings.interpret)
        return _add_dot(dq, p * (_dot_t(g, _load(v_ref, j, tile.k)) - delta), k)

    dq = jax.lax.fori_loop(0, count, step, _zeros(tile.q, q_ref.shape[-1]))
    _store(dq_ref, i, tile.q, [x * settings.scale for x in dq])


def _dkv_kernel(
    line,
    bounds,
    q_ref,
    k_ref,
    v_ref,
    g_ref,
    lse_ref,
    delta_ref,
    dk_ref,
    dv_ref,
    *,
    tile: Tile,
    settings: Settings,
):
    """One tile of keys of one key head, over tiles and heads of its queries; scores are ``[keys, queries]``."""
    j, count, query_tile, is_full = _walk(line)
    group = jnp.int32(q_ref.shape[1])
    k, v = _load(k_ref, j, tile.k), _load(v_ref, j, tile.k)

    def step(t, carry):
        dk, dv = carry
        i, head = query_tile(jax.lax.div(t, group)), jax.lax.rem(t, group)  # // and % do not lower
        rows = pl.ds(i * tile.q, tile.q)
        q, g = _load(q_ref, i, tile.q, head), _load(g_ref, i, tile.q, head)
        s = _hide(_dot_t(k, q), is_full(i), bounds, rows, j * tile.k + jnp.arange(tile.k), 1)
        p = _exp2(s, settings.scale2, lse_ref[head, rows][None], settings.interpret)
        ds = p * (_dot_t(v, g) - delta_ref[head, rows][None])
        return _add_dot(dk, ds, q), _add_dot(dv, p, g)

    zeros = _zeros(tile.k, k_ref.shape[-1])
    dk, dv = jax.lax.fori_loop(0, count * group, step, (zeros, zeros))
    _store(dk_ref, j, tile.k, [x * settings.scale for x in dk])
    _store(dv_ref, j, tile.k, dv)


# -- around the kernels --------------------------------------------------------------------------------------


def _head(x: Any, heads: int | None = None, share: int = 1) -> pl.BlockSpec:
    """Of ``[B, L, heads, d]``: one head (or ``heads``, as an axis) for a program, or for ``share`` of them."""
    return pl.BlockSpec((None, x.shape[1], heads, x.shape[3]), lambda h, i, b: (b, 0, h // share, 0))


def _row(x: Any, heads: int | None = None) -> pl.BlockSpec:
    """Of ``[B, heads, L]``, likewise."""
    return pl.BlockSpec((None, heads, x.shape[2]), lambda h, i, b: (b, h, 0))


def _call(
    kernel: Callable,
    tile: Tile,
    settings: Settings,
    programs: int,
    lines: jax.Array,
    bounds: jax.Array,
    inputs: list[tuple[jax.Array, pl.BlockSpec]],
    outputs: list[tuple[Any, pl.BlockSpec]],
) -> list[jax.Array]:
    """The kernel for (heads, lines, rows of the batch); what it returns is like ``outputs``."""
    in_specs = [
        pl.BlockSpec((None, None, lines.shape[2]), lambda h, i, b: (b, i, 0)),
        pl.BlockSpec((None, *bounds.shape[1:]), lambda h, i, b: (b, 0, 0)),
    ]
    return pl.pallas_call(
        functools.partial(kernel, tile=tile, settings=settings),
        grid=(programs, lines.shape[1], lines.shape[0]),
        in_specs=in_specs + [spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=settings.interpret,
        name="flash" + kernel.__name__.removesuffix("_kernel"),
    )(lines, bounds, *(x for x, _ in inputs))


def forward(
    tile: Tile,
    settings: Settings,
    lines: jax.Array,
    bounds: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> list[jax.Array]:
    """The output, like q ``[B, Lq, heads, d]``, and its log-sum-exp to base 2, float32 ``[B, heads, Lq]``."""
    heads = q.shape[2]
    share = heads // k.shape[2]
    lse = jax.ShapeDtypeStruct((q.shape[0], heads, q.shape[1]), jnp.float32)
    inputs = [(q, _head(q)), (k, _head(k, share=share)), (v, _head(v, share=share))]
    outputs = [(q, _head(q)), (lse, _row(lse))]
    return _call(_forward_kernel, tile, settings, heads, lines, bounds, inputs, outputs)


def backward_q(tile, settings, lines, bounds, q, k, v, g, lse, delta) -> jax.Array:
    """The gradient of q. ``g`` is that of the output, ``delta`` (float32 ``[B, heads, Lq]``) their product."""
    share = q.shape[2] // k.shape[2]
    inputs = [(q, _head(q)), (k, _head(k, share=share)), (v, _head(v, share=share))]
    inputs += [(g, _head(g)), (lse, _row(lse)), (delta, _row(delta))]
    return _call(_dq_kernel, tile, settings, q.shape[2], lines, bounds, inputs, [(q, _head(q))])[0]


def backward_kv(tile, settings, lines, bounds, q, k, v, g, lse, delta) -> list[jax.Array]:
    """The gradients of k and v; ``lines`` walk over queries."""
    group = q.shape[2] // k.shape[2]
    inputs = [(q, _head(q, group)), (k, _head(k)), (v, _head(v))]
    inputs += [(g, _head(g, group)), (lse, _row(lse, group)), (delta, _row(delta, group))]
    outputs = [(k, _head(k)), (v, _head(v))]
    return _call(_dkv_kernel, tile, settings, k.shape[2], lines, bounds, inputs, outputs)
