"""A name for weights that says whether two folders hold the same ones, wherever they lie and in whatever container.

Gigabytes are not read: of the first, the middle and the last layer the keys and values of both experts and the
norms, and adapters whole. All of them move in any training of this package. Values count as bfloat16, so a
conversion does not change the name.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from unichar_jax.checkpoint import runs, weights
from unichar_jax.checkpoint.arrays import bits, materialize
from unichar_jax.config.model import ModelConfig


def fingerprint(folder: Path, cfg: ModelConfig) -> str:
    """Sixteen hexadecimal digits for the model in a BAGEL directory, a model directory, or a training step.

    Raises:
      UserError: the arrays do not fit ``cfg``.
    """
    opened = weights.open_weights(folder, cfg, weights.MODEL, runs.weights_item(folder), adapters=True)
    last = cfg.decoder.num_layers - 1
    layers = "|".join(map(str, sorted({0, last // 2, last})))
    read = re.compile(rf"decoder\.layers\.({layers})\.(\w+\.(k|v)\.|.*norm)|.*\.lora_")
    names = sorted(name for name in opened.infos if read.match(name))
    told = hashlib.sha256()
    for name, array in opened.read(names):
        values = bits(materialize(array, np.dtype(ml_dtypes.bfloat16)))
        told.update(f"{name} {values.shape}\n".encode())
        told.update(np.ascontiguousarray(values))
    return told.hexdigest()[:16]
