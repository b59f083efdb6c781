"""A cache holds what a whole pass would compute, row by row, whatever the padding."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unichar_jax.data import layout
from unichar_jax.data.images import position_ids
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow

from .conftest import CONFIG

empty = jax.jit(kv.empty, static_argnums=(1, 2))


def used(cache: kv.KVCache, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and positions of a row's tokens."""
    n = int(cache.length[row])
    return np.asarray(cache.k[:, row, :, :n]), np.asarray(cache.meta.position[row, :n])


def same(a: kv.KVCache, i: int, b: kv.KVCache, j: int) -> None:
    for got, expected in zip(used(a, i), used(b, j), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert int(a.rope[i]) == int(b.rope[j])


@given(st.integers(1, 100_000), st.integers(1, 64))
def test_buckets_are_few_and_waste_little(n: int, minimum: int) -> None:
    size = kv.bucket(n, minimum)
    assert size >= max(n, minimum)
    assert size == 1 or size < 1.5 * max(n, minimum)
    assert kv.bucket(size) == size


def test_rows_of_a_ragged_batch_are_as_if_read_alone(model: UnifiedModel, prompts) -> None:
    ids, lengths = prompts
    together = kv.prefill_text(model, empty(model, 3, 32), ids, lengths)
    np.testing.assert_array_equal(together.length, lengths)
    for row in range(3):
        alone = kv.prefill_text(model, empty(model, 1, 32), ids[row : row + 1], lengths[row : row + 1])
        same(together, row, alone, 0)


def test_reading_in_two_goes_is_reading_in_one(model: UnifiedModel, prompts) -> None:
    ids, lengths = prompts
    whole = kv.prefill_text(model, empty(model, 3, 32), ids, lengths)
    cuts = np.array([2, 7, 0], np.int32)
    cache = kv.prefill_text(model, empty(model, 3, 32), ids, cuts)
    rest = np.stack([np.roll(row, -cut) for row, cut in zip(ids, cuts, strict=True)])
    cache = kv.prefill_text(model, cache, rest, lengths - cuts)
    for row in range(3):
        same(cache, row, whole, row)


def test_a_truncated_cache_can_be_read_on(model: UnifiedModel, prompts) -> None:
    ids, lengths = prompts
    whole = kv.prefill_text(model, empty(model, 3, 32), ids, lengths)
    cut = kv.fit(kv.truncate(whole, jnp.array([3, 3, 9])), 16)
    np.testing.assert_array_equal(cut.length, [3, 3, 2])
    np.testing.assert_array_equal(cut.rope, [3, 3, 2])
    assert cut.capacity == 16
    rest = np.roll(ids, -3, axis=1)
    read_on = kv.prefill_text(model, cut, rest, jnp.array([2, 9, 0], np.int32))
    for row in range(3):
        same(read_on, row, whole, row)


def test_rows_move_between_caches(model: UnifiedModel, prompts) -> None:
    ids, lengths = prompts
    cache = kv.prefill_text(model, empty(model, 3, 32), ids, lengths)
    for moved, rows in (
        (kv.take(cache, jnp.array([2, 0])), [2, 0]),
        (kv.repeat(cache, 2), [0, 0, 1, 1, 2, 2]),
        (kv.stack([cache, kv.grow(kv.take(cache, jnp.array([1])), 48)]), [0, 1, 2, 1]),
        (kv.interleave([cache, kv.take(cache, jnp.array([2, 1, 0]))]), [0, 2, 1, 1, 2, 0]),
    ):
        assert moved.batch == len(rows)
        for i, row in enumerate(rows):
            same(moved, i, cache, row)


def picture(rows: int, columns: int, width: int, side: int, padded: int) -> tuple[np.ndarray, np.ndarray]:
    pad = padded - rows * columns
    tokens = np.random.default_rng(5).normal(size=(rows * columns, width)).astype(np.float32)
    return np.pad(tokens, [(0, pad), (0, 0)]), np.pad(position_ids(rows, columns, side), (0, pad))


@pytest.mark.parametrize("kind", ["vit", "latent"])
def test_a_picture_takes_one_position_and_rows_without_one_stay(model: UnifiedModel, prompts, kind) -> None:
    width = CONFIG.vision.patch_dim if kind == "vit" else CONFIG.latent_dim
    tokens, grid = picture(2, 3, width, 8, 8)
    prefill = kv.prefill_vit if kind == "vit" else kv.prefill_latent
    before = kv.prefill_text(model, empty(model, 3, 32), *prompts)
    tokens, grid = np.stack([tokens] * 3), np.stack([grid] * 3)
    after = prefill(model, before, tokens, grid, np.array([6, 0, 6], np.int32))
    np.testing.assert_array_equal(after.length - before.length, [8, 0, 8])
    np.testing.assert_array_equal(after.rope - before.rope, [1, 0, 1])
    np.testing.assert_array_equal(after.k[:, 1], before.k[:, 1])
    assert len(set(np.asarray(after.meta.position[0, 5:13]))) == 1


def test_pictures_and_text_in_a_cache_equal_one_packed_pass(model: UnifiedModel) -> None:
    """Against the packed forward pass of training: a looked-at picture, a text, a picture being drawn."""
    patches, patch_grid = picture(2, 3, CONFIG.vision.patch_dim, 8, 6)
    x, latent_grid = picture(2, 2, CONFIG.latent_dim, 8, 4)
    t = 0.7
    ids = [9, 17, 30]
    tokens = layout.lay_out(
        [
            layout.VitPart(np.asarray(patches), np.asarray(patch_grid)),
            layout.TextPart(ids),
            layout.LatentPart(np.asarray(x), np.zeros_like(x), np.asarray(latent_grid)),
        ],
        CONFIG,
    )
    text, vit, meta = jax.tree.map(
        lambda a: np.asarray(a)[None], (tokens.text, tokens.vit, tokens.latent.meta)
    )
    _, hidden = jax.jit(UnifiedModel.forward)(
        model, text, vit, x[None], np.full((1, 4), t, np.float32), latent_grid[None], meta
    )
    expected = model.velocity(hidden)

    cache = empty(model, 2, 32)  # the second row stays empty
    one_row = np.array([1, 0], np.int32)
    cache = kv.prefill_vit(model, cache, np.stack([patches] * 2), np.stack([patch_grid] * 2), 6 * one_row)
    framed = np.array([[1, *ids, 2, 0]] * 2)
    cache = kv.prefill_text(model, cache, framed, 5 * one_row)
    got = jax.jit(flow.velocity, static_argnums=4)(model, cache, np.stack([x] * 2), jnp.float32(t), (2, 2))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4, atol=1e-5)
    assert np.abs(got[1] - got[0]).max() > 1e-3  # the context matters


def test_tokens_beyond_the_capacity_are_dropped_not_misplaced(model: UnifiedModel, prompts) -> None:
    ids, lengths = prompts
    full = kv.prefill_text(model, empty(model, 3, 32), ids, lengths)
    small = kv.prefill_text(model, empty(model, 3, 8), ids, lengths)
    kept = replace(small, length=jnp.minimum(small.length, 8), rope=full.rope)
    for row in range(3):
        n = int(kept.length[row])
        np.testing.assert_allclose(kept.k[:, row, :, :n], full.k[:, row, :, :n], rtol=1e-4, atol=1e-5)
