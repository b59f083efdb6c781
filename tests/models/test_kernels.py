"""Every attention kernel against the dense reference, forward and gradients, on random packings."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unichar_jax.config.compute import Compute, MeshConfig
from unichar_jax.config.model import model_preset
from unichar_jax.errors import UserError
from unichar_jax.models import kernels, params
from unichar_jax.models.kernels import layout as layout_lib
from unichar_jax.models.kernels import splash as splash_lib
from unichar_jax.models.kernels.chunked import Chunked
from unichar_jax.models.kernels.cudnn import Cudnn
from unichar_jax.models.streams import TokenMeta, visible
from unichar_jax.models.vision import VisionTower
from unichar_jax.parallel.mesh import make_mesh

ROWS, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 150, 4, 2, 24
FAST = {
    "chunked": Chunked(chunk=64),
    "flash_interpret": kernels.KERNELS["flash_interpret"],
    "splash_interpret": kernels.KERNELS["splash_interpret"],
}

# Runs here with another library's arithmetic than the one that its name promises.
ELSEWHERE = {"cudnn": Cudnn(implementation="xla")}

# A span of a sample: causal text, a clean image, or a noised one. A row: samples, then padding, all shuffled.
span = st.tuples(st.sampled_from(["text", "clean", "noised"]), st.integers(1, 30))
row = st.tuples(st.lists(st.lists(span, min_size=1, max_size=5), max_size=4), st.integers(0, 2**32 - 1))
rows = st.lists(row, min_size=ROWS, max_size=ROWS)


def metadata(rows_of_samples) -> TokenMeta:
    """Tokens of each row in a random order (streams are stored apart), cut off at ``LENGTH``."""
    fields = np.zeros((5, ROWS, LENGTH), np.int32)
    for r, (samples, seed) in enumerate(rows_of_samples):
        tokens = [
            (segment, order, order, 0 if kind == "text" else block, kind == "noised")
            for segment, spans in enumerate(samples, start=1)
            for order, (block, kind) in enumerate(
                (block, kind) for block, (kind, n) in enumerate(spans, start=1) for _ in range(n)
            )
        ][:LENGTH]
        places = np.random.default_rng(seed).permutation(LENGTH)[: len(tokens)]
        fields[:, r, places] = np.array(tokens, np.int32).reshape(-1, 5).T
    return TokenMeta(*map(jnp.asarray, fields))


def run(kernel: kernels.Kernel, meta: TokenMeta, q, k, v, weight):
    """Outputs, and gradients of their weighted sum wrt q, k, v."""

    def loss(q, k, v):
        out = kernel.run(kernel.prepare(meta, meta), q, k, v)
        return (out * weight).sum(), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


@functools.cache
def compiled(name: str):
    kernel = (FAST | ELSEWHERE).get(name) or kernels.KERNELS[name]
    return jax.jit(functools.partial(run, kernel))


def arrays(seed: int, head_dim: int = HEAD_DIM, rows: int = ROWS):
    rng = np.random.default_rng(seed)
    shape = lambda heads: (rows, LENGTH, heads, head_dim)  # noqa: E731
    return [jnp.asarray(rng.normal(size=shape(h)), jnp.float32) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def assert_same(got, expected, tolerance=2e-5):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("name", FAST | ELSEWHERE)
@settings(max_examples=6, deadline=None)
@given(rows=rows)
def test_forward_and_gradients(name, rows):
    meta, x = metadata(rows), arrays(len(rows[0][0]))
    assert_same(compiled(name)(meta, *x), compiled("reference")(meta, *x))


@functools.partial(jax.jit, static_argnums=(1, 2))
def what_places_say(meta: TokenMeta, places: int, block: int):
    """The layout, and for every pair of tokens: does the first see the second, and is their block live?"""
    layout = layout_lib.make_layout(meta, places, block)
    code = layout_lib.Code.for_places(places)

    def of_row(layout):
        at = jnp.minimum(layout.place, places - 1)
        same = layout.sample[at][:, None] == layout.sample[at][None]
        sees = code.visible(layout.code[at][:, None], at[None]) & same
        return sees, layout.live[at[:, None] // block, at[None] // block]

    return layout, *jax.vmap(of_row)(layout), visible(meta, meta)


@settings(max_examples=12, deadline=None)
@given(rows=rows, places=st.sampled_from([256, 1280, 13_312]))
def test_two_intervals_are_the_mask(rows, places):
    """What the codes say, at places of any number (other numbers, other alignments), is ``visible``."""
    meta = metadata(rows)
    layout, sees, live, expected = jax.tree.map(np.asarray, what_places_say(meta, places, 128))
    assert places > 256 or not layout.overflow.any(), "nothing is aligned there, so there is room"
    for r in np.flatnonzero(~layout.overflow):
        real = np.flatnonzero(meta.segment[r])
        place = layout.place[r][real]
        assert len(set(place)) == len(real)
        np.testing.assert_array_equal(layout.source[r][place], real)
        pairs = np.ix_(real, real)
        np.testing.assert_array_equal(sees[r][pairs], expected[r][pairs])
        assert live[r][pairs][sees[r][pairs]].all(), "a block that is needed would be skipped"


def test_alignment_grows_with_the_number_of_places():
    alignments = {n: layout_lib.Code.for_places(n).alignment for n in (1_023, 13_312, 32_640)}
    assert alignments == {1_023: 1, 13_312: 32, 32_640: 128}


@pytest.mark.parametrize("length", [1, 127, 150, 1_000, 5_000, 12_288, 30_000])
def test_capacity_is_whole_blocks_with_room_to_align(length):
    places, block = layout_lib.capacity(length), layout_lib.block_size(length)
    assert places % block == 0
    assert length <= places < length * 9 / 8 + block
    alignment = layout_lib.Code.for_places(places).alignment
    images = length // (8 * alignment)
    assert length + images * (alignment - 1) <= places


def test_rows_without_room_are_nan_not_wrong(monkeypatch):
    monkeypatch.setattr(layout_lib, "capacity", lambda length: 128)
    meta = metadata([([[("text", 30)] * 5], 0), ([[("text", 10)]], 1)])
    q, k, v, _ = arrays(0)
    kernel = kernels.KERNELS["splash_interpret"]
    out = jax.jit(lambda *x: kernel.run(kernel.prepare(meta, meta), *x))(q, k, v)
    assert jnp.isnan(out[0]).all()
    expected = kernels.KERNELS["reference"].run(visible(meta, meta), q, k, v)
    assert_same([out[1]], [expected[1]])


@pytest.mark.parametrize("name", FAST)
def test_vision_tower(name):
    """The tower's images are blocks that see themselves alone, with another head dimension."""
    cfg = model_preset("debug").vision
    tower = params.initialize(VisionTower(cfg), 0)
    meta = metadata([([[("clean", 16), ("clean", 20)], [("clean", 9)]], 3)] * ROWS)
    patches = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, cfg.patch_dim))
    grid = jnp.asarray(np.arange(ROWS * LENGTH).reshape(ROWS, -1) % cfg.max_patches_per_side**2)

    def features(attention: str):
        return jax.jit(lambda p: tower(p, grid, meta, Compute("float32", attention=attention)))(patches)

    seen = (meta.segment != 0)[..., None]
    assert_same([features(name) * seen], [features("reference") * seen])


@pytest.mark.parametrize("name", FAST)
def test_on_a_mesh(name):
    """Rows over data and fsdp, heads over tensor: the same result, and no collective inside."""
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices; the suite asks for 8 simulated ones")
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    meta, x = metadata([([[("text", 40), ("noised", 30)]], r) for r in range(ROWS)]), arrays(5)
    expected = compiled(name)(meta, *x)
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(run, FAST[name])).lower(meta, *x).compile()
        assert_same(program(meta, *x), expected, tolerance=1e-6)


def test_chunked_memory_grows_with_length_not_its_square():
    def temporary(length: int) -> int:
        meta = TokenMeta(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 5)
        x = [jax.ShapeDtypeStruct((1, length, h, 8), jnp.float32) for h in (2, 1, 1, 2)]
        lowered = jax.jit(functools.partial(run, kernels.KERNELS["chunked"])).lower(meta, *x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(16_384) < 2.5 * temporary(8_192)


def test_unknown_kernel_names_the_closest():
    with pytest.raises(UserError, match="did you mean 'chunked'"):
        kernels.get("chunk")


@pytest.mark.parametrize(
    ("name", "what"), [("splash", "TPU kernel"), ("flash", "NVIDIA"), ("cudnn", "NVIDIA")]
)
def test_a_kernel_that_cannot_run_is_an_error(name, what):
    with pytest.raises(UserError, match=rf"'{name}'.*{what}.*, and this is 'cpu'.*compute\.attention"):
        kernels.get(name)


def test_another_jax_is_named(monkeypatch):
    monkeypatch.setattr(splash_lib.library, "_splash_attention", lambda q, k, v: None)
    with pytest.raises(UserError, match=r"found 'q k v'; install jax==0\.10\.2"):
        kernels.get("splash_interpret")
    assert kernels.choose("tpu")[0] == "chunked"


def test_auto_says_once_what_it_takes(caplog):
    kernels._announce.cache_clear()
    with caplog.at_level(logging.INFO):
        assert kernels.get("auto") is kernels.get("auto")
    assert len(caplog.messages) == 1
    assert "attention kernel: " in caplog.messages[0]
    assert kernels.choose("tpu")[0] == "splash"
    assert kernels.choose("gpu")[0] == kernels.choose("cuda")[0] == "flash"
    assert kernels.choose("rocm")[0] == "chunked"
