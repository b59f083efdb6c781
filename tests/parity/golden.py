"""Reference numbers for parity tests, and the model they belong to.

The directory is ``UNICHAR_GOLDEN_DIR`` (default: the tiny case kept beside the tests; its README lists the
contents). Nothing here assumes the tiny sizes: layers, heads, vocabulary, latent channels and image sizes
come from the directory's files.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from unichar_jax.checkpoint import table
from unichar_jax.config.compute import Compute
from unichar_jax.config.model import ModelConfig
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.unified import UnifiedModel

FLOAT32 = Compute(dtype="float32")


def golden_dir() -> Path:
    default = Path(__file__).parents[1] / "golden" / "tiny"
    return Path(os.environ.get("UNICHAR_GOLDEN_DIR", default))


@functools.cache
def config() -> ModelConfig:
    return ModelConfig.from_bagel(golden_dir())


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    return load_file(golden_dir() / "golden.safetensors")


@functools.cache
def weights(name: str = "ema.safetensors") -> dict[str, np.ndarray]:
    return load_file(golden_dir() / name)


def read_json(name: str) -> Any:
    return json.loads((golden_dir() / name).read_text())


@functools.cache
def model(compute: Compute = FLOAT32) -> UnifiedModel:
    declared = UnifiedModel(config(), compute)
    filled = table.module_from_torch(declared, table.model_table(config()), weights())
    return jax.tree.map(jax.numpy.asarray, filled)


@functools.cache
def autoencoder() -> Autoencoder:
    cfg = config().autoencoder
    filled = table.module_from_torch(
        Autoencoder(cfg), table.autoencoder_table(cfg), weights("ae.safetensors")
    )
    return jax.tree.map(jax.numpy.asarray, filled)


def relative_l2(got: Any, expected: Any) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    scale = np.linalg.norm(expected)
    return float(np.linalg.norm(got - expected) / (scale if scale else 1.0))


def assert_close(got: Any, expected: Any, tolerance: float, what: str = "") -> None:
    error = relative_l2(got, expected)
    assert error <= tolerance, f"{what}: relative L2 error {error:.2e}, allowed {tolerance:.0e}"
