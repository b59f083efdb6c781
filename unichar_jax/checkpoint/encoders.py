"""The published weights of the scoring encoders, read from the Hub's safetensors.

``load_clip`` and ``load_dinov2`` read a folder as the Hub has it (``config.json``, ``model.safetensors``);
``load_lpips`` reads one file, the state of the ``lpips`` package's AlexNet model. As for the unified model, a
list of renaming rules ties every array to one tensor; tensors that carry no weights are named here too, so a
file fits exactly or is one error with everything that is wrong. Nothing here downloads anything.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from unichar_jax.checkpoint import table
from unichar_jax.checkpoint.weights import Problems, TorchTensors, check_arrays
from unichar_jax.errors import UserError
from unichar_jax.models.encoders.clip import Clip, ClipConfig
from unichar_jax.models.encoders.dinov2 import Dinov2, Dinov2Config
from unichar_jax.models.encoders.lpips import Lpips, LpipsConfig
from unichar_jax.records import Findings, Record, read_settings, shown

M = TypeVar("M")
Rules = list[tuple[str, str]]

LPIPS_FILE = "lpips_alex.safetensors"

_LAYER = r"\.layers\.(?P<i>\d+)\."
_CLIP: Rules = [
    (r"logit_scale", "logit_scale"),
    (r"image\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"image\.patch_embedding\.kernel", "vision_model.embeddings.patch_embedding.weight"),
    (r"image\.position_embedding\.embedding", "vision_model.embeddings.position_embedding.weight"),
    # The misspelling is the published name.
    (r"image\.pre_norm\.(?P<leaf>scale|bias)", "vision_model.pre_layrnorm.{leaf}"),
    (r"image\.post_norm\.(?P<leaf>scale|bias)", "vision_model.post_layernorm.{leaf}"),
    (r"image\.projection\.kernel", "visual_projection.weight"),
    (r"text\.(?P<p>token|position)_embedding\.embedding", "text_model.embeddings.{p}_embedding.weight"),
    (r"text\.final_norm\.(?P<leaf>scale|bias)", "text_model.final_layer_norm.{leaf}"),
    (r"text\.projection\.kernel", "text_projection.weight"),
    *(
        (ours + _LAYER + part, f"{theirs}_model.encoder.layers.{{i}}.{name}.{{leaf}}")
        for ours, theirs in (("image", "vision"), ("text", "text"))
        for part, name in (
            (r"(?P<p>q|k|v|out)\.(?P<leaf>kernel|bias)", "self_attn.{p}_proj"),
            (r"(?P<p>fc[12])\.(?P<leaf>kernel|bias)", "mlp.{p}"),
            (r"norm(?P<p>[12])\.(?P<leaf>scale|bias)", "layer_norm{p}"),
        )
    ),
]
_CLIP_WITHOUT_WEIGHTS = (r"(text|vision)_model\.embeddings\.position_ids",)

_DINOV2: Rules = [
    (r"class_embedding", "embeddings.cls_token"),
    (r"position_embedding", "embeddings.position_embeddings"),
    (r"patch_embedding\.(?P<leaf>kernel|bias)", "embeddings.patch_embeddings.projection.{leaf}"),
    (r"norm\.(?P<leaf>scale|bias)", "layernorm.{leaf}"),
    (r"layers\.(?P<i>\d+)\.norm(?P<p>[12])\.(?P<leaf>scale|bias)", "encoder.layer.{i}.norm{p}.{leaf}"),
    (r"layers\.(?P<i>\d+)\.(?P<p>fc[12])\.(?P<leaf>kernel|bias)", "encoder.layer.{i}.mlp.{p}.{leaf}"),
    (r"layers\.(?P<i>\d+)\.scale(?P<p>[12])", "encoder.layer.{i}.layer_scale{p}.lambda1"),
    *(
        (
            rf"layers\.(?P<i>\d+)\.{ours}\.(?P<leaf>kernel|bias)",
            f"encoder.layer.{{i}}.attention.{theirs}.{{leaf}}",
        )
        for ours, theirs in zip(
            ("q", "k", "v", "out"),
            ("attention.query", "attention.key", "attention.value", "output.dense"),
            strict=True,
        )
    ),
]
_DINOV2_WITHOUT_WEIGHTS = (r"embeddings\.mask_token",)  # only for pre-training

_LPIPS: Rules = [
    # The slices keep the numbers of torchvision's AlexNet.
    *(
        (rf"conv\.{i}\.(?P<leaf>kernel|bias)", f"net.slice{i + 1}.{number}.{{leaf}}")
        for i, number in enumerate((0, 3, 6, 8, 10))
    ),
    (r"lin\.(?P<i>\d)\.kernel", "lin{i}.model.1.weight"),
]
# The heads are in the file twice, and the input's shift and scale are constants of the method.
_LPIPS_WITHOUT_WEIGHTS = (r"lins\.\d\.model\.1\.weight", r"scaling_layer\.(shift|scale)")


def clip_table(cfg: ClipConfig) -> tuple[table.Entry, ...]:
    """Entries of ``model.safetensors`` of CLIP."""
    return table.entries_of(Clip(cfg), _CLIP)


def dinov2_table(cfg: Dinov2Config) -> tuple[table.Entry, ...]:
    """Entries of ``model.safetensors`` of DINOv2."""
    return table.entries_of(Dinov2(cfg), _DINOV2)


def lpips_table(cfg: LpipsConfig | None = None) -> tuple[table.Entry, ...]:
    """Entries of the ``lpips`` package's state."""
    return table.entries_of(Lpips(cfg), _LPIPS)


def load_clip(folder: str | Path, dtype: Any = jnp.float32) -> Clip:
    """Reads CLIP from a folder like ``openai/clip-vit-large-patch14``.

    Raises:
      UserError: a file is absent or damaged, or its tensors do not fit ``config.json``.
    """
    folder = Path(folder)
    cfg = ClipConfig.from_hub(read_config(folder, "clip"))
    return _load(folder / "model.safetensors", Clip(cfg), clip_table(cfg), _CLIP_WITHOUT_WEIGHTS, dtype)


def load_dinov2(folder: str | Path, dtype: Any = jnp.float32) -> Dinov2:
    """Reads DINOv2 from a folder like ``facebook/dinov2-base``; errors as ``load_clip``."""
    folder = Path(folder)
    cfg = Dinov2Config.from_hub(read_config(folder, "dinov2"))
    return _load(folder / "model.safetensors", Dinov2(cfg), dinov2_table(cfg), _DINOV2_WITHOUT_WEIGHTS, dtype)


def load_lpips(path: str | Path, cfg: LpipsConfig | None = None, dtype: Any = jnp.float32) -> Lpips:
    """Reads LPIPS/AlexNet from one safetensors file, or a folder that holds it as ``LPIPS_FILE``.

    The package publishes no safetensors file. With ``lpips`` and PyTorch installed anywhere, this writes it::

        import lpips, safetensors.torch
        state = lpips.LPIPS(net="alex").state_dict()
        safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, "lpips_alex.safetensors")

    Errors as ``load_clip``.
    """
    path = Path(path)
    path = path / LPIPS_FILE if path.is_dir() else path
    return _load(path, Lpips(cfg), lpips_table(cfg), _LPIPS_WITHOUT_WEIGHTS, dtype)


def read_config(folder: Path, model_type: str) -> Record:
    """``config.json`` of an encoder's folder; a ``UserError`` if it is absent, damaged or of another kind."""
    absent = "expected a folder as the Hugging Face Hub has it, with config.json and model.safetensors"
    found = Findings()
    config = read_settings(found, folder / "config.json", absent)
    if config.ok and config.data.get("model_type") != model_type:
        got = shown(config.data.get("model_type"))
        config.error("", f"model_type '{model_type}'", got, "name another folder")
    found.refuse()
    return config


def _load(
    path: Path, module: M, entries: tuple[table.Entry, ...], without_weights: tuple[str, ...], dtype: Any
) -> M:
    tensors = TorchTensors([path])
    found = {
        name: info
        for name, info in tensors.infos.items()
        if not any(re.fullmatch(pattern, name) for pattern in without_weights)
    }
    problems = Problems()
    check_arrays(problems, {e.torch: e.torch_shape for e in entries}, found)
    if problems:
        lines = [f"{path}: the weights do not fit the encoder.", *problems.lines()]
        raise UserError("\n".join([*lines, "Download the file and its config.json again, together."]))
    arrays = {e.ours: np.asarray(e.from_torch(tensors.read(e.torch))) for e in entries}
    filled = table.module_from_flat(module, arrays)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), filled)
