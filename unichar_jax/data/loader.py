"""Training batches: from characters and a ``DataConfig`` to packed numpy batches, step by step.

``make_loader`` reads the characters, tokenises every text, weighs the mixture, chooses capacities,
encodes the pictures that are to be drawn, and returns a ``Loader``: an endless iterator of this
process's rows of each global batch. Row r of step n is packed sequence ``n * global_batch + r`` of one
plan, and everything random in it is keyed by (seed, sequence), so batches depend neither on hosts nor
on workers, and the position is one number. Workers are Grain's; they only read the cache and copy.

The loader never samples the posterior or mixes noise (that is the step's, on the device), and leaves
no sample out without naming it in ``describe``.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unichar_jax.config.data import DataConfig
from unichar_jax.config.model import ModelConfig
from unichar_jax.data import capacities, layout, packing
from unichar_jax.data import tasks as tasks_lib
from unichar_jax.data.cache import ImageCache, MomentsFn, Picture, identify
from unichar_jax.data.character import ImageFile
from unichar_jax.data.images import position_ids
from unichar_jax.data.layout import Sizes
from unichar_jax.data.mixture import (
    Mixture,
    Recipe,
    Schedule,
    SourceKey,
    recipe_by_name,
    recipe_from_weights,
    resolve,
)
from unichar_jax.data.rolescape import find_characters, read_character, short_name
from unichar_jax.data.tokenizer import Tokenizer
from unichar_jax.data.transforms import Transforms
from unichar_jax.errors import UserError, did_you_mean
from unichar_jax.models.streams import Batch

# -- samples -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _ReadyPart:
    """A part with its text tokenised; its picture is still a file."""

    loss: bool
    droppable: bool
    ids: np.ndarray | None = None
    picture: Picture | None = None
    look: bool = False
    img_num: int = 1


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A sample whose sizes are known."""

    key: str
    sizes: Sizes
    parts: tuple[_ReadyPart, ...]


def _ready(samples: Sequence[tasks_lib.Sample], tokenizer: Tokenizer, transforms: Transforms) -> list[_Ready]:
    texts = [p.text for s in samples for p in s.parts if p.kind == "text"]
    ids = iter(tokenizer.encode_batch(texts))
    ready = []
    for sample in samples:
        img_num = sum(part.kind != "text" for part in sample.parts)
        total = Sizes(0, 0, 0)
        parts = []
        for part in sample.parts:
            if part.kind == "text":
                encoded = np.array(next(ids), np.int32)
                made = _ReadyPart(part.loss, part.droppable, encoded)
                total = total.plus(Sizes(2 + len(encoded), 0, 0))
            else:
                look = part.kind == "vit_image"
                transform = transforms.look if look else transforms.draw
                made = _ReadyPart(
                    part.loss,
                    part.droppable,
                    picture=part.image,
                    look=look,
                    img_num=img_num,
                )
                assert part.image is not None  # parts of pictures have one
                count = transform.tokens(part.image.width, part.image.height, img_num)
                total = total.plus(Sizes(2, count, 0) if look else Sizes(2, 0, count))
            parts.append(made)
        ready.append(_Ready(sample.key, total, tuple(parts)))
    return ready


def _shortened(
    samples: list[_Ready], cfg: DataConfig, left_out: dict[str, str]
) -> tuple[list[_Ready], tuple[str, ...]]:
    """The samples, those longer than a row treated as ``cfg.long_samples`` says, and what there is to tell.

    Raises:
      UserError: there are some and none may be cut or dropped, or one has too little text to be cut.
    """
    most, row = int(capacities.HIGH * cfg.tokens_per_row), f"a row {cfg.tokens_per_row}"
    longer = {} if cfg.capacities else {s.key: s.sizes.total for s in samples if s.sizes.total > most}
    if not longer:
        return samples, ()
    named = [f"{key} ({total:,} tokens)" for key, total in sorted(longer.items(), key=lambda x: -x[1])]
    told = ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")
    if cfg.long_samples == "raise":
        raise UserError(
            f"longer than a row of data.tokens_per_row {cfg.tokens_per_row}: {told}. Shorten them, raise"
            f" data.tokens_per_row to {max(longer.values())}, or set data.long_samples to cut (the end of the"
            " longest text) or drop."
        )
    if cfg.long_samples == "drop":
        left_out |= {key: f"it has {total} tokens, {row}" for key, total in longer.items()}
        return samples, ()
    cut = [_cut(s, longer[s.key] - cfg.tokens_per_row) if s.key in longer else s for s in samples]
    return cut, (f"cut at the end of their longest text, to {cfg.tokens_per_row} tokens: {told}",)


def _cut(sample: _Ready, excess: int) -> _Ready:
    """The sample with so many tokens fewer in its longest text."""
    texts = {i: len(part.ids) for i, part in enumerate(sample.parts) if part.ids is not None}
    at = max(texts, key=lambda i: texts[i])
    if texts[at] <= excess:
        raise UserError(
            f"{sample.key}: its pictures and other texts leave no room in a row; raise data.tokens_per_row, lower"
            " the sizes of pictures, or set data.long_samples to drop."
        )
    parts = list(sample.parts)
    parts[at] = dataclasses.replace(parts[at], ids=parts[at].ids[: texts[at] - excess])  # type: ignore[index]
    return _Ready(sample.key, sample.sizes.plus(Sizes(-excess, 0, 0)), tuple(parts))


def read_samples(cfg: DataConfig) -> list[tasks_lib.Sample]:
    """The training samples of the configured characters, for the tasks of the recipe.

    Raises:
      UserError: a character is not there, or its folder has errors.
    """
    folders = find_characters(Path(cfg.path), "train")
    if cfg.characters:
        known = {short_name(f): f for f in folders} | {f.name: f for f in folders}  # a folder's name wins
        for name in cfg.characters:
            if name not in known:
                raise UserError(
                    f"data.characters: '{name}' is not in {cfg.path}{did_you_mean(name, known)}; expected"
                    f" some of {', '.join(sorted(f.name for f in folders))}."
                )
        folders = tuple(dict.fromkeys(known[name] for name in cfg.characters))
    wanted = [task for group in _recipe(cfg).groups for task in group.tasks]
    characters = [read_character(folder) for folder in folders]
    return [s for c in characters for task in wanted for s in tasks_lib.samples(c, task)]


def _recipe(cfg: DataConfig) -> Recipe:
    return recipe_from_weights(cfg.tasks) if cfg.tasks else recipe_by_name(cfg.recipe)


# -- rows ----------------------------------------------------------------------------------------


class _Rows:
    """A Grain source: element i is this process's part of the batch that starts at ``first + i * stride``.

    Holds all that a worker needs; picklable.
    """

    def __init__(
        self,
        cfg: DataConfig,
        model: ModelConfig,
        transforms: Transforms,
        cache: ImageCache,
        sources: Sequence[Sequence[_Ready]],
        task_of: Sequence[int],
        planner: packing.Planner,
    ):
        self.cfg, self.model, self.transforms, self.cache = cfg, model, transforms, cache
        self.sources, self.task_of, self.planner = sources, task_of, planner
        self.first, self.stride, self.rows = 0, 1, range(1)

    def __len__(self) -> int:
        return 2**40  # endless for every purpose

    def __getitem__(self, index: int) -> Batch:
        start = self.first + int(index) * self.stride
        rows = [self.row(start + r) for r in self.rows]
        return layout.collate(rows, self.planner.capacities, self.model)

    def row(self, sequence: int) -> list[layout.Tokens]:
        """The samples of one packed sequence, laid out."""
        rng = np.random.default_rng([self.cfg.seed, 4, sequence])
        return [
            layout.lay_out(
                [self._part(part, rng) for part in self.sources[draw.source][draw.sample].parts],
                self.model,
                task=self.task_of[draw.source],
                reweight_text=self.cfg.reweight_text,
            )
            for draw in self.planner.sequence(sequence)
        ]

    def _part(self, part: _ReadyPart, rng: np.random.Generator) -> layout.Part:
        # each part takes its numbers whether it needs them or not, so that no setting shifts the rest
        chance, noise = rng.random(), rng.normal()
        dropped = part.droppable and chance < self.cfg.text_dropout
        if part.ids is not None:
            return layout.TextPart(part.ids, part.loss, part.droppable, dropped)
        assert part.picture is not None
        transform = self.transforms.look if part.look else self.transforms.draw
        width, height = transform.size(part.picture.width, part.picture.height, part.img_num)
        cells = (height // transform.stride, width // transform.stride)
        if part.look:
            patches = self.cache.patches(part.picture, transform, part.img_num)
            grid = position_ids(*cells, self.model.vision.max_patches_per_side)
            return layout.VitPart(patches, grid, part.droppable, dropped)
        mean, logvar = self.cache.moments(part.picture, transform, part.img_num)
        grid = position_ids(*cells, self.model.max_latent_size)
        timestep = self.cfg.timestep_mean + self.cfg.timestep_std * noise
        return layout.LatentPart(mean, logvar, grid, part.loss, timestep, part.droppable, dropped)


class Loader:
    """An endless iterator of this process's rows of each global batch; made by ``make_loader``.

    Attributes:
      capacities: tokens of a row in each stream.
      tasks: names of the tasks that ``task`` in a batch counts.
      mixture: weights of the sources.
      left_out: samples that no row can hold, by key, with the reason.
      planner: which samples a packed sequence holds.
      transforms: how pictures are prepared.
    """

    def __init__(
        self,
        rows: _Rows,
        tasks: tuple[str, ...],
        mixture: Mixture,
        left_out: Mapping[str, str],
        chosen: capacities.Capacities,
        global_batch: int,
        process_index: int,
        process_count: int,
    ):
        if global_batch % process_count:
            raise UserError(
                f"global batch {global_batch}: expected a multiple of the {process_count} processes;"
                " change data.rows_per_device or the number of hosts."
            )
        local = global_batch // process_count
        rows.rows = range(process_index * local, (process_index + 1) * local)
        rows.stride = global_batch
        self.tasks, self.mixture, self.left_out = tasks, mixture, left_out
        self.planner, self.capacities = rows.planner, chosen.sizes
        self.transforms = rows.transforms
        self._rows, self._trial, self._sequence = rows, chosen, 0
        self._fingerprint = _fingerprint(rows, mixture)
        self._iterator: Any = None  # Grain's

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        batch: Batch = next(self._iterator)
        self._sequence += self._rows.stride
        return batch

    def _start(self) -> Any:
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's workers ask for flags; this is no absl program
            flags.FLAGS.mark_as_parsed()
        self._rows.first = self._sequence
        workers = self._rows.cfg.workers
        data = grain.MapDataset.source(self._rows).to_iter_dataset(
            grain.ReadOptions(num_threads=1 if workers else 2, prefetch_buffer_size=2)
        )
        if workers:
            data = data.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
            )
        return iter(data)

    def state(self, batches_back: int = 0) -> dict[str, Any]:
        """The position after the batches taken so far, as JSON; the same in every process.

        Args:
          batches_back: count so many of them as not taken.
        """
        sequence = self._sequence - batches_back * self._rows.stride
        return {
            "sequence": sequence,
            "plan": self.planner.cursor(sequence),
            "data": self._fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, whatever the numbers of hosts and workers were.

        Raises:
          UserError: the data, the mixture or the capacities are not those of ``state``.
        """
        if state["data"] != self._fingerprint:
            raise UserError(
                "the training data changed since the checkpoint was written (samples, mixture, seed or"
                " capacities), so it cannot be continued exactly. Undo the change, start a new run from the"
                " checkpoint's weights, or go on with the data from its beginning: --allow-changes."
            )
        self.close()
        self._sequence = int(state["sequence"])
        self.planner.seek(state["plan"])

    def close(self) -> None:
        """Ends the workers; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()  # waits for them, so that their shared memory is given back
        self._iterator = None

    def describe(self) -> str:
        """What is trained on, for the log."""
        counts: collections.Counter[str] = collections.Counter()
        for key, source in zip(self.mixture.keys, self._rows.sources, strict=True):
            counts[key.task] += len(source)
        characters = dict.fromkeys(key.character for key in self.mixture.keys)
        weights = self.mixture.task_weights()
        lines = [f"data: {len(characters)} characters ({', '.join(characters)})"]
        lines += [
            f"  {task}: {counts[task]} samples, {100 * weight:.1f} % of what is seen"
            for task, weight in sorted(weights.items(), key=lambda item: -item[1])
        ]
        text, vit, latent = self.capacities
        lines.append(
            f"  rows of {self.capacities.total} tokens (text {text}, vit {vit}, latent {latent}),"
            f" about {100 * self._trial.fill:.0f} % full; {self._trial.limit} ends them"
        )
        lines += self._advice()
        lines += [f"  note: {note}" for note in self.mixture.notes]
        if self.left_out:
            lines.append(f"  left out, {len(self.left_out)} samples larger than a row:")
            lines += [f"    {key}: {why}" for key, why in self.left_out.items()]
        return "\n".join(lines)

    def _advice(self) -> list[str]:
        """Why rows stay partly empty, where they do."""
        if self._trial.fill >= 0.945:
            return []
        name = self._trial.emptiest
        room, used = getattr(self.capacities, name), self._trial.used[Sizes._fields.index(name)]
        return [
            f"  note: of {room} {name} tokens a row uses {used:.0f}: the budget must hold the largest sample,"
            f" and {self._trial.limit} is full before. {self._remedy()}"
        ]

    def _remedy(self) -> str:
        """The one setting that fills rows better, tried."""
        cfg = self._rows.cfg
        if cfg.capacities:
            return "Leave data.capacities out, so that they are derived."
        tried = {
            tokens: capacities.derive_capacities(
                self.mixture, self.planner.sizes, tokens, cfg.seed, cfg.window
            ).fill
            for tokens in (2 * cfg.tokens_per_row, 3 * cfg.tokens_per_row)
        }
        tokens, fill = max(tried.items(), key=lambda item: item[1])
        if fill < self._trial.fill + 0.01:
            return "Longer rows do not help; other sizes of pictures may (data.look_max, data.draw_max)."
        return f"data.tokens_per_row {tokens} would fill about {100 * fill:.0f} %."


def _fingerprint(rows: _Rows, mixture: Mixture) -> str:
    """Changes with anything that changes which texts and pictures come when."""
    told = hashlib.sha256()
    plan = (rows.cfg.seed, rows.cfg.window, tuple(rows.planner.capacities), mixture)
    told.update(repr(plan).encode())
    for ready in itertools.chain(*rows.sources):
        told.update(f"{ready.key} {ready.sizes}".encode())
        for part in ready.parts:
            if part.ids is not None:
                told.update(part.ids.tobytes())
            elif isinstance(part.picture, ImageFile):
                told.update(rows.cache.content(part.picture).encode())
    return told.hexdigest()[:16]


def make_loader(
    cfg: DataConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    moments: MomentsFn,
    *,
    process_index: int = 0,
    process_count: int = 1,
    global_batch: int = 1,
    samples: Sequence[tasks_lib.Sample] | None = None,
) -> Loader:
    """Prepares the data of an experiment.

    Args:
      cfg: what to load.
      model: sizes and special tokens.
      tokenizer: the model's.
      moments: the autoencoder's encoder, as in ``data.cache``.
      process_index, process_count: of this host's process.
      global_batch: rows of a step over all processes.
      samples: train on these instead of the characters in ``cfg.path``.

    Raises:
      UserError: a mistake in the configuration or the data.
    """
    transforms = Transforms.configured(cfg, model)
    found = read_samples(cfg) if samples is None else samples
    fixed = None if cfg.capacities is None else Sizes(*cfg.capacities)
    sources: dict[SourceKey, list[_Ready]] = {}
    left_out: dict[str, str] = {}
    prepared, notes = _shortened(_ready(found, tokenizer, transforms), cfg, left_out)
    for sample, ready in zip(found, prepared, strict=True):
        if ready.key in left_out:
            continue
        why = None if fixed is None else capacities.too_large(ready.sizes, fixed)
        if why:
            left_out[ready.key] = why
        else:
            sources.setdefault(SourceKey(sample.task, sample.character), []).append(ready)
    if left_out and not sources:
        limit = f"tokens_per_row {cfg.tokens_per_row}" if fixed is None else f"capacities {tuple(fixed)}"
        raise UserError(
            f"data.{limit}: no sample fits, {next(iter(left_out.items()))} for one;"
            " raise the capacities or lower the sizes of pictures."
        )
    sizes = {key: np.array([r.sizes for r in ready]) for key, ready in sources.items()}
    mixture = resolve(
        _recipe(cfg),
        {key: len(s) for key, s in sizes.items()},
        cfg.character_weights,
    )
    mixture = dataclasses.replace(mixture, notes=(*mixture.notes, *notes))
    ordered = [sizes[key] for key in mixture.keys]
    if fixed is None:
        chosen = capacities.derive_capacities(mixture, ordered, cfg.tokens_per_row, cfg.seed, cfg.window)
    else:
        chosen = capacities.try_capacities(mixture, ordered, fixed, cfg.seed, cfg.window)
    schedule = Schedule(mixture.keys, mixture.weights, [s.sum(axis=1) for s in ordered], cfg.seed)
    used = [sources[key] for key in mixture.keys]
    planner = packing.Planner(schedule, ordered, chosen.sizes, cfg.window)

    folder = Path(cfg.cache_dir).expanduser() if cfg.cache_dir else None
    to_draw = [
        (part.picture, transforms.draw, part.img_num)
        for source in used
        for ready in source
        for part in ready.parts
        if part.picture is not None and not part.look
    ]
    identity = identify(moments, 4 * model.pixels_per_latent) if to_draw else ""
    cache = ImageCache(folder, moments, identity)
    cache.warm(to_draw)

    tasks = tuple(dict.fromkeys(key.task for key in mixture.keys))
    task_of = [tasks.index(key.task) for key in mixture.keys]
    rows = _Rows(cfg, model, transforms, cache, used, task_of, planner)
    return Loader(rows, tasks, mixture, left_out, chosen, global_batch, process_index, process_count)
