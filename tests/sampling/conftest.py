"""A small random model whose velocity and logits are alive, and a tokenizer of whole words."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.config.compute import Compute
from unichar_jax.config.model import DecoderConfig, ModelConfig, VisionConfig, model_preset
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.unified import UnifiedModel

CONFIG: ModelConfig = replace(
    model_preset("debug"),
    decoder=DecoderConfig(
        hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=512
    ),
    vision=VisionConfig(hidden_size=16, mlp_size=24, num_layers=1, num_heads=2, max_patches_per_side=8),
)


class WordTokenizer:
    """Words and runs of spaces become ids by their checksum; ids become words again."""

    def encode(self, text: str) -> list[int]:
        return [8 + zlib.crc32(w.encode()) % 500 for w in re.findall(r"\s+|\S+", text)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"w{i} " for i in ids)


@pytest.fixture(scope="session")
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture(scope="session")
def model() -> UnifiedModel:
    """Weights several times larger than at a real start, so that contexts matter to the result."""
    made = params.initialize(UnifiedModel(CONFIG, Compute(dtype="float32")), 0)
    rng = np.random.default_rng(0)
    made.latent_out.kernel[...] = rng.normal(size=made.latent_out.kernel.shape, scale=0.2)
    made.lm_head.kernel[...] = rng.normal(size=made.lm_head.kernel.shape)
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32) * (8 if x.ndim >= 2 else 1)), made)


@pytest.fixture(scope="session")
def autoencoder() -> Autoencoder:
    return params.initialize(Autoencoder(CONFIG.autoencoder), 3)


@pytest.fixture(scope="session")
def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Three padded prompts that begin with BOS, and their lengths."""
    ids = np.random.default_rng(4).integers(8, 500, (3, 12)).astype(np.int32)
    ids[:, 0] = 1
    return ids, np.array([5, 12, 2], np.int32)
