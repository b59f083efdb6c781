"""Writes a BAGEL directory with made-up weights of any size, to try conversion without a download.

Names, shapes and dtypes are those of the real files; values are a repeated random pattern, shifted from
tensor to tensor so that no two are alike. One tensor is in memory at a time. The full size is 29 GB:

    python scripts/synthetic_bagel.py DIRECTORY --preset bagel-7b
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from unichar_jax.checkpoint import table, writing
from unichar_jax.checkpoint.convert import DTYPES
from unichar_jax.checkpoint.safetensors_io import write_file
from unichar_jax.checkpoint.weights import AE_FILE, MODEL, ArrayInfo
from unichar_jax.config.model import ModelConfig, model_preset

_PATTERN = 1 << 22


def write_synthetic(
    folder: Path, cfg: ModelConfig, dtype: np.dtype, max_shard_bytes: int | None = None
) -> None:
    """Writes ``folder`` (new) with weights of ``cfg``: the model in ``dtype``, the autoencoder in float32."""
    pattern = np.random.default_rng(0).standard_normal(_PATTERN, np.float32)
    patterns = {np.dtype(d): pattern.astype(d) for d in (dtype, np.float32)}

    def tensor(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % _PATTERN
        return np.resize(np.roll(patterns[dtype], -start), shape)

    frozen = table.frozen_tables(cfg)
    shapes = {e.torch: e.torch_shape for e in table.model_table(cfg)}
    shapes |= {n: (side * side, width) for n, (side, width) in frozen.items()}
    specs = {n: ArrayInfo(s, dtype, MODEL) for n, s in sorted(shapes.items())}

    def read(names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        for name in names:
            if name in frozen:
                yield name, table.frozen_table(cfg, name)
            else:
                yield name, tensor(name, shapes[name], dtype)

    with writing.staging(folder) as staged:
        writing.write_torch(staged, specs, read, max_shard_bytes)
        wide = np.dtype(np.float32)
        entries = table.autoencoder_table(cfg.autoencoder)
        write_file(
            staged / AE_FILE,
            {e.torch: (e.torch_shape, wide) for e in entries},
            ((e.torch, tensor(e.torch, e.torch_shape, wide)) for e in entries),
        )
        writing.write_companions(staged, cfg, None, None)


def main(
    folder: tyro.conf.Positional[Path],
    /,
    preset: str = "bagel-7b",
    layers: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    max_shard_gib: float | None = None,
) -> None:
    """Writes a BAGEL directory with made-up weights.

    Args:
      folder: directory to write; must not exist.
      preset: model sizes.
      layers: decoder layers, if not the preset's.
      dtype: of the model.
      max_shard_gib: split the model into files of at most this size.
    """
    cfg = model_preset(preset)
    if layers is not None:
        cfg = dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, num_layers=layers))
    limit = None if max_shard_gib is None else int(max_shard_gib * 2**30)
    write_synthetic(folder, cfg, DTYPES[dtype], limit)


if __name__ == "__main__":
    tyro.cli(main)
