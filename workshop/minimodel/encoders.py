"""Trains the mini world's scorers and its judge, all small and from scratch.

    python -m workshop.minimodel.encoders judge --minutes 15
    python -m workshop.minimodel.encoders image --minutes 15
    python -m workshop.minimodel.encoders text --minutes 15

``judge`` reads attributes: cross-entropy for each. ``image`` (identity) learns that the cosine of two
pictures is the share of look attributes that their characters have in common. ``text`` is CLIP with hard
negatives: captions of the same picture with one attribute changed. Both read attributes too, through heads
that are thrown away: contrasts alone learn to see slowly. Pictures are worn as a generator wears
them (``worn``): blurred, noised, shifted, or gone through the autoencoder with noise on the latents. The
judge has its own seed and pictures. Files and measured accuracies go to the mini model's folder; a run
resumes in ``--work``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from unichar_jax.checkpoint.encoders import load_clip
from unichar_jax.errors import UserError
from unichar_jax.evaluation.judge import AttributeJudge, Judge, Network, load_judge
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.encoders.clip import Clip
from unichar_jax.models.encoders.dinov2 import Dinov2
from unichar_jax.models.encoders.transformer import unit
from unichar_jax.scoring.features import ImageEncoder
from unichar_jax.scoring.folder import EncoderFolder
from workshop.minimodel import files
from workshop.minimodel.autoencoder import load_weights
from workshop.minimodel.small import (
    Budget,
    Metrics,
    Pool,
    Weights,
    fit,
    picture_pool,
    to_float,
    to_pixels,
)
from workshop.miniworld import texts
from workshop.miniworld.profiles import made_up_name
from workshop.miniworld.texts import SAID
from workshop.miniworld.world import ATTRIBUTES, LOOK_VALUES, SCENE_VALUES, Look, Scene

LOOKS = len(LOOK_VALUES)
HELD_OUT_SEED = 1_000_005


@dataclasses.dataclass(frozen=True)
class EncoderTraining:
    """Settings of one run."""

    what: tyro.conf.Positional[Literal["judge", "image", "text"]]
    """Which one to train."""
    out: Path = Path("checkpoints/mini")
    """The mini model's folder: has ae.safetensors, receives the weights and logs."""
    work: Path = Path("cache/encoders")
    """Folder of resumable states, one folder for each."""
    pool: Path = Path("cache/pool")
    """Folder of the drawn pictures."""
    start: Path | None = None
    """The judge only: a folder whose judge goes on learning, from a fresh optimizer; by default from nothing."""
    minutes: float = 15.0
    pictures: int = 16_000
    batch: int = 48
    learning_rate: float = 2e-3
    report_minutes: float = 2.0

    def __post_init__(self) -> None:
        if self.start and self.what != "judge":
            raise UserError(
                f"--start {self.start}: only the judge goes on from another; leave it out for '{self.what}'."
            )

    @property
    def seed(self) -> int:
        """The judge never sees what the scorers saw."""
        return {"judge": 77, "image": 5, "text": 5}[self.what]

    @property
    def all_looks(self) -> bool:
        """The judge must read the cast; what gives rewards knows it no better than the base does."""
        return self.what == "judge"


# -- pictures as a generator spoils them ---------------------------------------------------------------


def round_trip(
    model: Autoencoder, pictures: np.ndarray, noise: float, seed: int, batch: int = 16
) -> np.ndarray:
    """uint8 pictures through the autoencoder, each with latent noise of 0 to ``noise`` deviations."""

    @jax.jit
    def run(model: Autoencoder, images: jax.Array, key: jax.Array) -> jax.Array:
        z = model.encode(images)
        strength, kind = jax.random.split(key)
        amount = noise * z.std() * jax.random.uniform(strength, (len(z), 1, 1, 1))
        return model.decode(z + amount * jax.random.normal(kind, z.shape))

    out = np.empty_like(pictures)
    for i in range(0, len(pictures), batch):
        part = pictures[i : i + batch]
        key = jax.random.fold_in(jax.random.key(seed), i)
        out[i : i + batch] = to_pixels(run(model, to_float(part), key))
    return out


def reconstructed_pool(cfg: EncoderTraining, pool: Pool, noise: float, name: str) -> np.ndarray:
    """The pictures of a pool through the autoencoder; made once for each autoencoder."""
    weights = cfg.out / "ae.safetensors"
    path = cfg.work / f"{name}-{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        model = load_weights(weights)
        np.save(path, round_trip(model, np.asarray(pool.pictures), noise, cfg.seed))
    return np.load(path, mmap_mode="r")


def worn(images: jax.Array, key: jax.Array) -> jax.Array:
    """Images in [-1, 1], each shifted by up to 3 px, perhaps blurred, perhaps noised, of other contrast."""
    b, side = images.shape[:2]
    shift_key, blur_key, noise_key, amount_key, contrast_key = jax.random.split(key, 5)
    shifts = jax.random.randint(shift_key, (b, 2), 0, 7)
    padded = jnp.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    images = jax.vmap(lambda x, s: jax.lax.dynamic_slice(x, (s[0], s[1], 0), (side, side, 3)))(padded, shifts)

    rows = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
    blurred = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
    mix = jnp.maximum(jax.random.uniform(blur_key, (b, 1, 1, 1), minval=-1.0), 0)
    images = images + mix * (blurred - images)

    amount = 0.15 * jnp.maximum(jax.random.uniform(amount_key, (b, 1, 1, 1), minval=-1.0), 0)
    images = images + amount * jax.random.normal(noise_key, images.shape)
    return images * jax.random.uniform(contrast_key, (b, 1, 1, 1), minval=0.9, maxval=1.1)


class Pictures:
    """Draws batches from a pool: two thirds drawings, one third reconstructions of its first quarter.

    Each character of the pool is in two pictures that follow one another.
    """

    def __init__(self, cfg: EncoderTraining):
        looks = "-all" if cfg.all_looks else ""
        self.pool = picture_pool(cfg.pool, cfg.pictures, cfg.seed, scenes=2, all_looks=cfg.all_looks)
        held = picture_pool(cfg.pool, 1024, HELD_OUT_SEED, scenes=2, all_looks=cfg.all_looks)
        quarter = cfg.pictures // 8 * 2
        part = Pool(self.pool.pictures[:quarter], self.pool.labels[:quarter])
        self.worn = reconstructed_pool(cfg, part, 0.5, f"worn-{cfg.seed}-{quarter}{looks}")
        self.held_out = {
            "drawn": Pool(np.asarray(held.pictures), held.labels),
            "reconstructed": Pool(reconstructed_pool(cfg, held, 0.0, f"held-out{looks}"), held.labels),
        }

    def take(self, rng: np.random.Generator, count: int, *, pairs: bool = False) -> tuple[np.ndarray, ...]:
        """Pictures uint8 ``[count, S, S, 3]`` and labels; ``pairs``: neighbours show the same character."""
        together = 2 if pairs else 1
        first = rng.integers(len(self.pool.labels) // together, size=count // together)
        in_quarter = rng.random(len(first)) < 1 / 2
        first = np.where(in_quarter, first % (len(self.worn) // together), first)
        index = (first[:, None] * together + np.arange(together)).reshape(-1)
        from_worn = np.repeat(in_quarter, together) & (rng.random(count) < 2 / 3)
        chosen = zip(from_worn, index, strict=True)
        pictures = np.stack([(self.worn if w else self.pool.pictures)[i] for w, i in chosen])
        return pictures, self.pool.labels[index]


# -- the judge -----------------------------------------------------------------------------------------------


def _filled(declared: Any, weights: Weights) -> Any:
    return params.map_named(lambda name, _: weights[name], declared)


def reading_heads(width: int, attributes: Mapping[str, Sequence[str]]) -> Weights:
    """A linear head ``[width, values]`` for each attribute: they help to see, and are thrown away."""
    return {f"heads.{name}.kernel": jnp.zeros((width, len(values))) for name, values in attributes.items()}


def readings(features: jax.Array, weights: Weights, attributes: Iterable[str]) -> dict[str, jax.Array]:
    """Logits of ``reading_heads`` from unit features ``[B, width]``."""
    return {n: 16.0 * features @ weights[f"heads.{n}.kernel"] for n in attributes}


def attribute_loss(logits: dict[str, jax.Array], labels: jax.Array) -> jax.Array:
    """Cross-entropy, summed over attributes; labels ``[B, 10]`` in the order of ``ATTRIBUTES``."""
    names = list(ATTRIBUTES)
    logs = [jax.nn.log_softmax(logits[name]) for name in logits]
    picked = [
        jnp.take_along_axis(log, labels[:, [names.index(name)]], axis=-1)
        for name, log in zip(logits, logs, strict=True)
    ]
    return -jnp.concatenate(picked, axis=-1).sum(axis=-1).mean()


def train_judge(cfg: EncoderTraining) -> dict[str, Any]:
    pictures, declared = Pictures(cfg), Network(files.JUDGE)

    def loss_fn(weights: Weights, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        logits = _filled(declared, weights)(worn(to_float(batch[0]), key))
        loss = attribute_loss(logits, batch[1])
        return loss, {"cross_entropy": loss}

    def batch_fn(rng: np.random.Generator, progress: float) -> Any:
        return pictures.take(rng, cfg.batch)

    def accuracies(weights: Weights, count: int) -> dict[str, dict[str, float]]:
        judge = AttributeJudge(_filled(declared, weights), SAID, files.PREPROCESS)
        return {k: attribute_accuracy(judge, p, count) for k, p in pictures.held_out.items()}

    def evaluate(weights: Weights) -> dict[str, float]:
        return {kind: found["mean"] for kind, found in accuracies(weights, 256).items()}

    folder = cfg.out / files.JUDGE_FOLDER
    begun = params.initialize(declared, cfg.seed)
    if cfg.start:
        begun = load_judge(cfg.start / files.JUDGE_FOLDER).network
    start = {n: x.astype(jnp.float32) for n, x in params.flat(begun).items()}
    state = fit(_budget(cfg), start, loss_fn, batch_fn, evaluate)
    files.save_judge(folder, _filled(declared, state.average))
    judge = load_judge(folder)  # as it is on disk, in bfloat16
    return {kind: attribute_accuracy(judge, p, 1024) for kind, p in pictures.held_out.items()}


def attribute_accuracy(judge: Judge, pool: Pool, count: int) -> dict[str, float]:
    """Share of right readings for each attribute, and their mean."""
    probabilities = judge.read(np.asarray(pool.pictures[:count]))
    right = {
        name: float((p.argmax(axis=-1) == pool.labels[:count, i]).mean())
        for i, (name, p) in enumerate(probabilities.items())
    }
    return {"mean": float(np.mean(list(right.values()))), **right}


# -- identity ------------------------------------------------------------------------------------------------


def shared_looks(labels: jax.Array) -> jax.Array:
    """Labels ``[B, 10]`` to the share of the six look attributes that each two have in common, ``[B, B]``."""
    looks = labels[:, :LOOKS]
    return (looks[:, None] == looks[None]).mean(axis=-1)


def train_image(cfg: EncoderTraining) -> dict[str, Any]:
    pictures, declared = Pictures(cfg), Dinov2(files.DINOV2)
    heads = reading_heads(files.DINOV2.transformer.hidden_size, LOOK_VALUES)

    def loss_fn(weights: Weights, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        features = unit(_filled(declared, weights)(worn(to_float(batch[0]), key)))
        similarity = jnp.square(features @ features.T - shared_looks(batch[1]))
        similarity = similarity.sum() / (len(features) * (len(features) - 1))
        reading = attribute_loss(readings(features, weights, LOOK_VALUES), batch[1])
        return 20.0 * similarity + reading / LOOKS, {"similarity": similarity, "cross_entropy": reading}

    def batch_fn(rng: np.random.Generator, progress: float) -> Any:
        return pictures.take(rng, cfg.batch, pairs=True)

    def evaluate(weights: Weights) -> dict[str, float]:
        encode = ImageEncoder(_filled(declared, weights), Dinov2.__call__, files.PREPROCESS)
        return identity_measures(encode, pictures.held_out["drawn"], 256)

    start = {**params.flat(params.initialize(declared, cfg.seed)), **heads}
    state = fit(_budget(cfg), start, loss_fn, batch_fn, evaluate)
    files.save_dinov2(cfg.out / files.IMAGE_ENCODER, _filled(declared, state.average))
    encode = EncoderFolder(cfg.out).identity
    return {kind: identity_measures(encode, pool, 1024) for kind, pool in pictures.held_out.items()}


def identity_measures(encode: Callable[[Any], Any], pool: Pool, count: int) -> dict[str, float]:
    """How well features tell characters apart; pictures 2i and 2i + 1 of the pool show the same one.

    ``same`` and ``other`` are mean cosines, ``correlation`` is that of cosines with shares of common looks,
    ``found`` is how often the other picture of a character is the nearest among all.
    """
    features = np.asarray(encode(np.asarray(pool.pictures[:count]) / np.float32(255)))
    cosines, shares = features @ features.T, np.asarray(shared_looks(pool.labels[:count]))
    off = ~np.eye(count, dtype=bool)
    partner = np.arange(count) ^ 1
    nearest = np.where(off, cosines, -2).argmax(axis=-1)
    return {
        "found": float((nearest == partner).mean()),
        "same": float(cosines[np.arange(count), partner].mean()),
        "other": float(cosines[off & (shares < 1)].mean()),
        "correlation": float(np.corrcoef(cosines[off], shares[off])[0, 1]),
    }


# -- text and image ------------------------------------------------------------------------------------------


def caption(labels: np.ndarray, rng: np.random.Generator, kind: float) -> str:
    """A caption of what labels ``[10]`` say; ``kind`` in [0, 1) chooses full, partial, or named captions."""
    values = {n: ATTRIBUTES[n][int(i)] for n, i in zip(ATTRIBUTES, labels, strict=True)}
    scene = Scene(**{n: values[n] for n in SCENE_VALUES})
    if kind >= 0.8:
        return texts.named_caption(made_up_name(rng), scene, rng)
    look = Look(**{n: values[n] for n in LOOK_VALUES})
    return (texts.full_caption if kind < 0.5 else texts.partial_caption)(look, scene, rng)


def changed(labels: np.ndarray, attribute: int, rng: np.random.Generator) -> np.ndarray:
    """Labels with another value of one attribute; the three colours of a look stay different."""
    names = list(ATTRIBUTES)
    colours = {labels[names.index(n)] for n in ("colour", "belly", "accessory_colour")}
    taken = colours if "colour" in names[attribute] or names[attribute] == "belly" else {labels[attribute]}
    free = [v for v in range(len(ATTRIBUTES[names[attribute]])) if v not in taken]
    out = labels.copy()
    out[attribute] = rng.choice(free)
    return out


def captions(labels: np.ndarray, rng: np.random.Generator, negatives: int) -> list[list[str]]:
    """For each row of labels: its caption, then ``negatives`` captions that differ in one attribute."""
    rows = []
    for row in labels:
        kind, seed = rng.random(), int(rng.integers(2**31))
        say = lambda x, kind=kind, seed=seed: caption(x, np.random.default_rng(seed), kind)  # noqa: E731
        true = say(row)
        stated = [i for i in range(len(row)) if say(changed(row, i, rng)) != true]
        chosen = rng.choice(stated, size=negatives)
        rows.append([true, *(say(changed(row, i, rng)) for i in chosen)])
    return rows


def train_text(cfg: EncoderTraining, negatives: int = 3) -> dict[str, Any]:
    pictures, declared = Pictures(cfg), Clip(files.CLIP)

    def loss_fn(weights: Weights, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        model = _filled(declared, weights)
        images = model.encode_images(worn(to_float(batch[0]), key))
        words = batch[1]
        n = len(images)
        text = model.encode_texts(words.reshape(-1, words.shape[-1])).reshape(n, 1 + negatives, -1)
        scale = jnp.exp(jnp.minimum(model.logit_scale[...], 4.0))
        among = scale * images @ text[:, 0].T
        hard = scale * jnp.einsum("nd,nkd->nk", images, text[:, 1:])
        own = jnp.diag(among)
        by_image = jax.nn.logsumexp(jnp.concatenate([among, hard], axis=1), axis=1) - own
        by_text = jax.nn.logsumexp(among, axis=0) - own
        right = (own > hard.max(axis=1)).mean()
        reading = attribute_loss(readings(images, weights, ATTRIBUTES), batch[2])
        contrastive = (by_image + by_text).mean()
        loss = contrastive + reading / len(ATTRIBUTES)
        return loss, {"contrastive": contrastive, "right": right, "cross_entropy": reading}

    def batch_fn(rng: np.random.Generator, progress: float) -> Any:
        taken, labels = pictures.take(rng, cfg.batch)
        rows = captions(labels, rng, negatives)
        words = files.tokenize([text for row in rows for text in row])
        return taken, words.reshape(cfg.batch, 1 + negatives, -1), labels

    def evaluate(weights: Weights) -> dict[str, float]:
        return text_measures(_filled(declared, weights), pictures.held_out["drawn"], 256)

    heads = reading_heads(files.CLIP.projection_dim, ATTRIBUTES)
    start = {**params.flat(params.initialize(declared, cfg.seed)), **heads}
    start["logit_scale"] = jnp.asarray(np.log(10.0), jnp.float32)
    state = fit(_budget(cfg), start, loss_fn, batch_fn, evaluate)
    folder = cfg.out / files.TEXT_IMAGE
    files.save_clip(folder, _filled(declared, state.average))
    model = load_clip(folder)
    return {kind: text_measures(model, pool, 1024) for kind, pool in pictures.held_out.items()}


def text_measures(model: Clip, pool: Pool, count: int) -> dict[str, float]:
    """How well texts and pictures are matched.

    ``found``: the own full caption is the nearest of all ``count``. For each attribute: the true full
    caption is nearer than the same words with another value of that attribute (chance 0.5);
    ``one_changed`` is their mean.
    """
    rng = np.random.default_rng(HELD_OUT_SEED)
    labels = pool.labels[:count]
    look = ImageEncoder(model, Clip.encode_images, files.PREPROCESS)
    images = np.asarray(look(np.asarray(pool.pictures[:count]) / np.float32(255)))
    encode = jax.jit(Clip.encode_texts)

    def features(sentences: list[str]) -> np.ndarray:
        words = files.tokenize(sentences)
        return np.concatenate([np.asarray(encode(model, words[i : i + 64])) for i in range(0, count, 64)])

    true = features([caption(row, np.random.default_rng(i), 0.0) for i, row in enumerate(labels)])
    own = (images * true).sum(axis=-1)
    measures = {"found": float(((images @ true.T).argmax(axis=-1) == np.arange(count)).mean())}
    for a, name in enumerate(ATTRIBUTES):
        false = [caption(changed(r, a, rng), np.random.default_rng(i), 0.0) for i, r in enumerate(labels)]
        measures[name] = float((own > (images * features(false)).sum(axis=-1)).mean())
    measures["one_changed"] = float(np.mean([measures[name] for name in ATTRIBUTES]))
    return measures


# -- files and the command -----------------------------------------------------------------------------------


def _budget(cfg: EncoderTraining) -> Budget:
    work = cfg.work / cfg.what
    return Budget(work, cfg.minutes, cfg.learning_rate, report_minutes=cfg.report_minutes, seed=cfg.seed)


def main() -> None:
    cfg = tyro.cli(EncoderTraining)
    if not (cfg.out / "ae.safetensors").is_file():
        raise UserError(
            f"{cfg.out / 'ae.safetensors'}: file not found. The encoders learn from its reconstructions too;"
            " train it first: python -m workshop.minimodel.autoencoder"
        )
    train = {"judge": train_judge, "image": train_image, "text": train_text}[cfg.what]
    measured = train(cfg)
    logs = cfg.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / f"{cfg.what}.json").write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
    shutil.copyfile(cfg.work / cfg.what / "log.jsonl", logs / f"{cfg.what}.jsonl")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
