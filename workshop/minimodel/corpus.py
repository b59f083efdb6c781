"""The pretraining corpus: thousands of unnamed characters, tokenised once, packed into batches by step.

``build`` turns seeds into a folder: pictures (uint8), and the token ids of every text, so that training
spends its time on the model. ``PretrainingData`` then draws batch n as a pure function of (seed, n): a fixed
mixture of tasks, laid out and collated by the same code as customisation data. A picture that is drawn
appears in several noised copies behind one caption (nobody but a noised image sees it), which makes captions
cheap.

Tasks here are those of customisation (captions, scenes, thinking, dialogue, questions); answers to questions
about facts get the description in the prompt, so the base learns to read and never to memorise. Describing a
picture whole names all ten attributes at once, which teaches to see faster than short answers do.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unichar_jax.config.model import ModelConfig
from unichar_jax.data import layout, templates
from unichar_jax.data.images import MINI_VIT_TRANSFORM, patchify, position_ids
from unichar_jax.data.tokenizer import Tokenizer
from unichar_jax.models.streams import Batch
from workshop.miniworld import unnamed

PICTURE_SIZE = 96
TASKS = (
    "caption",
    "partial_caption",
    "t2i",
    "t2i_with_thinking",
    "dialogue",
    "thinking",
    "vqa",
    "mcq",
    "knowledge",
    "describe",
    "knowledge_mcq",
    "yes_no",
)
LOOKED_AT = ("vqa", "yes_no", "mcq", "describe")
DRAWN = ("caption", "partial_caption", "t2i", "t2i_with_thinking")
CAPTION_DROPOUT = 0.1

DESCRIBE = ("What do you see?", "Describe the picture.", "What does the picture show?")
COPIES = 2
"""Noised copies of a drawn picture behind one caption."""


@dataclass(frozen=True)
class Stage:
    """What a batch is made of: samples of each task, rows, and their capacities.

    Rows are short, because the scores of a row cost its length squared; a sample that does not fit is left
    out. ``questions`` are asked of a picture one after another: an answer is a word or two, so a picture with
    one question would teach next to nothing.
    """

    mixture: dict[str, int]
    rows: int
    capacities: layout.Sizes
    questions: int = 8


PICTURES = Stage(
    dict(caption=28, partial_caption=4, describe=8, vqa=4, yes_no=4),
    rows=16,
    capacities=layout.Sizes(text=112, vit=25, latent=144),
    questions=3,
)
"""First: drawing, and a little looking; drawing takes longest to learn."""

LOOKING = Stage(
    dict(describe=30, vqa=5, yes_no=3, caption=12, partial_caption=2, dialogue=3),
    rows=16,
    capacities=layout.Sizes(text=184, vit=75, latent=72),
    questions=6,
)
"""Second: mostly describing pictures whole, which says ten things for the price of two answers."""

EVERYTHING = Stage(
    dict(
        caption=10,
        partial_caption=2,
        t2i=3,
        t2i_with_thinking=1,
        dialogue=6,
        describe=5,
        vqa=4,
        yes_no=5,
        mcq=2,
        knowledge=5,
        knowledge_mcq=2,
    ),
    rows=16,
    capacities=layout.Sizes(text=208, vit=25, latent=72),
)
"""Last: all tasks but plans in words, whose prompts are longer than a row and which customisation teaches."""


def texts_of(record: dict[str, Any]) -> dict[str, Any]:
    """Prompts and answers of one record by task, as strings."""
    r = record
    scene = (r["description"], r["user"], r["reply"])
    talks = [(r["user"], r["reply"]), *r["dialogue"]]
    out: dict[str, Any] = dict(
        caption=[r["caption"]],
        partial_caption=[r["partial_caption"]],
        dialogue=[
            (templates.dialogue(r["name"], r["description"], r["opening"] if i % 2 else "", u), m)
            for i, (u, m) in enumerate(talks)
        ],
        thinking=[
            (
                templates.thinking_prompt(*scene),
                templates.thinking_reply(r["thinking"], r["generation_instruction"]),
            )
        ],
        vqa=[(q["question"], q["answer"]) for q in r["vqa"] if q["type"] != "yes_no"],
        yes_no=[(q["question"], q["answer"]) for q in r["vqa"] if q["type"] == "yes_no"],
        mcq=[(templates.multiple_choice(q["question"], q["options"]), q["answer_key"]) for q in r["mcq"]],
        knowledge=[(f"{r['description']}\n\n{q['question']}", q["answer"]) for q in r["knowledge"]],
        describe=[(question, r["caption"]) for question in DESCRIBE],
        knowledge_mcq=[
            (
                f"{r['description']}\n\n{templates.multiple_choice(q['question'], q['options'])}",
                q["answer_key"],
            )
            for q in r["knowledge_mcq"]
        ],
    )
    if r["described"]:  # an undescribed name says nothing about the looks: nothing to learn
        out["caption"].append(r["t2i_instruction"])
        out["caption"].append(r["generation_instruction"])
        out["t2i"] = [templates.t2i(*scene)]
        out["t2i_with_thinking"] = [
            templates.t2i_with_thinking(*scene, r["thinking"], r["generation_instruction"])
        ]
    return out


def all_strings(record: dict[str, Any]) -> Iterator[str]:
    """Every string of a record, for training the tokenizer."""
    for items in texts_of(record).values():
        for item in items:
            yield from (item,) if isinstance(item, str) else item


def build(folder: str | Path, count: int, tokenizer: Tokenizer, first_seed: int = 0) -> None:
    """Writes ``pictures.npy`` (uint8 ``[count, 96, 96, 3]``) and ``texts.pkl`` for consecutive seeds."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (count, PICTURE_SIZE, PICTURE_SIZE, 3)
    pictures = np.lib.format.open_memmap(folder / "pictures.tmp.npy", "w+", np.uint8, shape)

    def encode(item: str | tuple[str, str]) -> Any:
        ids = tokenizer.encode_batch([item] if isinstance(item, str) else list(item))
        arrays = tuple(np.asarray(i, np.int16) for i in ids)
        return arrays[0] if isinstance(item, str) else arrays

    records = []
    for i in range(count):
        pictures[i] = unnamed.unnamed_picture(first_seed + i, PICTURE_SIZE)
        texts = texts_of(unnamed.unnamed_texts(first_seed + i))
        records.append({task: [encode(item) for item in items] for task, items in texts.items()})
    pictures.flush()
    (folder / "texts.tmp.pkl").write_bytes(pickle.dumps(records))
    (folder / "texts.tmp.pkl").rename(folder / "texts.pkl")
    (folder / "pictures.tmp.npy").rename(folder / "pictures.npy")


def add_moments(folder: str | Path, moments: Callable[[np.ndarray], tuple[Any, Any]]) -> None:
    """Writes ``moments.npy`` (float16 ``[count, 2, tokens, latent_dim]``), the autoencoder's posterior.

    Args:
      folder: of ``build``.
      moments: pictures float32 ``[n, 96, 96, 3]`` in [-1, 1] to mean and log-variance tokens.
    """
    folder = Path(folder)
    pictures = np.load(folder / "pictures.npy", mmap_mode="r")
    out = []
    for i in range(0, len(pictures), 64):
        pixels = pictures[i : i + 64].astype(np.float32) / 127.5 - 1
        out.append(np.stack([np.asarray(m, np.float16) for m in moments(pixels)], axis=1))
    np.save(folder / "moments.tmp.npy", np.concatenate(out))
    (folder / "moments.tmp.npy").rename(folder / "moments.npy")


@dataclass
class PretrainingData:
    """Endless host batches from a corpus folder; position is the number of batches given.

    Attributes:
      folder: of ``build`` and ``add_moments``.
      model: sizes and special tokens.
      stages: ``(first step, stage)``, in order.
      seed: of the mixture.
    """

    folder: Path
    model: ModelConfig
    stages: Sequence[tuple[int, Stage]] = ((0, EVERYTHING),)
    seed: int = 0
    position: int = 0

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self._pictures = np.load(self.folder / "pictures.npy", mmap_mode="r")
        self._moments = np.load(self.folder / "moments.npy", mmap_mode="r")
        self._records = pickle.loads((self.folder / "texts.pkl").read_bytes())
        side = PICTURE_SIZE // self.model.pixels_per_latent
        self._latent_grid = position_ids(side, side, self.model.max_latent_size)
        patches = MINI_VIT_TRANSFORM.max_size // self.model.vision.patch_size
        self._vit_grid = position_ids(patches, patches, self.model.vision.max_patches_per_side)
        self._by_task = {
            task: np.asarray([i for i, r in enumerate(self._records) if r.get(task)]) for task in TASKS
        }

    def __next__(self) -> Batch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def batch(self, n: int) -> Batch:
        """Batch n; samples are placed largest first, and the few that find no room are left out."""
        rng = np.random.default_rng((self.seed, n))
        stage = [stage for first, stage in self.stages if first <= n][-1]
        samples = [
            self._sample(task, rng, stage.questions) for task, k in stage.mixture.items() for _ in range(k)
        ]
        order = sorted(range(len(samples)), key=lambda i: -layout.sizes(samples[i]).total)
        rows: list[list[layout.Tokens]] = [[] for _ in range(stage.rows)]
        room = [stage.capacities] * stage.rows
        for i in order:
            size = layout.sizes(samples[i])
            fitting = [r for r in range(stage.rows) if size.fits(room[r])]
            if fitting:
                r = max(fitting, key=lambda r: room[r].total)
                rows[r].append(samples[i])
                room[r] = layout.Sizes(*(a - b for a, b in zip(room[r], size, strict=True)))
        return layout.collate(rows, stage.capacities, self.model)

    def _sample(self, task: str, rng: np.random.Generator, questions: int) -> layout.Tokens:
        index = int(rng.choice(self._by_task[task]))
        items = self._records[index][task]
        parts: list[layout.Part] = []
        if task in DRAWN:
            text = items[int(rng.integers(len(items)))]
            dropped = bool(rng.random() < CAPTION_DROPOUT)
            parts.append(layout.TextPart(text, droppable=True, dropped=dropped))
            mean, logvar = self._moments[index].astype(np.float32)
            parts += [
                layout.LatentPart(mean, logvar, self._latent_grid, timestep=float(rng.normal()))
                for _ in range(COPIES)
            ]
        elif task in LOOKED_AT:
            parts.append(self._look_at(index))
            k = questions if task in ("vqa", "yes_no") else 1
            for j in rng.permutation(len(items))[:k]:
                question, answer = items[int(j)]
                parts += [layout.TextPart(question), layout.TextPart(answer, loss=True)]
        else:
            prompt, answer = items[int(rng.integers(len(items)))]
            parts += [layout.TextPart(prompt), layout.TextPart(answer, loss=True)]
        return layout.lay_out(parts, self.model, task=TASKS.index(task))

    def _look_at(self, index: int) -> layout.VitPart:
        pixels = MINI_VIT_TRANSFORM(Image.fromarray(self._pictures[index]))
        return layout.VitPart(patchify(pixels, self.model.vision.patch_size), self._vit_grid)
