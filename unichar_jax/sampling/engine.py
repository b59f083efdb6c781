"""The engine: one loaded model that answers and draws for any number of callers.

Requests are checked in the caller's thread (a mistake is an error there and then, and never reaches a
batch), queued, and run in batches by one thread. Shapes are padded to buckets, so that a long session
compiles a bounded number of programs; what was read once is not read again (``context.Reader``). A result
depends on its own request and seed, not on what shared its batch.

One base plays any number of characters, each a low-rank addition to it (``add_character``), and a request
names the one that it wants. Adapters are arguments of the compiled programs, padded to one rank, and the
base's arrays are held once: another character costs its adapters, and switching costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from PIL import Image

from unichar_jax.config.compute import Compute
from unichar_jax.data import templates
from unichar_jax.data.transforms import Transforms
from unichar_jax.errors import UserError
from unichar_jax.models.autoencoder import Autoencoder, decoding_in
from unichar_jax.models.kernels import choice
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import context, flow, pixels, text
from unichar_jax.sampling.batching import Batcher, Job, gather
from unichar_jax.sampling.cache import bucket
from unichar_jax.sampling.context import Part
from unichar_jax.sampling.flow import Contexts, FlowSettings, Guidance
from unichar_jax.sampling.parts import ImageLike, PartMaker, Size, open_picture
from unichar_jax.sampling.requests import ImageRequest, TextRequest
from unichar_jax.sampling.roster import BASE, Roster
from unichar_jax.sampling.text import TextSettings, Tokenizer
from unichar_jax.sampling.tracing import jitted

EDITING = FlowSettings(guidance=Guidance(4.0, 2.0, interval=(0.0, 1.0), renorm="text_channel"))
"""How a given picture is changed, BAGEL's defaults."""


@dataclass(frozen=True)
class EngineConfig:
    """Bounds and habits of an engine.

    Attributes:
      max_batch: rows that run together.
      max_queue: requests that wait.
      max_context: tokens of a context and of what follows it.
      remembered: tokens kept for contexts that begin alike; each takes ``2 * layers * kv_heads * head_dim``
        numbers.
      as_shipped: follow the reference's inference code where it departs from its own training data: the
        prompts that ask for a plan, and the size of pictures that are looked at. Only for comparing with its
        results.
      picture_dtype: in which the autoencoder's convolutions multiply when a picture is made, "float32" or
        "bfloat16" (``autoencoder.decoding_in``); None: the model's own.
    """

    max_batch: int = 8
    max_queue: int = 64
    max_context: int = 16_384
    remembered: int = 16_384
    as_shipped: bool = False
    picture_dtype: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 1), ("max_queue", 1), ("max_context", 1), ("remembered", 0)):
            if getattr(self, name) < least:
                raise UserError(f"engine.{name}: expected at least {least}, got {getattr(self, name)}.")
        if self.picture_dtype not in (None, "float32", "bfloat16"):
            raise UserError(
                f"engine.picture_dtype: expected float32 or bfloat16, got '{self.picture_dtype}'."
            )


@jitted
def _rows(contexts: Contexts, index: jax.Array) -> Contexts:
    """Contexts of the pictures of a batch from those of their prompts."""
    is_cache = lambda c: isinstance(c, kv.KVCache)  # noqa: E731
    return jax.tree.map(lambda c: kv.take(c, index), contexts, is_leaf=is_cache)


@jitted(static_argnames=("grid", "width"))
def _noise(seeds: jax.Array, *, grid: flow.Grid, width: int) -> jax.Array:
    return flow.draw_noise(flow.row_keys(seeds), 0, grid, width)


class Engine:
    """A model that is ready to answer and to draw. Thread-safe. Close it, or use it in a ``with``.

    Args:
      model: the base model, named "base"; ``add_character`` adds others.
      autoencoder: of the same model; needed for pictures that are drawn or changed.
      tokenizer: of the same model.
      config: bounds and habits.
      transforms: how pictures are prepared; by default as is usual for models of this size.
    """

    def __init__(
        self,
        model: UnifiedModel,
        autoencoder: Autoencoder | None,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        transforms: Transforms | None = None,
    ):
        self.config = config or EngineConfig()
        self.cfg = model.cfg
        self._roster = Roster(model)
        if autoencoder is not None:
            autoencoder = decoding_in(autoencoder, self.config.picture_dtype or model.compute.dtype)
        self.parts = PartMaker(
            model.cfg,
            tokenizer,
            autoencoder,
            transforms or Transforms.usual(model.cfg),
            self.config.as_shipped,
        )
        self._reader = context.Reader(self.config.remembered)
        self._batcher = Batcher(self._run, self.config.max_batch, self.config.max_queue)

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: EngineConfig | None = None,
        compute: Compute | None = None,
        item: str | None = None,
        weights: Literal["int8"] | None = None,
    ) -> Engine:
        """Loads a BAGEL directory, a model directory or a training step, with what lies beside it: a run's own
        sizes of pictures, too.

        ``item`` chooses among a training step's weights, and ``weights`` makes them small, as in
        ``checkpoint.store.load_model``.
        """
        from unichar_jax.checkpoint import store  # reading checkpoints takes long to import
        from unichar_jax.data.tokenizer import load_tokenizer

        compute = compute or Compute(attention="auto")
        # As long as a picture of 1,024 pixels with its prompt.
        choice.settle(compute, store.load_config(path).decoder, 4_608)
        model = store.load_model(path, compute=compute, dtype=compute.jax_dtype, item=item, weights=weights)
        tokenizer = load_tokenizer(store.config_folder(path), model.cfg)
        return cls(model, store.load_autoencoder(path), tokenizer, config, Transforms.of_folder(path))

    def close(self) -> None:
        """Cancels waiting requests and stops; running ones end first."""
        self._batcher.close()

    def together(self) -> AbstractContextManager[None]:
        """Requests submitted inside start when all are queued: equal calls then run in equal batches.

        Take results outside of it, where the engine can work.
        """
        return self._batcher.together()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- models ---------------------------------------------------------------------------------------------

    @property
    def models(self) -> Mapping[str, UnifiedModel]:
        """Who answers, by the name that requests give."""
        return self._roster.models

    def add_model(self, name: str, model: UnifiedModel) -> None:
        """Serves another whole model of the same sizes under ``name``, which must be new."""
        self._roster.add_model(name, model)

    def add_character(self, name: str, adapters: str | Path | Mapping[str, jax.Array]) -> None:
        """Serves the base with adapters around it under ``name``, which must be new.

        A character with adapters in more places or of a larger rank than those before it makes the engine
        compile anew, once: add characters before the first request.

        Args:
          name: that requests give as ``model``.
          adapters: a folder (``checkpoint.lora``), or stacked arrays by name, as ``checkpoint.lora.load``
            gives them.

        Raises:
          UserError: the name is taken, or the folder's adapters are not for this base.
        """
        self._roster.add_character(name, adapters)

    def remove(self, name: str) -> None:
        """Stops serving a character or an added model; requests for it that still wait fail."""
        self._roster.remove(name)

    # -- many at once ---------------------------------------------------------------------------------------

    def generate_text(
        self,
        prompts: Sequence[str],
        images: Sequence[ImageLike | None] | None = None,
        settings: TextSettings | None = None,
        *,
        think: bool = False,
        model: str = BASE,
    ) -> list[str]:
        """Answers every prompt.

        Args:
          prompts: what is asked.
          images: a picture to look at for each prompt, or None.
          settings: of decoding; prompt i is decoded with ``seed + i``.
          think: ask BAGEL to reason first; the reasoning is part of the answer.
          model: who answers: the base, or a character by its name.
        """
        settings = settings or TextSettings()
        pictures = [None] * len(prompts) if images is None else images
        return gather(
            self.submit_text(
                prompt,
                image,
                replace(settings, seed=settings.seed + i),
                think=think,
                model=model,
                wait=True,
            )
            for i, (prompt, image) in enumerate(zip(prompts, pictures, strict=True))
        )

    def answer(
        self,
        image: ImageLike | None,
        question: str,
        settings: TextSettings | None = None,
        *,
        think: bool = False,
        model: str = BASE,
    ) -> str:
        """The answer to a question, about a picture if one is given."""
        return self.generate_text([question], [image], settings, think=think, model=model)[0]

    def generate_images(
        self,
        prompts: Sequence[str],
        n: int = 1,
        settings: FlowSettings | None = None,
        *,
        size: Size | None = None,
        seed: int = 0,
        image: ImageLike | None = None,
        think: TextSettings | None = None,
        model: str = BASE,
    ) -> list[list[Image.Image]]:
        """Draws ``n`` pictures for every prompt; picture j of each has seed ``seed + j``.

        Args:
          prompts: what to draw.
          n: pictures of each prompt; they share the reading of it.
          settings: times and guidance (default: BAGEL's for drawing, or for changing a picture).
          size: (height, width) in pixels; by default the largest square of training, or that of the picture
            given.
          seed: of the noise.
          image: a picture to change as the prompts say.
          think: plan in words first, decoded with these settings: in the format of the characters' training,
            or with an ``as_shipped`` engine in BAGEL's.
          model: who draws.
        """
        plans: Sequence[str | None] = [None] * len(prompts)
        if think is not None and self.config.as_shipped:
            given = [] if image is None else self._given(open_picture(image))
            first = [self.parts.text(templates.GEN_THINK), *given]
            plans = gather(
                self.submit_parts([*first, self.parts.text(p)], think, model=model, wait=True)
                for p in prompts
            )
        elif think is not None:
            asked = [templates.plan_first(p) for p in prompts]
            written = self.generate_text(asked, None, think, model=model)
            parsed = [templates.parse_thinking(w).instruction for w in written]
            prompts = [instruction or p for instruction, p in zip(parsed, prompts, strict=True)]
        return gather(
            self.submit_images(
                prompt,
                n,
                settings,
                size=size,
                seed=seed,
                image=image,
                plan=plan,
                model=model,
                wait=True,
            )
            for prompt, plan in zip(prompts, plans, strict=True)
        )

    # -- one request ----------------------------------------------------------------------------------------

    def submit_text(
        self,
        prompt: str,
        image: ImageLike | None = None,
        settings: TextSettings | None = None,
        *,
        think: bool = False,
        model: str = BASE,
        wait: bool = False,
    ) -> Job:
        """Queues one text. Iterate over the job for the text as it comes, or take its ``result()``.

        Raises:
          UserError: bad input, a prompt longer than the context, or (without ``wait``) a full queue.
        """
        parts: list[Part] = [self.parts.text(templates.VLM_THINK)] if think else []
        if image is not None:
            parts.append(self.parts.look(image))
        parts.append(self.parts.text(prompt))
        return self.submit_parts(parts, settings, model=model, wait=wait)

    def submit_parts(
        self,
        parts: Sequence[Part],
        settings: TextSettings | None = None,
        *,
        model: str = BASE,
        wait: bool = False,
    ) -> Job:
        """Queues the text that follows any context (``self.parts`` makes its parts)."""
        request = TextRequest(tuple(parts), settings or TextSettings(), self._roster.known(model))
        self._check_length(parts, request.settings.max_tokens + 1)
        return self._batcher.submit(Job(("text", model, context.shape_of(parts)), request), wait=wait)

    def submit_images(
        self,
        prompt: str,
        n: int = 1,
        settings: FlowSettings | None = None,
        *,
        size: Size | None = None,
        seed: int = 0,
        image: ImageLike | None = None,
        plan: str | None = None,
        model: str = BASE,
        wait: bool = False,
    ) -> Job:
        """Queues ``n`` pictures of one prompt. Iterate over the job for each as it is done.

        ``plan`` is what BAGEL wrote when asked to plan the picture. For the other arguments see
        ``generate_images``.
        """
        self._check_drawing(n)
        given: list[Part] = []
        if image is not None:
            picture = open_picture(image)
            given, size = self._given(picture), self.parts.given_size(picture)
        system = [] if plan is None else [self.parts.text(templates.GEN_THINK)]
        planned = [] if plan is None else [self.parts.text(plan)]
        asked = self.parts.text(prompt)
        return self.submit_drawing(
            (*system, *given, asked, *planned),
            (*system, *given),
            (*system, asked),  # without the plan, too: as in BAGEL
            n,
            settings or (FlowSettings() if image is None else EDITING),
            size=size,
            seed=seed,
            model=model,
            wait=wait,
        )

    def submit_drawing(
        self,
        full: Sequence[Part],
        no_text: Sequence[Part] = (),
        no_image: Sequence[Part] | None = None,
        n: int = 1,
        settings: FlowSettings | None = None,
        *,
        size: Size | None = None,
        seed: int = 0,
        noise: np.ndarray | None = None,
        model: str = BASE,
        wait: bool = False,
    ) -> Job:
        """Queues ``n`` pictures against any contexts, those of ``flow.Contexts`` (``self.parts`` makes parts).

        ``noise``, float32 ``[n, N, latent_dim]``, takes the place of the seeds': to compare with other programs.
        """
        self._check_drawing(n)
        grid = self.parts.grid(size)
        expected = (n, grid[0] * grid[1], self.cfg.latent_dim)
        if noise is not None and noise.shape != expected:
            raise UserError(f"noise: expected an array of shape {expected}, got {noise.shape}.")
        request = ImageRequest(
            full=tuple(full),
            no_text=tuple(no_text),
            no_image=tuple(full if no_image is None else no_image),
            settings=settings or FlowSettings(),
            grid=grid,
            seeds=tuple(seed + i for i in range(n)),
            model=self._roster.known(model),
            noise=noise,
        )
        self._check_length(request.full, 2 + grid[0] * grid[1])
        return self._batcher.submit(Job(request.key, request, rows=n), wait=wait)

    def _check_drawing(self, n: int) -> None:
        if self.parts.autoencoder is None:
            raise UserError("this engine has no autoencoder, so it cannot draw; load one.")
        if n < 1:
            raise UserError(f"n: expected at least 1 picture, got {n}.")

    def _given(self, picture: Image.Image) -> list[Part]:
        """A picture to be changed: as latents and as patches."""
        return [self.parts.given(picture), self.parts.look(picture)]

    def _check_length(self, parts: Sequence[Part], more: int) -> None:
        length = context.num_tokens(parts)
        if length + more > self.config.max_context:
            raise UserError(
                f"the request needs {length} tokens to read and {more} more; expected at most"
                f" {self.config.max_context} together (max_context). Shorten the text, or raise it."
            )

    # -- the worker's side ----------------------------------------------------------------------------------

    def _run(self, jobs: list[Job]) -> None:
        if isinstance(jobs[0].payload, TextRequest):
            self._run_text(jobs)
        else:
            self._run_images(jobs)

    def _run_text(self, jobs: list[Job]) -> None:
        requests: list[TextRequest] = [job.payload for job in jobs]
        settings = [r.settings for r in requests]
        model, memory = self._roster.get(requests[0].model)
        room = max(s.max_tokens for s in settings) + 1
        cache = self._reader.read(model, memory, [r.parts for r in requests], room=room)
        replies = text.stream(
            model,
            cache,
            self.parts.tokenizer,
            settings,
            on_text=lambda row, piece: jobs[row].emit(piece),
            cancelled=lambda row: jobs[row].cancelled,
        )
        for job, reply in zip(jobs, replies, strict=True):
            job.finish(reply)

    def _run_images(self, jobs: list[Job]) -> None:
        requests: list[ImageRequest] = [job.payload for job in jobs]
        first = requests[0]
        grid, most = first.grid, self.config.max_batch
        model, memory = self._roster.get(first.model)

        def read(branch: str) -> kv.KVCache:
            return self._reader.read(model, memory, [getattr(r, branch) for r in requests])

        text_acts, image_acts = first.settings.guidance.uses
        contexts = Contexts(
            read("full"),
            read("no_text") if text_acts and first.no_text else None,
            read("no_image") if image_acts and first.no_image != first.full else None,
        )
        drawn: list[list[Image.Image]] = [[] for _ in jobs]
        wanted = [(row, i) for row, r in enumerate(requests) for i in range(len(r.seeds))]
        for at in range(0, len(wanted), most):
            chunk = [(row, i) for row, i in wanted[at : at + most] if not jobs[row].cancelled]
            if not chunk:
                continue
            padded = [*chunk, *chunk[:1] * (bucket(len(chunk)) - len(chunk))]
            seeds = np.array([requests[row].seeds[i] & 0xFFFFFFFF for row, i in padded], np.uint32)
            noise = _noise(seeds, grid=grid, width=self.cfg.latent_dim)
            for k, (row, i) in enumerate(padded):
                if (own := requests[row].noise) is not None:
                    noise = noise.at[k].set(own[i])
            rows = _rows(contexts, np.array([row for row, _ in padded], np.int32))
            latents = noise
            for latents in flow.sample_in_chunks(model, rows, noise, grid, first.settings):  # noqa: B007
                if all(jobs[row].cancelled for row, _ in chunk):
                    break
            else:
                images = pixels.decode_images(
                    self.parts.autoencoder, latents, grid, self.cfg.latent_patch_size
                )
                for (row, _), image in zip(chunk, np.asarray(images), strict=False):
                    drawn[row].append(Image.fromarray(image))
                    jobs[row].emit(drawn[row][-1])
        for job, pictures in zip(jobs, drawn, strict=True):
            job.finish(pictures)
