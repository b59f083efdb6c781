"""What a run of stage 1 looks at now and then: its loss on held-out dialogue, and sample pictures.

The dialogue is the test part of each character's text-only conversations: other questions than any that is
trained on. All of it is packed once, each reply counts every time, nothing is random, so values of different
steps and runs compare. The pictures are drawn from the same captions and noise each time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from unichar_jax.config.data import DataConfig
from unichar_jax.config.model import ModelConfig
from unichar_jax.data import layout, tasks
from unichar_jax.data.character import Character
from unichar_jax.data.layout import Sizes, TextPart, Tokens
from unichar_jax.data.rolescape import find_characters, read_character, short_name
from unichar_jax.data.tokenizer import Tokenizer
from unichar_jax.files import replacing
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.streams import Batch
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel import mesh as mesh_lib
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow, pixels
from unichar_jax.training import objective

MOST_DIALOGUES = 256
PICTURES = 8
_FLOW = flow.FlowSettings(25, 1.0, flow.Guidance(text_scale=3.0, interval=(0.0, 1.0)))


def characters_of(cfg: DataConfig, split: str = "train") -> list[Character]:
    """The configured characters of a split; those that it lacks are left out."""
    folders = [f for f in find_characters(Path(cfg.path)) if f.parent.name == split]
    wanted = set(cfg.characters)
    return [read_character(f) for f in folders if not wanted or wanted & {short_name(f), f.name}]


# -- held-out dialogue --------------------------------------------------------------------------------------


def held_out_dialogue(characters: Sequence[Character]) -> list[tasks.Sample]:
    """Test dialogues as training samples: the same prompt, the reply to be learned."""
    held_out = (dataclasses.replace(c, extension_train=c.extension_test) for c in characters)
    return [s for c in held_out for s in tasks.samples(c, "vlm_extension")][:MOST_DIALOGUES]


def pack(
    samples: Sequence[tasks.Sample], tokenizer: Tokenizer, model: ModelConfig, rows: int, room: int
) -> list[Batch]:
    """Text samples in batches of ``rows`` rows of ``room`` tokens (more, if the longest sample needs it)."""
    laid_out = []
    for sample in samples:
        parts = [TextPart(tokenizer.encode(p.text), loss=p.loss) for p in sample.parts]
        laid_out.append(layout.lay_out(parts, model))
    lengths = [layout.sizes(tokens).text for tokens in laid_out]
    room = max([room, *(-(-n // 16) * 16 for n in lengths)])
    packed: list[list[Tokens]] = []
    left: list[int] = []
    for i in sorted(range(len(laid_out)), key=lambda i: -lengths[i]):  # first fit, longest first
        at = next((r for r, free in enumerate(left) if free >= lengths[i]), len(left))
        if at == len(left):
            packed.append([])
            left.append(room)
        packed[at].append(laid_out[i])
        left[at] -= lengths[i]
    packed += [[] for _ in range(-len(packed) % rows)]
    return [
        layout.collate(packed[i : i + rows], Sizes(room, 0, 0), model) for i in range(0, len(packed), rows)
    ]


class DialogueLoss:
    """Cross-entropy of a model on packed dialogue, in nats per token of the replies.

    Args:
      batches: host batches, whole in every process, whose rows divide over the mesh.
      mesh: of the run.
      chunk: as ``objective.unified_terms``.
    """

    def __init__(self, batches: Sequence[Batch], mesh: Mesh, chunk: int):
        mine = mesh_lib.process_slice(batches[0].text.ids.shape[0])
        local = [jax.tree.map(lambda x: x[mine], batch) for batch in batches]
        self._batches = [mesh_lib.put_batch(batch, mesh) for batch in local]

        def sums(model: UnifiedModel, batch: Batch) -> jax.Array:
            nothing = jnp.zeros_like(batch.latent.mean)
            terms = objective.unified_terms(model, batch, nothing, nothing, chunk=chunk)
            return jnp.stack([terms.ce, terms.ce_weight])

        self._sums = jax.jit(sums, out_shardings=mesh_lib.replicated(mesh))

    def __call__(self, model: UnifiedModel) -> float:
        total = np.sum([np.asarray(self._sums(model, batch), np.float64) for batch in self._batches], axis=0)
        return float(total[0] / total[1])


# -- sample pictures ----------------------------------------------------------------------------------------


def captions(cfg: DataConfig, count: int = PICTURES) -> list[str]:
    """Captions to draw, the test pictures' where the data has any, taken in turn from each character."""
    for split in ("test", "train"):
        texts = [[c.text for c in character.captions] for character in characters_of(cfg, split)]
        longest = max(map(len, texts), default=0)
        found = [t[i] for i in range(longest) for t in texts if i < len(t)]
        if found:
            return found[:count]
    return []


class Sheet:
    """Draws captions into one picture, every time from the same noise.

    Args:
      prompts: what to draw.
      tokenizer, autoencoder: of the model.
      cfg: sizes of the model.
      side: of each picture, in pixels.
      mesh: of the run.
      settings: of the sampler.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        tokenizer: Tokenizer,
        autoencoder: Autoencoder,
        cfg: ModelConfig,
        side: int,
        mesh: Mesh,
        settings: flow.FlowSettings = _FLOW,
    ):
        turns = [cfg.special_tokens.frame(tokenizer.encode(p)) for p in prompts]
        self._ids, self._lengths = kv.padded(turns, 16)
        self._autoencoder = jax.tree.map(np.asarray, autoencoder)  # replicated over the mesh when it is used
        grid = (side // cfg.pixels_per_latent,) * 2

        def draw(model: UnifiedModel, autoencoder: Autoencoder, ids: jax.Array, lengths: jax.Array):
            rows, ids = ids.shape[0], mesh_lib.constrain(ids, ("batch", None))
            cache = kv.prefill_text(model, kv.empty(model, rows, ids.shape[1]), ids, lengths)
            noise = jax.random.normal(jax.random.key(0), (rows, grid[0] * grid[1], cfg.latent_dim))
            noise = mesh_lib.constrain(noise, ("batch", None, None))
            latents = flow.sample_latents(model, flow.Contexts(cache), noise, grid, settings)
            return pixels.decode_images(autoencoder, latents, grid, cfg.latent_patch_size)

        self._draw = jax.jit(draw, out_shardings=mesh_lib.replicated(mesh))

    def __call__(self, model: UnifiedModel) -> np.ndarray:
        """uint8 ``[H, W, 3]``, four pictures side by side."""
        images = np.asarray(self._draw(model, self._autoencoder, self._ids, self._lengths))
        columns = min(4, len(images))
        blank = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
        rows = np.concatenate([images, blank]).reshape(-1, columns, *images.shape[1:])
        return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def save_picture(folder: Path, name: str, picture: np.ndarray) -> None:
    """Writes a PNG, completely or not at all."""
    with replacing(folder / name) as made:
        Image.fromarray(picture).save(made, format="PNG")
