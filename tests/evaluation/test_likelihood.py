"""The likelihood of an answer is what one plain pass over the whole sequence gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.errors import UserError
from unichar_jax.evaluation import likelihood
from unichar_jax.evaluation.likelihood import answer_log_probs
from unichar_jax.evaluation.subject import EngineSubject, Prompt
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling.engine import Engine, EngineConfig

CONTEXTS = ("one two three", "a much longer context of many words in a row", "six", "one two four")
ANSWERS = (["yes", "no no no"], ["perhaps"], ["some words here", "x", "y z"], ["yes", "no no no"])


@pytest.fixture(scope="module")
def engine(model, autoencoder, tokenizer):
    with Engine(model, autoencoder, tokenizer, EngineConfig(max_batch=4, max_context=200)) as engine:
        yield engine


def in_one_pass(model, sequences, length=48):
    """Log-probabilities of every next token of whole sequences, padded to one length."""
    lengths = jnp.array([len(s) for s in sequences])
    ids = jnp.asarray([[*s, *[0] * (length - len(s))] for s in sequences], jnp.int32)

    @jax.jit
    def read(model):
        hidden, _ = kv.read_text(model, kv.empty(model, len(sequences), length), ids, lengths)
        return jax.nn.log_softmax(model.logits(hidden), axis=-1)

    every = np.asarray(read(model))
    return [
        np.array([every[row, i, token] for i, token in enumerate(sequence[1:])])
        for row, sequence in enumerate(sequences)
    ]


def test_equals_one_pass_over_the_sequence(engine, model, tokenizer):
    """Contexts of several lengths, one to three answers each, in batches of four."""
    special, encode = model.cfg.special_tokens, tokenizer.encode
    found = answer_log_probs(engine, [[engine.parts.text(c)] for c in CONTEXTS], ANSWERS)
    assert [len(f) for f in found] == [len(a) for a in ANSWERS]
    sequences = [
        [special.bos, *encode(context), special.eos, special.bos, *encode(answer), special.eos]
        for context, answers in zip(CONTEXTS, ANSWERS, strict=True)
        for answer in answers
    ]
    flat = [score for scores in found for score in scores]
    for score, expected in zip(flat, in_one_pass(model, sequences), strict=True):
        np.testing.assert_allclose(score, expected[-len(score) :], rtol=1e-4, atol=1e-4)


def test_pictures_are_read_before_the_question(engine, pip):
    subject, pictures = EngineSubject(engine), pip.train.images
    prompts = [Prompt("six", pictures[0].path), Prompt("six", pictures[1].path), Prompt("six")]
    one, other, blind = (s[0] for s in subject.log_probs(prompts, [["x"]] * 3))
    assert not np.allclose(one, other, atol=1e-4)
    assert not np.allclose(one, blind, atol=1e-4)


def test_a_picture_is_read_once_for_all_of_its_questions(engine, pip, monkeypatch):
    subject, picture = EngineSubject(engine), pip.train.images[0].path
    prompts, answers = [Prompt(text, picture) for text in ("one", "two", "six")], [["x", "y"]] * 3
    expected = subject.log_probs(prompts, answers)
    reads, prefill = [], kv.prefill_vit

    def counted(model, cache, patches, grid, counts):
        reads.append(int(np.sum(np.asarray(counts) > 0)))
        return prefill(model, cache, patches, grid, counts)

    monkeypatch.setattr(likelihood, "_WORTH_SHARING", 1)
    monkeypatch.setattr(kv, "prefill_vit", counted)
    shared = subject.log_probs(prompts, answers)
    assert sum(reads) == 1
    for found, alone in zip(shared, expected, strict=True):
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)


def test_too_long_says_so(engine):
    with pytest.raises(UserError, match="at most 200"):
        EngineSubject(engine).log_probs([Prompt("word " * 150)], [["yes"]])
