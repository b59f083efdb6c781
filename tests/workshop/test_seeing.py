"""The mini base's tower and connector learn to see: patches, words, and what is trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.config.compute import Compute
from unichar_jax.config.model import model_preset
from unichar_jax.data import images
from unichar_jax.models import params
from unichar_jax.models.unified import UnifiedModel
from workshop.minimodel import seeing
from workshop.miniworld.world import ATTRIBUTES, attributes, random_look, sample_scene

NAMES = list(ATTRIBUTES)
COLOURED = [n for n in NAMES if "colour" in n or n == "belly"]


class OneWordEach:
    """Stands in for the tokenizer: a token of its own for every word of an attribute."""

    words = sorted({v for values in ATTRIBUTES.values() for v in values})

    def encode(self, text):
        return [self.words.index(text.strip())]


def _labels(seed=0):
    rng = np.random.default_rng(seed)
    return np.array([list(attributes(random_look(rng), sample_scene(rng)).values())])


def _words():
    vectors = np.eye(len(OneWordEach.words), dtype=np.float32)
    return {
        n: jnp.asarray(vectors[:, [OneWordEach.words.index(v) for v in values]])
        for n, values in ATTRIBUTES.items()
    }


def test_patches_are_those_of_the_loader():
    pixels = np.random.default_rng(0).normal(size=(2, 70, 70, 3)).astype(np.float32)
    expected = np.stack([images.patchify(p, 14) for p in pixels])
    np.testing.assert_array_equal(seeing.patchify(jnp.asarray(pixels), 14), expected)


def test_the_right_words_cost_least_and_colours_may_change_places():
    words, labels = _words(), _labels()
    said = sum(30.0 * words[n][:, labels[0, i]] for i, n in enumerate(NAMES))[None]
    right = float(seeing.word_loss(said, words, jnp.asarray(labels)))
    # Three colours at once cannot all be the likeliest: log 3 for each is the least.
    assert np.isclose(right, len(COLOURED) * np.log(3), atol=1e-3)
    exchanged = labels.copy()
    columns = [NAMES.index(n) for n in COLOURED]
    exchanged[0, columns] = labels[0, columns[::-1]]
    assert np.isclose(float(seeing.word_loss(said, words, jnp.asarray(exchanged))), right)
    wrong = labels.copy()
    wrong[0, NAMES.index("species")] = (labels[0, NAMES.index("species")] + 1) % len(ATTRIBUTES["species"])
    assert float(seeing.word_loss(said, words, jnp.asarray(wrong))) > right + 20


def test_tower_and_connector_learn_and_nothing_else_changes(tmp_path, monkeypatch):
    model = params.initialize(UnifiedModel(model_preset("debug"), Compute(dtype="float32")), 0)
    before = {k: np.array(v) for k, v in params.flat(model).items()}
    real = seeing.fit

    def fit(budget, weights, loss_fn, batch_fn, evaluate):
        """Some steps by count, so that the test does not depend on the machine's speed."""
        ticks = iter(np.arange(0.0, 1e6, 1.0))
        return real(budget, weights, loss_fn, batch_fn, evaluate, clock=lambda: next(ticks))

    monkeypatch.setattr(seeing, "fit", fit)
    teach = functools.partial(
        seeing.teach_to_see,
        model,
        OneWordEach(),
        tmp_path / "work",
        tmp_path / "pool",
        minutes=4 / 60,
        pictures=16,
        held_out=64,
        batch=8,
    )
    taught, accuracy = teach()
    assert set(accuracy) == {"mean", *NAMES}
    after = params.flat(taught)
    changed = {k for k in before if not np.array_equal(before[k], after[k])}
    assert {k.split(".")[0] for k in changed} == {"vision", "connector"}
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), after))
    # Called again, a finished run is found and nothing is trained.
    again, _ = teach()
    for name, value in params.flat(again).items():
        np.testing.assert_array_equal(value, after[name])
