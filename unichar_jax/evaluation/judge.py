"""The judge of pictures that reports: it reads attributes, and is never a reward.

It has a type of its own (``Judge``), which nothing that rewards takes and no registry of rewards builds: what is
optimised must not judge. This one is a convolutional network, trained from another seed on other pictures than the
scorers (which are transformers). A judge is a folder with ``model.safetensors`` and a ``config.json``:

    model_type               attribute_judge
    image_size, preprocess   side of its pictures in pixels, and how they are prepared (``scoring.folder``)
    widths, groups           of the network
    attributes               name -> values, said, words, fixed (``evaluation.attributes``), in the order of the heads
    voices                   name -> phrases, for texts
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unichar_jax.checkpoint import table
from unichar_jax.checkpoint.encoders import read_config
from unichar_jax.checkpoint.safetensors_io import open_file
from unichar_jax.errors import UserError
from unichar_jax.evaluation.attributes import Attribute, Attributes, Voices
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Conv, GroupNorm, Level
from unichar_jax.models.layers import Dense
from unichar_jax.records import Record, shown
from unichar_jax.scoring.base import in_batches
from unichar_jax.scoring.folder import JUDGE, preparation
from unichar_jax.scoring.preprocess import Preprocess


class Judge(Protocol):
    """Reads attributes from pictures."""

    @property
    def attributes(self) -> Attributes: ...

    def read(self, pictures: np.ndarray) -> Mapping[str, np.ndarray]:
        """Pictures uint8 ``[N, H, W, 3]`` to probabilities ``{attribute: [N, values]}``."""
        ...


@dataclass(frozen=True)
class NetworkConfig:
    """``widths`` at 1/2, 1/4, ... of the picture's side; ``values``: how many each attribute has."""

    image_size: int
    values: Mapping[str, int]
    widths: tuple[int, ...] = (24, 40, 72, 112)
    groups: int = 4


class Network(nnx.Module):
    """A residual network, and its own places to look at for each attribute."""

    def __init__(self, cfg: NetworkConfig):
        last = len(cfg.widths) - 1
        inputs = [cfg.widths[0], *cfg.widths]
        self.conv_in = Conv(3, cfg.widths[0], stride=2)
        self.levels = nnx.List(
            [Level(inputs[i], width, 1, cfg.groups, down=i < last) for i, width in enumerate(cfg.widths)]
        )
        self.norm = GroupNorm(cfg.widths[-1], cfg.groups)
        cells = (cfg.image_size // 2 ** (last + 1)) ** 2
        self.places = params.declare((len(cfg.values), cells), (None, None), params.zeros)
        self.heads = nnx.List([Dense(cfg.widths[-1], n, (None, None)) for n in cfg.values.values()])
        self.cfg = cfg

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Prepared images ``[B, S, S, 3]`` to logits ``{attribute: [B, values]}``."""
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        x = jax.nn.silu(self.norm(x))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        seen = jnp.einsum("bpc,ap->bac", x, jax.nn.softmax(self.places[...], axis=-1))
        heads = zip(self.cfg.values, self.heads, strict=True)
        return {name: head(seen[:, i]) for i, (name, head) in enumerate(heads)}

    def probabilities(self, images: jax.Array) -> dict[str, jax.Array]:
        return {name: jax.nn.softmax(logits) for name, logits in self(images).items()}


class AttributeJudge:
    """A ``Judge`` by a network.

    Args:
      network: with its weights.
      attributes: in the order of its heads.
      prepare: preprocessing of pictures.
      voices: what else its folder knows, for texts.
      batch_size: pictures in one call of the compiled function.
    """

    def __init__(
        self,
        network: Network,
        attributes: Attributes,
        prepare: Preprocess,
        voices: Voices | None = None,
        batch_size: int = 32,
    ):
        def read(network: Network, images: jax.Array) -> jax.Array:
            return jnp.concatenate(list(network.probabilities(prepare(images)).values()), axis=-1)

        self.network, self.attributes, self.voices = network, attributes, voices or {}
        self._batch_size, self._read = batch_size, jax.jit(read)

    def read(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
        """See ``Judge``."""
        images = jnp.asarray(pictures, jnp.float32) / 255
        joined = np.asarray(in_batches(lambda x: self._read(self.network, x), images, self._batch_size))
        ends = np.cumsum([len(a.values) for a in self.attributes.values()])[:-1]
        return dict(zip(self.attributes, np.split(joined, ends, axis=-1), strict=True))


def load_judge(folder: Path) -> AttributeJudge:
    """Reads a judge's folder.

    Raises:
      UserError: a file is absent or damaged, or the weights are not those that ``config.json`` says.
    """
    config = read_config(folder, JUDGE)
    told, spoken = config.inner("attributes"), config.inner("voices")
    attributes = {n: _attribute(one) for n in told.data if (one := told.inner(n))} if told else {}
    voices = {n: spoken.texts(n, required=True) for n in spoken.data} if spoken else {}
    if not attributes:
        config.error("attributes", "names with their values and said", "none", "copy the file again")
    sizes = NetworkConfig(
        config.whole("image_size"),
        {name: len(a.values) for name, a in attributes.items()},
        config.wholes("widths", 1, 2**16),
        config.whole("groups"),
    )
    prepare = preparation(config, None, sizes.image_size)
    return AttributeJudge(_weights(folder, Network(sizes)), attributes, prepare, voices)


def _attribute(told: Record) -> Attribute:
    said = told.text("said")
    try:
        re.compile(said)
    except re.error as error:
        told.error("said", "a regular expression", f"{shown(said)} ({error})", "correct it")
    words = told.inner("words")
    named = {word: words.text(word) for word in words.data} if words else {}
    if not (values := told.texts("values", required=True)):
        told.error("values", "names of classes", "none", "copy the file again")
    return Attribute(values, said, named, told.flag("fixed"))


def _weights(folder: Path, declared: Network) -> Network:
    file = open_file(folder / "model.safetensors")
    expected = {n: s.shape for n, s in params.named_leaves(declared)}
    found = {n: info.shape for n, info in file.tensors.items()}
    if expected != found:
        different = sorted(n for n in expected | found if expected.get(n) != found.get(n))
        raise UserError(
            f"{folder / 'model.safetensors'}: not the weights of this judge; {len(different)} arrays differ, the first"
            f" is {different[0]}. Copy it and its config.json again, together."
        )
    arrays = {n: jnp.asarray(file.read(n).astype(np.float32)) for n in found}
    return table.module_from_flat(declared, arrays)
