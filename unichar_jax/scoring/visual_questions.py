"""Visual questions, answered by the model's own frozen understanding expert.

A question with choices is worth the probability of the expected answer among the choices: each choice is a
whole answer (``BOS choice EOS``, written as a sentence, as stage 1 taught answers: "Yes.") whose probability
the model gives after the picture and the question, and they are normalised among each other. That is a
number between 0 and 1 with a slope everywhere, where a generated answer is right or wrong by its spelling.
An open question has no choices to compare; its worth is the geometric mean of its answer's token
probabilities. A picture's score is the weighted mean over its questions; a prompt without questions is asked
whether the picture shows it.

No second model is needed: stage 2 never trains what understands, so the judge stays what stage 1 made of
it. It is a reward that a policy could learn to please; evaluation should ask somebody else.

Sources: yes/no probabilities as a reward, VQAScore (arXiv 2404.01291); UniCharacter (arXiv 2605.08129) for
the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.data.images import ImageTransform, position_ids
from unichar_jax.data.rl_prompts import RLQuestion
from unichar_jax.errors import UserError
from unichar_jax.models.autoencoder import patchify
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import text
from unichar_jax.sampling.cache import KVCache
from unichar_jax.scoring.base import ScoreContext, in_batches


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class _Asked:
    """One question to one picture, with its possible answers; the expected one is first."""

    picture: int
    question: str
    answers: tuple[str, ...]
    weight: float


def choices_of(question: RLQuestion) -> tuple[str, ...]:
    """Possible answers, the expected one first, each once whatever its case; one for an open question."""
    options = ("yes", "no") if question.type == "yes_no" else question.choices
    answers = {a.strip().lower(): a.strip() for a in reversed((question.answer, *options))}
    expected = question.answer.strip().lower()
    return (answers.pop(expected), *reversed(answers.values()))


def sentence(answer: str) -> str:
    """An answer as a dialogue has it: a capital at the beginning, a stop at the end."""
    answer = answer.strip()
    return answer[:1].upper() + answer[1:] + ("" if answer.endswith((".", "!", "?")) else ".")


def distinct(questions: Sequence[RLQuestion]) -> list[RLQuestion]:
    """Each question once, compared without case and spacing; questions without text or answer are dropped."""
    kept: dict[str, RLQuestion] = {}
    for q in questions:
        if q.question.strip() and q.answer.strip():
            kept.setdefault(" ".join(q.question.lower().split()), q)
    return list(kept.values())


class VisualQuestions:
    """See the module's docstring.

    Args:
      tokenizer: of the model, which is the context's.
      transform: how the model looks at pictures (``data.transforms``).
      batch_size: pictures, and answers, that are read at once.
      max_questions: at most so many for a picture, the weightiest first; 0 asks all.
      name: what weights and curves call it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        *,
        batch_size: int = 32,
        max_questions: int = 0,
        name: str = "visual_questions",
    ):
        self.name = name
        self._tokenizer, self._transform = tokenizer, transform
        self._batch_size, self._max_questions = batch_size, max_questions

    def __call__(self, images: jax.Array, context: ScoreContext) -> np.ndarray:
        model = context.model
        if model is None:
            raise UserError(f"reward term '{self.name}': there is no model to ask; only training gives one.")
        score = np.zeros(len(images))
        weight = np.zeros(len(images))
        asked = self._asked(context)
        for first in range(0, len(images), self._batch_size):
            here = [a for a in asked if first <= a.picture < first + self._batch_size]
            seen = self._look(model, images[first : first + self._batch_size])
            for a, worth in zip(here, self._worth(model, seen, here, first), strict=True):
                score[a.picture] += a.weight * worth
                weight[a.picture] += a.weight
        return (score / np.maximum(weight, 1e-9)).astype(np.float32)

    def _asked(self, context: ScoreContext) -> list[_Asked]:
        asked = []
        for i, prompt in enumerate(context.prompts):
            questions = distinct(context.questions[i]) if context.questions else []
            questions = sorted(questions, key=lambda q: -q.weight)[: self._max_questions or None]
            asked += [_Asked(i, q.question, choices_of(q), q.weight) for q in questions if q.weight > 0]
            if not questions:
                asked.append(_Asked(i, f"Does this image show: {prompt}?", ("yes", "no"), 1.0))
        return asked

    def _look(self, model: UnifiedModel, images: jax.Array) -> KVCache:
        """Contexts that hold the pictures, one row for each; a last batch is padded to full size."""
        transform, vision = self._transform, model.cfg.vision
        width, height = transform.size(images.shape[2], images.shape[1])
        rows, columns = height // transform.stride, width // transform.stride
        tokens = kv.bucket(rows * columns, 16)
        grid = np.pad(position_ids(rows, columns, vision.max_patches_per_side), (0, tokens - rows * columns))
        patches = in_batches(
            lambda x: _patches(x, (height, width), transform, tokens), images, self._batch_size
        )
        short = self._batch_size - len(images)
        patches = jnp.pad(patches, [(0, short), (0, 0), (0, 0)])
        batch = len(patches)
        empty = kv.empty(model, batch, tokens + 2)
        counts = jnp.full(batch, rows * columns, jnp.int32)
        return kv.prefill_vit(model, empty, patches, np.tile(grid, (batch, 1)), counts)

    def _worth(self, model: UnifiedModel, seen: KVCache, asked: Sequence[_Asked], first: int) -> list[float]:
        """Each question's worth; rows of a batch are answers, and questions are never split."""
        out: list[float] = []
        waiting: list[_Asked] = []
        for a in [*asked, None]:
            rows = sum(len(w.answers) for w in waiting)
            if waiting and (a is None or rows + len(a.answers) > self._batch_size):
                out += self._answer(model, seen, waiting, first)
                waiting = []
            if a is not None:
                waiting.append(a)
        return out

    def _answer(self, model: UnifiedModel, seen: KVCache, asked: Sequence[_Asked], first: int) -> list[float]:
        special = model.cfg.special_tokens
        frame = lambda s: special.frame(self._tokenizer.encode(s))  # noqa: E731
        rows = [(i, sentence(answer)) for i, a in enumerate(asked) for answer in a.answers]
        rows += [rows[-1]] * (self._batch_size - len(rows))
        # A question is read once for all of its answers; few sizes mean few compiled programs.
        questions = [(a.picture - first, a.question) for a in asked]
        questions += [questions[-1]] * (kv.bucket(len(questions), 8) - len(questions))
        question_ids, question_lengths = kv.padded([frame(q) for _, q in questions], 8)
        answers, answer_lengths = kv.padded([frame(a) for _, a in rows], 8)
        log_probs = np.asarray(
            _log_probs(
                model,
                seen,
                np.array([p for p, _ in questions], np.int32),
                question_ids,
                question_lengths,
                np.array([i for i, _ in rows], np.int32),
                answers,
                answer_lengths,
                kv.bucket(seen.capacity + question_ids.shape[1] + answers.shape[1]),
            ),
            np.float64,
        )
        out, row = [], 0
        for a in asked:
            of_choices = log_probs[row : row + len(a.answers)]
            if len(a.answers) == 1:
                out.append(float(np.exp(of_choices[0] / (answer_lengths[row] - 1))))
            else:
                relative = np.exp(of_choices - of_choices.max())
                out.append(float(relative[0] / relative.sum()))
            row += len(a.answers)
        return out


@jax.jit(static_argnames=("size", "transform", "tokens"))
def _patches(images: jax.Array, size: tuple[int, int], transform: ImageTransform, tokens: int) -> jax.Array:
    """Pictures ``[B, H, W, 3]`` in [0, 1] as padded patches ``[B, tokens, patch_dim]`` in [-1, 1]."""
    height, width = images.shape[1:3]
    if transform.square:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        images = images[:, top : top + side, left : left + side]
    shape = (images.shape[0], *size, 3)
    images = jnp.clip(jax.image.resize(images, shape, "cubic", antialias=True), 0, 1) * 2 - 1
    patches = patchify(images, transform.stride)
    return jnp.pad(patches, [(0, 0), (0, tokens - patches.shape[1]), (0, 0)])


@jax.jit(static_argnames="capacity")
def _log_probs(
    model: UnifiedModel,
    seen: KVCache,
    pictures: jax.Array,
    questions: jax.Array,
    question_lengths: jax.Array,
    asked: jax.Array,
    answers: jax.Array,
    answer_lengths: jax.Array,
    capacity: int,
) -> jax.Array:
    """Log-probability ``[R]`` of each answer (with its EOS) after its question ``asked`` and that one's picture."""
    cache = kv.grow(kv.take(seen, pictures), capacity)
    cache = kv.prefill_text(model, cache, questions, question_lengths)
    return text.token_log_probs(model, kv.take(cache, asked), answers, answer_lengths).sum(axis=1)
