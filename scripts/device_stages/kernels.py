"""Stages ``ceilings`` and ``attention``: what the card gives at best, and how near each attention kernel comes.

Attention is that of one layer: q, k, v in bfloat16, the mask of a packed row, the kernel's preparation outside of
the time (a forward pass prepares once for all layers; it is a line of its own). Before a kernel is timed, its output
and gradients are compared with dense attention in float32 on a ragged row; one that is wrong is not timed.
``tflops`` counts visible pairs alone: 4 * d * heads * pairs forward, 14 with the backward pass (two products and
five), whatever a kernel really computes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from device_stages.measure import part, say, say_device, seconds

from unichar_jax.models import kernels
from unichar_jax.models.kernels.reference import dense_attention
from unichar_jax.models.streams import TokenMeta, visible

WRONG = 2e-2
"""Relative error (of norms) from which a kernel in bfloat16 is wrong."""

Spans = Sequence[tuple[str, int]]


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def name_device() -> None:
    say_device(jax.devices()[0].device_kind, jax.__version__)


def ceilings(small: bool) -> None:
    """A matrix product (arithmetic), a copy, and a matrix times few vectors (memory: decoding at its best)."""
    name_device()
    n = 256 if small else 8192
    a, b = normal(0, n, n), normal(1, n, n)
    with part(f"matmul {n}^3, bfloat16"):
        took = seconds(jax.jit(jnp.matmul), a, b)
        say(f"matmul {n}^3, bfloat16", took * 1e3, "ms", tflops=2 * n**3 / took / 1e12)
    with part("copy"):
        x = normal(2, 2**20 if small else 2**31)
        took = seconds(jax.jit(lambda x: x + 1), x)
        say("copy, read and written", took * 1e3, "ms", gb_per_s=2 * x.nbytes / took / 1e9)
        del x
    layers, d_in, d_out = (2, 64, 256) if small else (14, 3584, 18944)
    w = normal(3, layers, d_in, d_out)
    for rows in (1, 8):
        with part(f"matrix times {rows} vectors"):
            v = normal(4, rows, d_in)
            took = seconds(jax.jit(lambda v, w: [v @ w[i] for i in range(layers)]), v, w)
            say(f"matrix times {rows} vectors", took * 1e3, "ms", gb_per_s=w.nbytes / took / 1e9)


# -- rows -------------------------------------------------------------------------------------------------------


def row_of(documents: Sequence[Spans], length: int) -> TokenMeta:
    """Metadata ``[1, length]`` of documents of spans (text, vit or latent; tokens), in the order of the streams: all
    text, then all that is looked at, then all noised images; padding last."""
    columns: list[np.ndarray] = []
    for segment, spans in enumerate(documents, 1):
        at = 0
        for block, (kind, n) in enumerate(spans, 1):
            order = at + np.arange(n)
            stream = ("text", "vit", "latent").index(kind)
            position = order if kind == "text" else np.full(n, at)
            fields = (segment, order, position, block if stream else 0, stream == 2, stream)
            columns.append(np.stack([np.broadcast_to(f, n) for f in fields]))
            at += n
    tokens = np.concatenate(columns, axis=1)
    tokens = tokens[:, np.argsort(tokens[-1], kind="stable")]
    padded = np.pad(tokens[:-1], ((0, 0), (0, length - tokens.shape[1])))
    return TokenMeta(*(jnp.asarray(f[None], jnp.int32) for f in padded))


class Case(NamedTuple):
    """A row to time, the ragged row to check on, and the heads (of queries, of keys, size) of both."""

    name: str
    row: TokenMeta
    ragged: TokenMeta
    heads: tuple[int, int, int]


def cases(small: bool) -> Iterator[Case]:
    unit = 1 if small else 16
    decoder, tower = ((4, 2, 32), (2, 2, 24)) if small else ((28, 4, 128), (16, 16, 72))
    length = 256 if small else 2048
    spans: list[Spans] = [
        [("text", 9 * unit + 1), ("vit", 25 * unit - 3), ("text", 11), ("latent", 17 * unit)],
        [("text", 9), ("latent", 23), ("text", 7), ("latent", 31)],
        [("latent", 25)],
        [("text", 12 * unit), ("vit", 5 * unit), ("vit", 33), ("latent", 7 * unit)],
    ]
    ragged = row_of(spans, length)
    one = [("text", 192 * unit), ("vit", 320 * unit), ("latent", 256 * unit)]
    yield Case("one document", row_of([one], 768 * unit), ragged, decoder)
    # In the tower an image sees itself alone, as noised ones do.
    images = [[("latent", 64 * unit)]] * 5
    uneven = row_of([[("latent", 50 * unit)], [("latent", 61)], [("latent", 3 * unit + 5)]], length)
    yield Case("tower, 5 images", row_of(images, 320 * unit), uneven, tower)
    each = [("text", 16 * unit), ("vit", 20 * unit), ("latent", 14 * unit), ("latent", 14 * unit)]
    yield Case("12 documents", row_of([each] * 12, 768 * unit), ragged, decoder)


# -- candidates -------------------------------------------------------------------------------------------------

Attention = Callable[..., jax.Array]
"""``f(data, q, k, v)``: arrays ``[1, L, heads, d]``."""


class Candidate(NamedTuple):
    """A way to compute attention. ``prepare(meta)`` makes its data; ``mask`` is what it should compute."""

    name: str
    prepare: Callable[[TokenMeta], Any]
    run: Attention
    mask: Callable[[TokenMeta], jax.Array]
    bias_gradient: bool = True


def our_mask(meta: TokenMeta) -> jax.Array:
    return visible(meta, meta)


def causal(meta: TokenMeta) -> jax.Array:
    return jnp.tri(meta.shape[1], dtype=bool)[None]


def everything(meta: TokenMeta) -> jax.Array:
    return jnp.ones((1, meta.shape[1], meta.shape[1]), bool)


def as_bias(meta: TokenMeta) -> jax.Array:
    """The mask as cuDNN takes it, bfloat16 ``[1, 1, L, L]``; the number is the one that jax uses there."""
    return jnp.where(our_mask(meta), 0, -(2.0**41)).astype(jnp.bfloat16)[:, None]


def candidates(platform: str) -> Iterator[Candidate]:
    """Every kernel of the package that runs here, the last first, then cuDNN (on CPUs XLA) without and with our mask.

    jax's backward pass through cuDNN also writes the bias' gradient, of L^2; switching that off reaches inside jax.
    """
    for name, kernel in reversed(kernels.KERNELS.items()):
        unsupported = kernel.unsupported(platform)
        if name.endswith("interpret"):
            unsupported = "it runs step by step, for tests"
        if unsupported:
            say(name, skipped=unsupported)
        else:
            yield Candidate(
                name, lambda meta, kernel=kernel: kernel.prepare(meta, meta), kernel.run, our_mask
            )
    library = "xla" if platform == "cpu" else "cudnn"
    call = functools.partial(jax.nn.dot_product_attention, implementation=library)
    yield Candidate(f"{library}, causal", lambda _: None, lambda _, *x: call(*x, is_causal=True), causal)
    yield Candidate(f"{library}, no mask", lambda _: None, lambda _, *x: call(*x), everything)
    masked = Candidate(f"{library}, our mask", as_bias, lambda bias, *x: call(*x, bias=bias), our_mask)
    yield masked._replace(name=f"{library}, our mask, no gradient of it", bias_gradient=False)
    yield masked


@contextlib.contextmanager
def bias_gradient(wanted: bool) -> Iterator[None]:
    if wanted or jax.default_backend() != "gpu":
        yield
        return
    with mock.patch("jax._src.cudnn.fused_attention_stablehlo.should_export_dbias", lambda *_: False):
        yield


def both(f: Attention) -> Callable[..., tuple]:
    """Output and gradients of ``f(data, q, k, v)`` for the cotangent that follows v."""

    def run(data: Any, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple:
        out, back = jax.vjp(lambda *x: f(data, *x), q, k, v)
        return out, *back(g.astype(out.dtype))

    return run


def arrays(meta: TokenMeta, heads: tuple[int, int, int], seed: int) -> list[jax.Array]:
    """q, k, v and a cotangent, bfloat16 ``[1, L, heads, d]``; the cotangent is zero at padding."""
    n, groups, d = heads
    shapes = [(1, meta.shape[1], h, d) for h in (n, groups, groups, n)]
    q, k, v, g = (normal(seed + i, *shape) for i, shape in enumerate(shapes))
    return [q, k, v, g * (meta.segment != 0)[..., None, None]]


def errors(candidate: Candidate, case: Case, seed: int) -> list[float]:
    """Relative errors of output, dq, dk and dv on the ragged row, against dense attention in float32.

    Rows of padding are not compared where the library computes them: there they see everything equally.
    """
    meta = case.ragged
    x = arrays(meta, case.heads, seed)
    got = jax.jit(both(candidate.run))(jax.jit(candidate.prepare)(meta), *x)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(both(dense_attention))
        expected = exact(candidate.mask(meta), *(y.astype(jnp.float32) for y in x))
    real = jnp.ones((1, meta.shape[1], 1, 1))
    if candidate.name not in kernels.KERNELS:
        real = (meta.segment != 0)[..., None, None]
    pairs = zip(got, expected, (real, 1, 1, 1), strict=True)
    return [
        float(jnp.linalg.norm(((a - b) * c).ravel()) / jnp.linalg.norm((b * c).ravel())) for a, b, c in pairs
    ]


def time_one(candidate: Candidate, case: Case, seed: int) -> None:
    what = f"{case.name}: {candidate.name}"
    with part(what), bias_gradient(candidate.bias_gradient):
        found = errors(candidate, case, seed)
        if not max(found) < WRONG:
            return say(what, error=f"wrong: relative errors of output, dq, dk, dv {found}; not timed")
        prepare = jax.jit(candidate.prepare)
        data, (*x, g) = prepare(case.row), arrays(case.row, case.heads, seed)
        forward = seconds(jax.jit(candidate.run), data, *x)
        training = jax.jit(both(candidate.run)).lower(data, *x, g).compile()
        total, memory = seconds(training, data, *x, g), training.memory_analysis()
        temporaries = None if memory is None else memory.temp_size_in_bytes / 2**30
        pairs = int(jax.jit(lambda m: candidate.mask(m).sum())(case.row))
        work = case.heads[0] * case.heads[2] * pairs / 1e12
        preparing = None if data is None else seconds(prepare, case.row) * 1e3
        say(
            f"{what}, forward",
            forward * 1e3,
            "ms",
            tflops=4 * work / forward,
            errors=found,
            prepare_ms=preparing,
        )
        say(
            f"{what}, forward and backward",
            total * 1e3,
            "ms",
            tflops=14 * work / total,
            temporaries_gib=temporaries,
        )
    return None


def attention(small: bool) -> None:
    """Every case by every candidate."""
    name_device()
    say("auto", value=None, kernel=kernels.resolve("auto"))
    found = list(candidates(jax.default_backend()))
    for seed, case in enumerate(cases(small)):
        for candidate in found:
            time_one(candidate, case, seed=10 * seed)
