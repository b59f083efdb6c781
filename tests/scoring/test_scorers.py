"""The scorers on small random encoders: what they compare, whom they credit, and what must not matter."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unichar_jax.config.compute import MeshConfig
from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.encoders.clip import Clip, ClipConfig
from unichar_jax.models.encoders.dinov2 import Dinov2, Dinov2Config
from unichar_jax.models.encoders.lpips import Lpips, LpipsConfig
from unichar_jax.models.encoders.transformer import TransformerConfig
from unichar_jax.parallel.mesh import batch_sharding, make_mesh
from unichar_jax.scoring import preprocess
from unichar_jax.scoring.base import References, ScoreContext
from unichar_jax.scoring.clip_score import REFERENCE_SCALE, ClipScorer, clip_tokenizer
from unichar_jax.scoring.diversity import FeatureDiversity, LpipsDiversity
from unichar_jax.scoring.features import ImageEncoder
from unichar_jax.scoring.identity import IdentityScorer, dead_band

SIDE = 48
GROUPS = np.repeat([5, 2, 9], 8)


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    model = params.initialize(Lpips(LpipsConfig((6, 8, 8, 8, 6))), 0)
    # The published heads are not negative: a distance is one.
    for head in model.lin:
        head.kernel[...] = jnp.abs(head.kernel[...])
    return model


@pytest.fixture(scope="module")
def encode() -> ImageEncoder:
    cfg = Dinov2Config(TransformerConfig(16, 32, 2, 2, 1e-6, "gelu", layer_scale=True), 28, 7)
    model = params.initialize(Dinov2(cfg), 1)
    return ImageEncoder(
        model, Dinov2.__call__, preprocess.Preprocess(32, 28, (0.5,) * 3, (0.5,) * 3), batch_size=16
    )


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Three groups of eight; pictures of a group share a background and differ more and more from it."""
    rng = np.random.default_rng(0)
    base = np.repeat(rng.uniform(0, 1, (3, SIDE, SIDE, 3)), 8, axis=0)
    strength = np.tile(np.linspace(0.1, 0.9, 8), 3)[:, None, None, None]
    return ((1 - strength) * base + strength * rng.uniform(0, 1, base.shape)).astype(np.float32)


def _context(groups: np.ndarray, references: References | None = None) -> ScoreContext:
    return ScoreContext([""] * len(groups), groups, references or References())


# -- diversity ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["lpips", "features"])
def diversity(request, lpips, encode):
    return LpipsDiversity(lpips) if request.param == "lpips" else FeatureDiversity(encode)


def _distances(diversity, lpips, encode, images) -> np.ndarray:
    if isinstance(diversity, LpipsDiversity):
        return np.asarray(jax.jit(lambda m, x: m.pairwise(m.features(x)))(lpips, images))
    features = np.asarray(encode(images))
    return 1 - features @ features.T


@pytest.mark.parametrize("sizes", [(8, 8, 8), (5, 18, 1)], ids=str)
def test_credit_is_the_mean_distance_to_the_others_of_the_group(diversity, lpips, encode, images, sizes):
    groups = np.random.default_rng(0).permutation(np.repeat([5, 2, 9], sizes))
    got = np.asarray(diversity(images, _context(groups)))
    distances = _distances(diversity, lpips, encode, images)
    for i, group in enumerate(groups):
        others = [j for j in np.flatnonzero(groups == group) if j != i]
        expected = distances[i, others].mean() if others else 0.0
        np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-7)


def test_every_picture_of_a_group_has_its_own_credit(diversity, images):
    scores = np.asarray(diversity(images, _context(GROUPS)))
    for group in np.unique(GROUPS):
        members = scores[group == GROUPS]
        assert members.std() > 0.01 * members.mean()
        assert len(np.unique(members)) == len(members)


def test_a_copy_earns_less_than_the_odd_one_out(diversity, images):
    pictures = images.copy()
    pictures[1:3] = pictures[0]
    pictures[8:16] = pictures[8]
    groups = np.r_[[0] * 4, [1] * 4, GROUPS[8:]]
    scores = np.asarray(diversity(pictures, _context(groups)))
    assert scores[3] > 1.5 * scores[:3].max()
    np.testing.assert_allclose(scores[8:16], 0, atol=1e-6)


def test_placement_on_devices_does_not_matter(diversity, images):
    """The same pictures, shuffled over the devices, get the same scores; grouping by device would not."""
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
    devices = mesh.size
    assert devices > 1, "needs several (simulated) devices"
    one_device = np.asarray(diversity(images, _context(GROUPS)))
    local_grouping = []
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(len(images))
        with jax.set_mesh(mesh):
            placed = jax.device_put(images[order], batch_sharding(mesh))
            shuffled = np.asarray(diversity(placed, _context(GROUPS[order])))
        np.testing.assert_allclose(shuffled, one_device[order], rtol=1e-5)
        device = np.arange(len(images)) * devices // len(images)
        local = np.asarray(diversity(images[order], _context(GROUPS[order] * devices + device)))
        local_grouping.append(local[np.argsort(order)])
    assert np.abs(local_grouping[0] - local_grouping[1]).max() > 0.05 * one_device.max()


def test_lpips_of_smaller_pictures(lpips, images):
    full = LpipsDiversity(lpips)(images, _context(GROUPS))
    small = LpipsDiversity(lpips, size=36)(images, _context(GROUPS))
    assert small.shape == full.shape
    assert np.abs(np.asarray(small - full)).max() > 0


# -- identity -----------------------------------------------------------------------------------------------


def test_dead_band():
    got = dead_band(jnp.array([0.2, 0.5, 0.7, 0.9, 1.0]), 0.5, 0.9)
    np.testing.assert_allclose(got, [-0.6, 0, 0, 0, -0.2], atol=1e-6)


def test_identity_is_the_nearest_reference(encode, images):
    pixels = (images * 255).astype(np.uint8)
    references = References.of([Image.fromarray(p) for p in (pixels[0], pixels[8][:40])])
    got = np.asarray(IdentityScorer(encode)(pixels / 255.0, _context(GROUPS, references)))
    features, known = np.asarray(encode(pixels / 255.0)), encode.references(references)
    np.testing.assert_allclose(got, (features @ known.T).max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(got[0], 1, atol=1e-5)
    assert got[1:].max() < 1 - 1e-5

    band = (float(np.quantile(got, 0.3)), float(np.quantile(got, 0.6)))
    penalty = IdentityScorer(encode, band=band)(pixels / 255.0, _context(GROUPS, references))
    np.testing.assert_allclose(penalty, dead_band(jnp.asarray(got), *band), atol=1e-5)


def test_identity_needs_references(encode, images):
    with pytest.raises(UserError, match="no reference pictures"):
        IdentityScorer(encode)(images, _context(GROUPS))
    with pytest.raises(UserError, match="low < high"):
        IdentityScorer(encode, band=(0.9, 0.5))


# -- text-image match ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> Clip:
    tower = TransformerConfig(16, 32, 2, 2, 1e-5, "quick_gelu")
    cfg = ClipConfig(
        tower, tower, 8, vocab_size=40, max_length=9, end_of_text=39, image_size=14, patch_size=7
    )
    model = params.initialize(Clip(cfg), 2)
    model.logit_scale[...] = jnp.log(100.0)  # as published
    return model


def test_clip_score_is_the_cosine_with_the_own_prompt(clip, images):
    def tokenize(prompts):
        return np.array([[38, *(ord(c) % 30 for c in p), *([39] * (8 - len(p)))] for p in prompts])

    prepare = preprocess.Preprocess(14, 14, (0.5,) * 3, (0.5,) * 3, "bilinear")
    prompts = ["abc", "de", "abc", "f"]
    context = ScoreContext(prompts, np.arange(4))
    got = ClipScorer(clip, tokenize, prepare=prepare, batch_size=3)(images[:4], context)

    def published(m, x, ids):
        return m.logits(m.encode_images(prepare(x)), m.encode_texts(ids))

    logits = jax.jit(published)(clip, images[:4], tokenize(prompts))
    np.testing.assert_allclose(got * 100, np.diag(logits), rtol=1e-4)
    scaled = ClipScorer(clip, tokenize, scale=REFERENCE_SCALE, prepare=prepare)(images[:4], context)
    np.testing.assert_allclose(scaled, np.diag(logits) / 30, rtol=1e-4)


def test_clip_tokenizer(tmp_path):
    words = ["a</w>", "b</w>", "c</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    ids = clip_tokenizer(tmp_path, max_length=6)(["a B", "a b c a b c"])
    np.testing.assert_array_equal(ids, [[3, 0, 1, 4, 4, 4], [3, 0, 1, 2, 0, 4]])


def test_clip_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no CLIP tokenizer"):
        clip_tokenizer(tmp_path / "absent")
