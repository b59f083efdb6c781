"""Layout and collation: the published example, the mask's example, and what must survive packing."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.unpacking import unpack
from unichar_jax.config.model import SpecialTokens, model_preset
from unichar_jax.data.images import position_ids
from unichar_jax.data.layout import (
    LatentPart,
    Part,
    Sizes,
    TextPart,
    Tokens,
    VitPart,
    collate,
    lay_out,
    sizes,
)
from unichar_jax.models.streams import TokenMeta, visible

DEBUG = dataclasses.replace(model_preset("debug"), special_tokens=SpecialTokens(1, 2, 3, 4))
BIG = dataclasses.replace(model_preset("bagel-7b"), special_tokens=SpecialTokens(1, 2, 3, 4))


def latent(rows: int, columns: int, model=DEBUG, **kwargs) -> LatentPart:
    moments = np.random.default_rng(rows * 100 + columns).normal(size=(2, rows * columns, model.latent_dim))
    grid = position_ids(rows, columns, model.max_latent_size)
    return LatentPart(*moments.astype(np.float32), grid, **kwargs)


def vit(rows: int, columns: int, model=DEBUG, **kwargs) -> VitPart:
    patches = np.random.default_rng(rows + 9 * columns).normal(size=(rows * columns, model.vision.patch_dim))
    grid = position_ids(rows, columns, model.vision.max_patches_per_side)
    return VitPart(patches.astype(np.float32), grid, **kwargs)


def in_order(tokens: Tokens, name: str) -> list[int]:
    """A field of the metadata over all streams, in the order of the sequence."""
    metas = [tokens.text.meta, tokens.vit.meta, tokens.latent.meta]
    values = np.concatenate([getattr(m, name) for m in metas])
    return values[np.argsort(np.concatenate([m.order for m in metas]))].tolist()


def test_golden_example_of_the_packed_layout():
    t2i = lay_out([TextPart([10, 11]), latent(2, 2, BIG, timestep=0.3)], BIG, task=5)
    vlm = lay_out([vit(1, 2, BIG), TextPart([20]), TextPart([30, 31], loss=True)], BIG, task=6)
    batch = collate([[t2i, vlm]], Sizes(16, 3, 5), BIG)
    text = batch.text
    assert text.ids[0].tolist() == [1, 10, 11, 2, 3, 4, 3, 4, 1, 20, 2, 1, 30, 31, 2, 0]
    assert text.meta.segment[0].tolist() == [1] * 6 + [2] * 9 + [0]
    assert batch.latent.grid[0].tolist() == [0, 1, 64, 65, 0]
    assert batch.vit.grid[0].tolist() == [0, 1, 0]
    assert in_order(t2i, "position") == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]
    assert in_order(vlm, "position") == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert in_order(t2i, "order") == list(range(10))
    # the published indexes are those of the concatenated samples
    indexes = [*t2i.text.meta.order, *(10 + vlm.text.meta.order)]
    assert indexes == [0, 1, 2, 3, 4, 9, 10, 13, 14, 15, 16, 17, 18, 19, 20]
    assert t2i.latent.meta.order.tolist() == [5, 6, 7, 8]
    assert (10 + vlm.vit.meta.order).tolist() == [11, 12]
    learned = text.weight[0] > 0
    assert [indexes[i] for i in np.flatnonzero(learned)] == [17, 18, 19]
    assert text.targets[0][learned].tolist() == [30, 31, 2]
    assert not text.targets[0][~learned].any()
    assert batch.latent.weight[0].tolist() == [1, 1, 1, 1, 0]
    np.testing.assert_array_equal(batch.latent.timestep[0, :4], np.float32(0.3))
    assert set(text.task[0, :6]) == {5} and set(text.task[0, 6:15]) == {6}


def test_mask_of_the_published_example():
    """causal 3, full 2, noise 2, causal 2: an image with no inner tokens is its two delimiters."""
    tokens = lay_out([TextPart([9]), vit(0, 0), latent(0, 0, timestep=0.0), TextPart([])], DEBUG)
    assert sizes(tokens) == Sizes(9, 0, 0)
    meta = jax.tree.map(lambda x: x[None], tokens.text.meta)
    seen = np.asarray(visible(meta, meta))[0]
    assert np.flatnonzero(seen[5]).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert np.flatnonzero(seen[7]).tolist() == [0, 1, 2, 3, 4, 7]
    assert np.flatnonzero(seen[3]).tolist() == [0, 1, 2, 3, 4]


def test_positions_around_noised_and_dropped_parts():
    parts: list[Part] = [
        TextPart([7, 8], dropped=True),
        vit(1, 2, dropped=True),
        TextPart([9]),
        latent(1, 1),
        TextPart([9]),
        latent(1, 1, loss=False),
        TextPart([9]),
    ]
    tokens = lay_out(parts, DEBUG)
    expected = [1, 2, 3] + [4] * 3 + [4, 5, 6] + [7] * 3 + [8, 9, 10]
    assert in_order(tokens, "position") == expected
    assert in_order(tokens, "block") == [0] * 3 + [1] * 3 + [0] * 3 + [2] * 3 + [0] * 3
    assert in_order(tokens, "noisy") == [0] * 3 + [1] * 3 + [0] * 9
    assert tokens.latent.weight.tolist() == [1, 0]
    assert tokens.latent.timestep.tolist() == [0, -np.inf]
    assert 7 not in tokens.text.ids and sizes(tokens).vit == 0


def test_reweighting_gives_each_text_the_root_of_its_length():
    tokens = lay_out([TextPart([5, 6, 7], loss=True)], DEBUG, reweight_text=True)
    np.testing.assert_array_equal(tokens.text.weight, np.float32([0.5, 0.5, 0.5, 0.5, 0]))


def test_an_overfull_row_is_an_error_and_empty_rows_are_padding():
    tokens = lay_out([TextPart([5, 6])], DEBUG)
    with pytest.raises(ValueError, match="row 1: its first 2 of 2 samples"):
        collate([[tokens], [tokens, tokens]], Sizes(7, 0, 0), DEBUG)
    empty = collate([[], [tokens]], Sizes(4, 2, 3), DEBUG)
    assert not empty.text.meta.segment[0].any() and empty.text.meta.segment[1].all()
    assert empty.vit.patches.shape == (2, 2, DEBUG.vision.patch_dim)
    assert empty.latent.mean.shape == (2, 3, DEBUG.latent_dim)


_flag = st.booleans()
_side = st.integers(1, 3)
_part = st.one_of(
    st.builds(TextPart, st.lists(st.integers(5, 99), max_size=4), _flag, _flag, _flag),
    st.builds(lambda r, c, d: vit(r, c, dropped=d), _side, _side, _flag),
    st.builds(
        lambda r, c, loss, t, d: latent(r, c, loss=loss, timestep=t, dropped=d),
        _side,
        _side,
        _flag,
        st.floats(-3, 3, width=32),
        _flag,
    ),
)
_sample = st.tuples(st.lists(_part, min_size=1, max_size=4), st.integers(0, 8))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(_sample, max_size=3), min_size=1, max_size=3), st.integers(0, 5))
def test_every_field_survives_packing(plans, slack):
    rows = [[lay_out(parts, DEBUG, task=task) for parts, task in row] for row in plans]
    rows = [[t for t in row if sizes(t).total] for row in rows]  # everything may have been dropped
    needs = [np.sum([sizes(t) for t in row] or [(0, 0, 0)], axis=0) for row in rows]
    capacities = Sizes(*(int(n) + slack for n in np.max(needs, axis=0)))
    batch = collate(rows, capacities, DEBUG)
    assert sum(int((s.meta.segment > 0).sum()) for s in (batch.text, batch.vit, batch.latent)) == (
        np.sum(needs)
    )
    back = unpack(batch)
    assert [len(row) for row in back] == [len(row) for row in rows]
    for mine, theirs in zip(itertools.chain(*back), itertools.chain(*rows), strict=True):
        for name in Sizes._fields:
            jax.tree.map(np.testing.assert_array_equal, getattr(mine, name), getattr(theirs, name))
    _check_visibility(batch, rows)


def joined(*metas: TokenMeta) -> TokenMeta:
    """As ``TokenMeta.concatenate``, in numpy: nothing to compile for each new shape."""
    return jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *metas)


def _check_visibility(batch, rows):
    """The mask of a packed row is the block-diagonal of its samples' own masks."""
    meta = joined(batch.text.meta, batch.vit.meta, batch.latent.meta)
    seen = np.asarray(visible(meta, meta))
    segment = np.asarray(meta.segment)
    for r, row in enumerate(rows):
        for number, tokens in enumerate(row, start=1):
            own = (tokens.text.meta, tokens.vit.meta, tokens.latent.meta)
            own = joined(*(jax.tree.map(lambda x: x[None], m) for m in own))
            inside = segment[r] == number
            np.testing.assert_array_equal(seen[r][inside][:, inside], visible(own, own)[0])
            assert not seen[r][inside][:, ~inside].any()
        assert not seen[r][segment[r] == 0].any()
