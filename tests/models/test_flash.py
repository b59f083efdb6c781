"""The GPU kernel in interpret mode: its intervals, its walks, its numbers at BAGEL's head sizes, and what it costs.

``test_kernels.py`` has it beside the other kernels: on random packings, in the vision tower, on a mesh.
"""

from __future__ import annotations

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from tests.models.test_kernels import LENGTH, ROWS, assert_same, metadata, rows, run
from unichar_jax.models import kernels
from unichar_jax.models.kernels import flash, intervals
from unichar_jax.models.kernels.flash import Flash, Tiles
from unichar_jax.models.kernels.reference import Reference
from unichar_jax.models.streams import TokenMeta, visible

FLASH = kernels.KERNELS["flash_interpret"]
DECODER, TOWER = (28, 4, 128), (16, 16, 72)

DIALOGUE = [
    ("text", 13),
    ("clean", 37),
    ("text", 5),
    ("noised", 29),
    ("text", 7),
    ("noised", 21),
    ("noised", 11),
]
RAGGED = metadata([([DIALOGUE, [("text", 9)]], 0), ([[("noised", 40)], [("clean", 30), ("text", 3)]], 1)])
IMAGES = metadata([([[("clean", 49)], [("clean", 17)], [("clean", 64)]], 2), ([[("clean", 100)]], 3)])


def arrays(heads: tuple[int, int, int], dtype=jnp.float32):
    """q, k, v and a weight of the output."""
    n, groups, d = heads
    keys = jax.random.split(jax.random.key(n), 4)
    shapes = [(ROWS, LENGTH, h, d) for h in (n, groups, groups, n)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def errors(got, expected, norm=np.inf) -> list[float]:
    """Of each array: the largest error as a share of the largest number (or of other norms); NaN is no number."""
    got, expected = ([np.asarray(x, np.float64).ravel() for x in xs] for xs in (got, expected))
    assert not any(np.isnan(x).any() for x in got), "a maximum would not show a NaN"
    size = functools.partial(np.linalg.norm, ord=norm)
    return [float(size(a - b) / size(b)) for a, b in zip(got, expected, strict=True)]


@functools.cache
def programs(kernel):
    return jax.jit(functools.partial(run, kernel))


# -- intervals and walks ------------------------------------------------------------------------------------


@jax.jit
def what_intervals_say(meta: TokenMeta):
    """Who sees whom by the intervals, in the tokens' own order; are they exact; ``visible``."""
    data = FLASH.prepare(meta, meta)
    start, end, other_start, other_end = jnp.moveaxis(data.sees.bounds[..., None], 1, 0)
    at = jnp.arange(LENGTH)
    sees = ((at >= start) & (at < end)) | ((at >= other_start) & (at < other_end))
    by_token = jax.vmap(lambda sees, place: sees[place][:, place])(sees, data.place)
    return by_token, data.sees.exact, data.source, data.place, visible(meta, meta)


@settings(max_examples=40, deadline=None)
@given(rows=rows)
def test_intervals_are_the_mask(rows):
    sees, exact, source, place, expected = map(np.asarray, what_intervals_say(metadata(rows)))
    assert exact.all()
    np.testing.assert_array_equal(np.take_along_axis(source, place, axis=1), [np.arange(LENGTH)] * ROWS)
    np.testing.assert_array_equal(sees, expected)


def test_what_is_no_interval_is_nan_and_nothing_else():
    """Of an image whose tokens are not together, the rest of the sample would be attended to by mistake."""
    torn = jax.tree.map(lambda x: np.array(x), RAGGED)
    tokens = np.flatnonzero((torn.segment[0] == 1) & (torn.block[0] == 0))
    torn.block[0, tokens[torn.order[0, tokens] < 2]] = 2  # two of the text's tokens join an image further on
    q, k, v, _ = arrays((4, 2, 24))
    out = jax.jit(lambda m: FLASH.run(FLASH.prepare(m, m), q, k, v))(torn)
    apart = np.flatnonzero(np.isnan(np.asarray(out)).any(axis=(0, 2, 3)))
    assert set(apart) == set(np.flatnonzero((torn.block[0] == 2) & (torn.order[0] < 2)))


@pytest.mark.parametrize("over_keys", [True, False])
@settings(max_examples=20, deadline=None)
@given(rows=rows)
def test_walks_visit_what_is_seen_and_call_full_what_is(over_keys, rows):
    places, tile = 192, (32, 16)
    meta = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, places - LENGTH))), metadata(rows))
    sees = FLASH.prepare(meta, meta).sees.bounds
    walks = np.asarray(intervals.walks(sees, places, tile, over_keys))
    start, end, other_start, other_end = np.moveaxis(np.asarray(sees)[..., None], 1, 0)
    at = np.arange(places)
    mask = ((at >= start) & (at < end)) | ((at >= other_start) & (at < other_end))
    tiles = mask.reshape(ROWS, places // tile[0], tile[0], places // tile[1], tile[1]).swapaxes(2, 3)
    some, every = tiles.any((3, 4)), tiles.all((3, 4))
    for row in range(ROWS):
        some_of, every_of = (x[row] if over_keys else x[row].T for x in (some, every))
        lines = walks[row]
        assert sorted(lines[:, 8]) == list(range(len(some_of)))
        lengths = lines[:, 1] - lines[:, 0] + lines[:, 3] - lines[:, 2]
        assert (np.diff(lengths) <= 0).all(), "the longest walk starts first"
        for a0, a1, b0, b1, c0, c1, d0, d1, mine in lines:
            walked = [*range(a0, a1), *range(b0, b1)]
            assert len(set(walked)) == len(walked)
            assert set(np.flatnonzero(some_of[mine])) <= set(walked)
            assert {*range(c0, c1), *range(d0, d1)} <= set(np.flatnonzero(every_of[mine]))


def test_a_long_row_of_short_documents_is_walked_as_its_documents():
    """8 documents of 1,536 tokens with two noised images each: 3 % beyond what is seen, of a square 13 times that."""
    at = np.arange(12_288)
    order = at % 1_536
    kind = order // 384  # text, a clean image, two noised ones
    meta = TokenMeta(*(jnp.asarray(x)[None] for x in (1 + at // 1_536, order, order, kind, kind // 2)))
    sees = jax.jit(lambda m: Flash().prepare(m, m).sees.bounds)(meta)
    seen = int((sees[:, 1] - sees[:, 0]).sum() + jnp.maximum(sees[:, 3] - sees[:, 2], 0).sum())
    for tile, over_keys in (((128, 128), True), ((64, 128), False)):
        lines = intervals.walks(sees, 12_288, tile, over_keys)
        tiles = int((lines[..., 1] - lines[..., 0] + lines[..., 3] - lines[..., 2]).sum())
        assert seen < tiles * tile[0] * tile[1] < 1.03 * seen < 12_288**2 / 13


# -- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "meta"), [(DECODER, RAGGED), (TOWER, IMAGES)], ids=["decoder", "tower"])
def test_output_and_gradients_are_the_dense_ones(heads, meta):
    x = arrays(heads)
    got, expected = programs(FLASH)(meta, *x), programs(Reference())(meta, *x)
    assert max(errors(got, expected)) <= 1e-5
    blind = np.asarray(meta.segment) == 0
    assert blind.any()
    for array in got:
        np.testing.assert_array_equal(np.asarray(array)[blind], 0)


@pytest.mark.parametrize(("heads", "meta"), [(DECODER, RAGGED), (TOWER, IMAGES)], ids=["decoder", "tower"])
def test_bfloat16_is_no_worse_than_twice_the_dense_one(heads, meta):
    """By the root of the mean square: a single number's rounding is chance."""
    x = arrays(heads, jnp.bfloat16)
    exact = programs(Reference())(meta, *(y.astype(jnp.float32) for y in x))
    ours, dense = (errors(programs(kernel)(meta, *x), exact, norm=2) for kernel in (FLASH, Reference()))
    print(f"ours {ours}, dense {dense}")
    assert all(1e-4 < b < 5e-3 and a <= 2 * b for a, b in zip(ours, dense, strict=True))


@settings(max_examples=10, deadline=None)
@given(rows=rows)
def test_gradients_are_the_same_at_every_run_and_any_packing_is_one_program(rows):
    meta, x = metadata(rows), arrays((4, 2, 24))
    first, again = (programs(FLASH)(meta, *x) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert_same(first, programs(Reference())(meta, *x), tolerance=1e-5)
    assert programs(FLASH)._cache_size() <= 5  # sizes and dtypes of this file


def test_rows_of_any_length_and_tiles_of_any_shape(monkeypatch):
    """Lengths that no tile divides; tiles that are wide, narrow, and not alike."""
    tile = flash.Tile
    monkeypatch.setattr(
        flash, "_INTERPRETED", Tiles(tile(64, 16, 4, 2), tile(16, 64, 4, 2), tile(32, 128, 4, 2))
    )
    x = arrays((6, 2, 40))
    got = jax.jit(functools.partial(run, Flash(interpret=True)))(RAGGED, *x)
    assert max(errors(got, programs(Reference())(RAGGED, *x))) <= 1e-5


NAMES = ("flash_forward", "flash_dq", "flash_dkv")


def kernels_in(jaxpr) -> Counter[str]:
    """The kernels whose results are used, by name; the compiler leaves out the others."""
    found: Counter[str] = Counter()
    used = {id(x) for eqn in jaxpr.eqns for x in eqn.invars} | {id(x) for x in jaxpr.outvars}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "pallas_call":
            inner = [x for value in eqn.params.values() for x in jax.tree.leaves(value) if hasattr(x, "eqns")]
            inner += [
                x.jaxpr
                for value in eqn.params.values()
                for x in jax.tree.leaves(value)
                if hasattr(x, "jaxpr")
            ]
            found += sum(map(kernels_in, inner), Counter())
        elif used & {id(x) for x in eqn.outvars}:
            found[str(eqn.params.get("name") or eqn.params["name_and_src_info"]).split()[0]] += 1
    return found


@pytest.mark.parametrize(("keep", "forward"), [((), 2), (("attention_out",), 1)])
def test_a_backward_pass_that_keeps_the_output_does_not_run_the_forward_one(keep, forward):
    q, k, v, weight = arrays((4, 2, 24))
    data = FLASH.prepare(RAGGED, RAGGED)
    policy = jax.checkpoint_policies.save_only_these_names(*keep)

    def loss(q, k, v):
        return (jnp.sin(FLASH.run(data, q * 2, k, v)) * weight).sum()

    grad = jax.grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))
    found = kernels_in(jax.make_jaxpr(grad)(q, k, v).jaxpr)
    assert found == dict(zip(NAMES, (forward, 1, 1), strict=True))


def test_tiles_are_those_of_the_card():
    hopper, others = (Tiles.of(kind, 128, jnp.bfloat16) for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA L4"))
    assert hopper.forward == flash.Tile(128, 128, 8, 2)
    assert Tiles.of("NVIDIA GH200 480GB", 128, jnp.bfloat16) == hopper
    assert Tiles.of("NVIDIA B200", 128, jnp.bfloat16) == hopper
    for kind in (
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA GeForce RTX 5090",
        "NVIDIA L40S",
    ):
        assert Tiles.of(kind, 128, jnp.bfloat16) == others
    assert hopper.whole(12_289, 4_100) == (12_416, 4_224)
