"""Visual questions: probabilities among choices, weights, and independence of batches, on the debug model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.config.compute import Compute
from unichar_jax.config.model import model_preset
from unichar_jax.data.images import patchify, position_ids
from unichar_jax.data.rl_prompts import RLQuestion
from unichar_jax.data.transforms import Transforms
from unichar_jax.models import params
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import text
from unichar_jax.scoring.base import ScoreContext
from unichar_jax.scoring.visual_questions import VisualQuestions

CFG = model_preset("debug")
LOOK = Transforms.usual(CFG).look


class _Letters:
    def encode(self, text: str) -> list[int]:
        return [8 + ord(c) % 64 for c in text]


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    filled = params.initialize(UnifiedModel(CFG, Compute(dtype="float32")), 0)
    # Sharper than a random model is, so that answers differ.
    return params.map_named(lambda n, x: 20 * x if n.startswith("lm_head") else x, filled)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    """At the size the model looks at, so that nothing is resized."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(size=(3, LOOK.max_size, LOOK.max_size, 3)), jnp.float32)


def _ask(question: str, answer: str, kind: str, choices=(), weight: float = 1.0) -> RLQuestion:
    return RLQuestion(question, answer, kind, "", weight, False, tuple(choices))


def _scores(model, images, questions, **options) -> np.ndarray:
    scorer = VisualQuestions(_Letters(), LOOK, **options)
    context = ScoreContext(
        ["Tess"] * len(images), np.zeros(len(images), int), questions=questions, model=model
    )
    return scorer(images, context)


def test_choices_share_one_probability(model, images):
    places = ["park", "beach", "city"]
    of_each = [
        _scores(model, images, [[_ask("Where?", a, "multiple_choice", places)]] * 3, batch_size=4)
        for a in places
    ]
    np.testing.assert_allclose(np.sum(of_each, axis=0), 1, rtol=1e-5)
    assert np.ptp(of_each) > 0.01  # neither blind nor uniform


def test_a_score_is_the_weighted_mean_whatever_the_batches(model, images):
    yes, open_ = _ask("Is it?", "yes", "yes_no", weight=3.0), _ask("What?", "a hat", "open_ended")
    both = _scores(model, images, [[yes, open_], [yes], [open_]], batch_size=2)
    alone = [_scores(model, images, [[q]] * 3, batch_size=8) for q in (yes, open_)]
    expected = [(3 * alone[0][0] + alone[1][0]) / 4, alone[0][1], alone[1][2]]
    np.testing.assert_allclose(both, expected, rtol=1e-4)
    heaviest = _scores(model, images, [[open_, yes]] * 3, batch_size=8, max_questions=1)
    np.testing.assert_allclose(heaviest, alone[0], rtol=1e-5)


def test_it_is_what_the_model_says_step_by_step(model, images):
    """One picture and one question, read token by token with nothing batched or padded."""
    asked = _ask("Is it?", "yes", "yes_no")
    tokens, letters = CFG.special_tokens, _Letters()
    frame = lambda s: np.array([[tokens.bos, *letters.encode(s), tokens.eos]], np.int32)  # noqa: E731
    patches = patchify(np.asarray(images[1] * 2 - 1), LOOK.stride)
    side = LOOK.max_size // LOOK.stride
    grid = position_ids(side, side, CFG.vision.max_patches_per_side)
    cache = kv.prefill_vit(model, kv.empty(model, 1, 64), patches[None], grid[None], jnp.array([len(grid)]))
    cache = kv.prefill_text(model, cache, frame("Is it?"), jnp.array([8]))
    log_probs = []
    for answer in ("Yes.", "No."):  # as stage 1 taught answers
        ids = frame(answer)
        log_probs.append(float(text.token_log_probs(model, cache, ids, jnp.array([ids.shape[1]])).sum()))
    expected = 1 / (1 + np.exp(log_probs[1] - log_probs[0]))
    got = _scores(model, images[1:2], [[asked]], batch_size=4)[0]
    assert got == pytest.approx(expected, rel=1e-4)


def test_a_prompt_without_questions_is_asked_for_itself(model, images):
    fallback = _scores(model, images, [[], [], []], batch_size=4)
    asked = _ask("Does this image show: Tess?", "yes", "yes_no")
    np.testing.assert_allclose(fallback, _scores(model, images, [[asked]] * 3, batch_size=4), rtol=1e-5)
