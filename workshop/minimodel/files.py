"""Sizes and files of the mini model's scorers and judge: the ``config.json`` that says what each is, and its weights.

The scorers are CLIP and DINOv2 as for pictures of any kind, at small sizes: the same modules, files and scorer classes.
What is their own stands in their configuration: pictures are taken at 96 px, words are hashed (so that the text side
needs no other model's tokenizer), and identity features tell how much pictures differ. The judge's says all that is
known of the mini world where reports are made: attributes, how texts name them, and voices.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from unichar_jax.checkpoint import table
from unichar_jax.checkpoint.encoders import clip_table, dinov2_table
from unichar_jax.checkpoint.safetensors_io import write_file
from unichar_jax.evaluation.judge import Network, NetworkConfig
from unichar_jax.files import replacing
from unichar_jax.models import params
from unichar_jax.models.encoders.clip import Clip, ClipConfig
from unichar_jax.models.encoders.dinov2 import Dinov2, Dinov2Config
from unichar_jax.models.encoders.transformer import TransformerConfig
from unichar_jax.scoring.clip_score import hashed_words
from unichar_jax.scoring.folder import JUDGE as JUDGE_KIND
from unichar_jax.scoring.preprocess import Preprocess
from workshop.miniworld.texts import SAID
from workshop.miniworld.voices import PHRASES
from workshop.miniworld.world import ATTRIBUTES

SIZE = 96
PREPROCESS = Preprocess(SIZE, SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Pictures in [0, 1] of any size to ``[B, 96, 96, 3]`` in [-1, 1]."""

DINOV2 = Dinov2Config(
    TransformerConfig(128, 384, 4, 4, 1e-6, "gelu", layer_scale=True), image_size=SIZE, patch_size=8
)
CLIP = ClipConfig(
    text=TransformerConfig(128, 384, 2, 4, 1e-5, "gelu"),
    vision=TransformerConfig(128, 384, 4, 4, 1e-5, "gelu"),
    projection_dim=96,
    vocab_size=1024,
    max_length=48,
    end_of_text=1023,
    image_size=SIZE,
    patch_size=8,
)
JUDGE = NetworkConfig(SIZE, {name: len(values) for name, values in ATTRIBUTES.items()})
TEXT_IMAGE, IMAGE_ENCODER, JUDGE_FOLDER = "text_image", "image_encoder", "judge"
"""Where the three lie in a model's folder."""

WORDS = tuple(sorted({w for v in ATTRIBUTES.values() for w in re.findall(r"[a-z]+", str(v))}))
"""Words of attributes: these have an id of their own."""

tokenize = hashed_words(WORDS, CLIP)


# -- what config.json says -----------------------------------------------------------------------------------


def dinov2_config(cfg: Dinov2Config = DINOV2) -> dict[str, Any]:
    """The Hub's config.json of these sizes, and what is not as the Hub has it."""
    return {
        "model_type": "dinov2",
        "hidden_size": cfg.transformer.hidden_size,
        "mlp_ratio": cfg.transformer.mlp_size / cfg.transformer.hidden_size,
        "num_hidden_layers": cfg.transformer.num_layers,
        "num_attention_heads": cfg.transformer.num_heads,
        "layer_norm_eps": cfg.transformer.norm_eps,
        "hidden_act": cfg.transformer.activation,
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "preprocess": dataclasses.asdict(PREPROCESS),
        "diversity": True,
    }


def clip_config(cfg: ClipConfig = CLIP) -> dict[str, Any]:
    """The Hub's config.json of these sizes, and what is not as the Hub has it."""

    def tower(size: TransformerConfig) -> dict[str, Any]:
        return {
            "hidden_size": size.hidden_size,
            "intermediate_size": size.mlp_size,
            "num_hidden_layers": size.num_layers,
            "num_attention_heads": size.num_heads,
            "layer_norm_eps": size.norm_eps,
            "hidden_act": size.activation,
        }

    return {
        "model_type": "clip",
        "projection_dim": cfg.projection_dim,
        "text_config": {
            **tower(cfg.text),
            "vocab_size": cfg.vocab_size,
            "max_position_embeddings": cfg.max_length,
            "eos_token_id": cfg.end_of_text,
        },
        "vision_config": {**tower(cfg.vision), "image_size": cfg.image_size, "patch_size": cfg.patch_size},
        "preprocess": dataclasses.asdict(PREPROCESS),
        "tokenizer": {"kind": "hashed_words", "words": WORDS},
    }


def judge_config(cfg: NetworkConfig = JUDGE) -> dict[str, Any]:
    """The config.json of a judge: its network, and the mini world as far as reports need it."""
    return {
        "model_type": JUDGE_KIND,
        "image_size": cfg.image_size,
        "widths": cfg.widths,
        "groups": cfg.groups,
        "preprocess": dataclasses.asdict(PREPROCESS),
        "attributes": {name: dataclasses.asdict(attribute) for name, attribute in SAID.items()},
        "voices": PHRASES,
    }


# -- files -------------------------------------------------------------------------------------------------


def save_clip(folder: Path, model: Clip) -> None:
    _save_hub(folder, model, clip_table(model.cfg), clip_config(model.cfg))


def save_dinov2(folder: Path, model: Dinov2) -> None:
    _save_hub(folder, model, dinov2_table(model.cfg), dinov2_config(model.cfg))


def _save_hub(folder: Path, model: Any, entries: tuple[table.Entry, ...], config: dict[str, Any]) -> None:
    arrays = table.module_to_torch(model, entries)
    _save(folder, {e.torch: arrays[e.torch].reshape(e.torch_shape) for e in entries}, config)


def save_judge(folder: Path, network: Network) -> None:
    arrays = {n: np.asarray(x) for n, x in params.flat(network).items()}
    _save(folder, arrays, judge_config(network.cfg))


def _save(folder: Path, arrays: Mapping[str, np.ndarray], config: dict[str, Any]) -> None:
    """config.json, and model.safetensors in bfloat16; the weights complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in arrays.items()}
    with replacing(folder / "model.safetensors") as made:
        write_file(made, {n: (x.shape, x.dtype) for n, x in tensors.items()}, tensors.items())
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
