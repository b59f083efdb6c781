"""Training of the mini world's scorers and judge: captions, targets, wear, and files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import REPOSITORY
from unichar_jax.checkpoint.encoders import load_clip, load_dinov2
from unichar_jax.errors import UserError
from unichar_jax.evaluation.judge import AttributeJudge, Network, NetworkConfig, load_judge
from unichar_jax.models import params
from unichar_jax.models.encoders.clip import Clip
from unichar_jax.models.encoders.dinov2 import Dinov2
from workshop.minimodel import encoders, files
from workshop.miniworld.texts import SAID, attributes_in_text
from workshop.miniworld.voices import PHRASES
from workshop.miniworld.world import ATTRIBUTES, attributes, random_look, sample_scene

NAMES = list(ATTRIBUTES)


def _labels(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.array([list(attributes(random_look(rng), sample_scene(rng)).values()) for _ in range(count)])


def test_a_change_is_of_one_attribute_and_keeps_a_look_valid():
    rng = np.random.default_rng(1)
    for row in _labels(20):
        for a in range(len(NAMES)):
            other = encoders.changed(row, a, rng)
            assert list(np.flatnonzero(other != row)) == [a]
            encoders.caption(other, rng, 0.0)  # raises if two colours of the look are equal


def test_captions_say_the_labels():
    for row in _labels(20, seed=2):
        stated = attributes_in_text(encoders.caption(row, np.random.default_rng(0), 0.0))
        assert stated == {n: ATTRIBUTES[n][int(i)] for n, i in zip(NAMES, row, strict=True)}


def test_negatives_differ_from_the_caption_in_one_attribute():
    rows = encoders.captions(_labels(20, seed=3), np.random.default_rng(3), negatives=3)
    for true, *false in rows:
        said = attributes_in_text(true)
        for text in false:
            other = attributes_in_text(text)
            assert text != true
            assert len({n for n in said | other if said.get(n) != other.get(n)}) == 1


def test_words_of_attributes_have_ids_of_their_own():
    words = sorted({w for values in ATTRIBUTES.values() for v in values for w in v.split()})
    ids = files.tokenize(words)
    assert len(set(ids[:, 0].tolist())) == len(words)
    assert (ids[:, 1:] == files.CLIP.end_of_text).all()
    common = files.tokenize(["is with belly wearing the looks picture of on in an and feels its"])[0, :14]
    assert not set(common.tolist()) & set(ids[:, 0].tolist())
    long = files.tokenize(["word " * 100])
    assert long.shape == (1, files.CLIP.max_length)
    assert long[0, -1] == files.CLIP.end_of_text


def test_shared_looks_counts_equal_look_attributes():
    labels = np.zeros((3, 10), int)
    labels[1, [0, 4, 7]] = 1  # two looks and one scene attribute differ
    shares = np.asarray(encoders.shared_looks(labels))
    np.testing.assert_allclose(shares[0], [1, 4 / 6, 1])


def test_attribute_loss_is_the_sum_of_cross_entropies():
    labels = _labels(4)
    uniform = {n: jnp.zeros((4, len(v))) for n, v in ATTRIBUTES.items()}
    expected = sum(np.log(len(v)) for v in ATTRIBUTES.values())
    assert float(encoders.attribute_loss(uniform, labels)) == pytest.approx(expected, rel=1e-5)
    sure = {n: 50.0 * jax.nn.one_hot(labels[:, i], len(v)) for i, (n, v) in enumerate(ATTRIBUTES.items())}
    assert float(encoders.attribute_loss(sure, labels)) == pytest.approx(0, abs=1e-5)
    some = {n: uniform[n] for n in ("species", "time")}
    assert float(encoders.attribute_loss(some, labels)) == pytest.approx(np.log(30), rel=1e-5)


def test_worn_pictures_stay_near_and_differ_from_each_other():
    x = jnp.tile(jnp.linspace(-1, 1, 96)[None, :, None, None], (8, 1, 96, 3))
    y = np.asarray(encoders.worn(x, jax.random.key(0)))
    assert y.shape == x.shape
    assert np.abs(y - np.asarray(x)).mean() < 0.25
    assert len({p.tobytes() for p in y}) == 8


def test_the_judge_comes_back_from_its_file(tmp_path):
    judge = params.initialize(Network(files.JUDGE), 0)
    files.save_judge(tmp_path, judge)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), np.uint8)
    reader = load_judge(tmp_path)
    assert (reader.attributes, reader.voices) == (SAID, PHRASES)
    for (name, a), b in zip(params.named_leaves(judge), jax.tree.leaves(reader.network), strict=True):
        np.testing.assert_array_equal(np.asarray(a).astype(jnp.bfloat16).astype(np.float32), b, err_msg=name)
    probabilities = AttributeJudge(reader.network, SAID, files.PREPROCESS, batch_size=4).read(pictures)
    for name, p in probabilities.items():
        assert p.shape == (3, len(ATTRIBUTES[name]))
        np.testing.assert_allclose(p.sum(axis=-1), 1, atol=1e-5)


def test_a_foreign_judge_is_refused(tmp_path):
    other = params.initialize(Network(NetworkConfig(96, files.JUDGE.values, widths=(8, 8, 8, 8))), 0)
    files.save_judge(tmp_path, other)
    (tmp_path / "config.json").write_text(json.dumps(files.judge_config()))
    with pytest.raises(UserError, match="not the weights of this judge"):
        load_judge(tmp_path)


def test_clip_comes_back_from_a_folder_like_the_hubs(tmp_path):
    model = params.initialize(Clip(files.CLIP), 0)
    files.save_clip(tmp_path, model)
    back = load_clip(tmp_path)
    assert back.cfg == files.CLIP
    for (name, a), b in zip(params.named_leaves(model), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(np.asarray(a).astype(jnp.bfloat16).astype(np.float32), b, err_msg=name)


def test_dinov2_comes_back_from_a_folder_like_the_hubs(tmp_path):
    model = params.initialize(Dinov2(files.DINOV2), 0)
    files.save_dinov2(tmp_path, model)
    back = load_dinov2(tmp_path)
    assert back.cfg == files.DINOV2
    for (name, a), b in zip(params.named_leaves(model), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(np.asarray(a).astype(jnp.bfloat16).astype(np.float32), b, err_msg=name)


@pytest.mark.parametrize(
    ("folder", "config"),
    [
        (files.TEXT_IMAGE, files.clip_config()),
        (files.IMAGE_ENCODER, files.dinov2_config()),
        (files.JUDGE_FOLDER, files.judge_config()),
    ],
)
def test_what_ships_says_what_the_workshop_writes(folder, config):
    shipped = (REPOSITORY / "checkpoints" / "mini" / folder / "config.json").read_text("utf-8")
    assert json.loads(shipped) == json.loads(json.dumps(config))


def test_only_the_judge_goes_on_from_another(tmp_path):
    assert encoders.EncoderTraining("judge", start=tmp_path).start == tmp_path
    with pytest.raises(UserError, match="leave it out for 'text'"):
        encoders.EncoderTraining("text", start=tmp_path)
