"""The one two-way table between this package's arrays and the published PyTorch tensors.

An ``Entry`` ties one array on our side (layers spelled out, never stacked) to one tensor of a BAGEL file,
with the layout change between them. Entries are derived from the model's declarations by the short list of
renaming rules below, so the table covers exactly what the model has; conversion both ways, accounting,
``inspect`` and ``diff`` read nothing else. ``to_torch`` and ``from_torch`` are views (no copy) and exact in
every dtype.

Names: published ``ema.safetensors`` and ``ae.safetensors`` of BAGEL-7B-MoT.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from unichar_jax.config.model import AutoencoderConfig, ModelConfig
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.unified import UnifiedModel, position_table

M = TypeVar("M")

# Beginning of an array's name -> the part of the model that it is counted under; the first match holds.
_GROUPS = {
    "embed.": "text embedding",
    "lm_head.": "text head",
    "vision.": "vision tower",
    "connector.": "connector",
    "time_embedder.": "latent input, head and time",
    "latent_": "latent input, head and time",
}
LM_PREFIX = "language_model."
LATENT_TABLE = "latent_pos_embed.pos_embed"
VISION_TABLE = "vit_pos_embed.pos_embed"

# Permutation from the PyTorch layout to ours; its inverse goes back.
_LAYOUTS: dict[str, tuple[int, ...] | None] = {
    "same": None,
    "transpose": (1, 0),  # Linear [out, in] <-> [in, out]
    "conv": (2, 3, 1, 0),  # OIHW <-> HWIO
    "conv1x1": (2, 3, 1, 0),  # OIHW with 1 x 1 kernel <-> [in, out]
}


@dataclass(frozen=True)
class Entry:
    """One array: our name and shape, the PyTorch name and shape, and the layout change between them."""

    ours: str
    torch: str
    layout: str
    shape: tuple[int, ...]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return self.to_torch(np.broadcast_to(np.int8(0), self.shape)).shape

    def from_torch(self, x: np.ndarray) -> np.ndarray:
        axes = _LAYOUTS[self.layout]
        y = x if axes is None else x.transpose(axes)
        return y[0, 0] if self.layout == "conv1x1" else y

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        axes = _LAYOUTS[self.layout]
        if axes is None:
            return x
        if self.layout == "conv1x1":
            x = x[None, None]
        return x.transpose(np.argsort(axes))


_LAYER = r"layers\.(?P<i>\d+)\."
# Our name (regex) -> PyTorch name. {i}: layer. Experts: `und` has no suffix, `gen` has `_moe_gen`.
_MODEL_RULES: list[tuple[str, str]] = [
    (r"embed\.embedding", "language_model.model.embed_tokens.weight"),
    (r"lm_head\.kernel", "language_model.lm_head.weight"),
    (r"decoder\.norm\.(?P<e>und|gen)\.scale", "language_model.model.norm{e}.weight"),
    *(
        (rf"decoder\.{_LAYER}(?P<e>und|gen)\.{ours}", f"language_model.model.layers.{{i}}.{torch}")
        for ours, torch in (
            (r"(?P<p>[qkvo])\.(?P<leaf>kernel|bias)", "self_attn.{p}_proj{e}.{leaf}"),
            (r"(?P<p>[qk])_norm\.scale", "self_attn.{p}_norm{e}.weight"),
            (r"(?P<p>gate|up|down)\.kernel", "mlp{e}.{p}_proj.weight"),
            (r"attn_norm\.scale", "input_layernorm{e}.weight"),
            (r"mlp_norm\.scale", "post_attention_layernorm{e}.weight"),
        )
    ),
    (r"time_embedder\.fc1\.(?P<leaf>kernel|bias)", "time_embedder.mlp.0.{leaf}"),
    (r"time_embedder\.fc2\.(?P<leaf>kernel|bias)", "time_embedder.mlp.2.{leaf}"),
    (r"latent_in\.(?P<leaf>kernel|bias)", "vae2llm.{leaf}"),
    (r"latent_out\.(?P<leaf>kernel|bias)", "llm2vae.{leaf}"),
    (r"connector\.(?P<p>fc[12])\.(?P<leaf>kernel|bias)", "connector.{p}.{leaf}"),
    *(
        (r"vision\." + ours, f"vit_model.vision_model.{torch}")
        for ours, torch in (
            (r"patch_embedding\.(?P<leaf>kernel|bias)", "embeddings.patch_embedding.{leaf}"),
            (r"position_embedding\.embedding", "embeddings.position_embedding.weight"),
            (
                _LAYER + r"(?P<p>q|k|v|out)\.(?P<leaf>kernel|bias)",
                "encoder.layers.{i}.self_attn.{p}_proj.{leaf}",
            ),
            (_LAYER + r"(?P<p>fc[12])\.(?P<leaf>kernel|bias)", "encoder.layers.{i}.mlp.{p}.{leaf}"),
            (_LAYER + r"norm(?P<p>[12])\.(?P<leaf>scale|bias)", "encoder.layers.{i}.layer_norm{p}.{leaf}"),
            (r"post_norm\.(?P<leaf>scale|bias)", "post_layernorm.{leaf}"),
        )
    ),
]

_AE_RULES: list[tuple[str, str]] = [
    (r"(?P<a>.*\.(?:downsample|upsample))\.(?P<leaf>kernel|bias)", "{a}.conv.{leaf}"),
    (r"(?P<a>.*)\.(?P<leaf>kernel|scale|bias)", "{a}.{leaf}"),
]

_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_EXPERT = {"und": "", "gen": "_moe_gen"}


def _torch_name(ours: str, rules: list[tuple[str, str]]) -> str:
    for pattern, template in rules:
        if m := re.fullmatch(pattern, ours):
            groups = m.groupdict()
            if "leaf" in groups:
                groups["leaf"] = _LEAF[groups["leaf"]]
            if "e" in groups:
                groups["e"] = _EXPERT[groups["e"]]
            return template.format(**groups)
    raise KeyError(f"no conversion rule for array '{ours}': add one to checkpoint/table.py")


def _layout(name: str, shape: tuple[int, ...]) -> str:
    if not name.endswith(".kernel"):
        return "same"
    if len(shape) == 4:
        return "conv"
    return "conv1x1" if ".attn_1." in name else "transpose"


def group_of(name: str) -> str:
    """The part of the model that an array is counted under."""
    for beginning, group in _GROUPS.items():
        if name.startswith(beginning):
            return group
    return "decoder, understanding expert" if ".und." in name else "decoder, generation expert"


def entries_of(module: Any, rules: list[tuple[str, str]]) -> tuple[Entry, ...]:
    """An entry for every array of a module of declarations; ``rules`` are (our name, PyTorch name)."""
    entries = tuple(
        Entry(name, _torch_name(name, rules), _layout(name, spec.shape), spec.shape)
        for declared, stack in params.named_leaves(module)
        for spec in [params.one_layer(stack)]
        for name in params.stored_names(declared, stack)
    )
    if len({e.torch for e in entries}) != len(entries):
        raise AssertionError("two arrays map to one PyTorch tensor")
    return entries


@functools.lru_cache(maxsize=8)
def model_table(cfg: ModelConfig) -> tuple[Entry, ...]:
    """Entries of ``ema.safetensors`` (without the two frozen tables)."""
    return entries_of(UnifiedModel(cfg), _MODEL_RULES)


@functools.lru_cache(maxsize=8)
def autoencoder_table(cfg: AutoencoderConfig) -> tuple[Entry, ...]:
    """Entries of ``ae.safetensors``."""
    return entries_of(Autoencoder(cfg), _AE_RULES)


def frozen_tables(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """PyTorch name -> (side, width) of the two frozen position tables, which are computed, never loaded."""
    width = cfg.decoder.hidden_size
    return {
        LATENT_TABLE: (cfg.max_latent_size, width),
        VISION_TABLE: (cfg.vision.max_patches_per_side, width),
    }


def frozen_table(cfg: ModelConfig, name: str) -> np.ndarray:
    return position_table(*frozen_tables(cfg)[name])


# -- whole modules in memory (small models, tests; big ones stream, checkpoint/convert.py) ------------------


def module_from_torch(module: Any, entries: tuple[Entry, ...], tensors: Mapping[str, Any]) -> Any:
    """Fills a module of declarations from PyTorch tensors held in memory, stacking layers."""
    return module_from_flat(module, {e.ours: e.from_torch(np.asarray(tensors[e.torch])) for e in entries})


def module_from_flat(module: M, arrays: Mapping[str, Any], xp: Any = np) -> M:
    """Fills a module of declarations from arrays by on-disk name, stacking layers with ``xp`` (numpy or jax.numpy)."""

    def fill(name: str, spec: params.ArraySpec) -> Any:
        if params.is_stacked(spec):
            return xp.stack([arrays[n] for n in params.stored_names(name, spec)])
        return xp.asarray(arrays[name])

    return params.map_named(fill, module)


def module_to_torch(module: Any, entries: tuple[Entry, ...], dtype: Any = None) -> dict[str, np.ndarray]:
    """PyTorch tensors from a filled module, in ``dtype`` or its own."""
    arrays = params.flat(module)

    def stored(name: str) -> np.ndarray:
        stacked, layer = (name, None) if name in arrays else params.stacked_name(name)
        return np.asarray(arrays[stacked] if layer is None else arrays[stacked][layer], dtype)

    return {e.torch: np.ascontiguousarray(e.to_torch(stored(e.ours))) for e in entries}
