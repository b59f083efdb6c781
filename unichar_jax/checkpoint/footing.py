"""What adapters stand on: some of their base's own values, kept in the adapters and compared where they are used.

Adapters of a second stage belong on the first stage's model; around the plain base they load as well, and
compute something else. A hash would take the same base for another one after a conversion, or once the first
stage's adapters were merged. So adapters carry values at fixed places of each expert's projections in the first
and the last layer, and a base is theirs if it has these values within what its dtype can say.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np

from unichar_jax.checkpoint.weights import Weights
from unichar_jax.config.model import ModelConfig
from unichar_jax.errors import UserError
from unichar_jax.models import lora
from unichar_jax.parallel.mesh import host

KEY = "unichar_base"  # in the metadata of the adapters' file
_VALUES = 64  # of each kernel
_SLACK = 16 * float(np.finfo(np.float32).eps)  # sums of adapters in another order


@dataclass(frozen=True)
class Footing:
    """Values ``[kernels, 64]`` of a base, float32, and the dtype that they had there."""

    values: np.ndarray
    dtype: np.dtype

    def to_metadata(self) -> dict[str, str]:
        encoded = base64.b64encode(self.values.astype("<f4").tobytes()).decode()
        return {KEY: json.dumps({"dtype": str(self.dtype), "values": encoded})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: Any) -> Footing | None:
        """What adapters say of their base; None if nothing, as those of others."""
        if KEY not in metadata:
            return None
        try:
            told = json.loads(metadata[KEY])
            values = np.frombuffer(base64.b64decode(told["values"], validate=True), "<f4")
            return cls(values.reshape(-1, _VALUES), np.dtype(told["dtype"]))
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise UserError(
                f"{where}: what it says of its base is damaged ({error}). Export it again."
            ) from None

    def differences(self, base: Footing) -> int:
        """How many values of a base are not these, beyond the rounding of the two dtypes."""
        if self.values.shape != base.values.shape:
            return base.values.size
        coarse = max(float(ml_dtypes.finfo(f.dtype).eps) for f in (self, base))
        scale = np.sqrt(np.mean(np.square(base.values), axis=1, keepdims=True))
        allowed = coarse * np.maximum(np.abs(self.values), np.abs(base.values)) + _SLACK * scale
        return int(np.count_nonzero(~(np.abs(self.values - base.values) <= allowed)))


_PLACES = [f"{expert}.{target}" for expert in lora.EXPERTS for target in lora.TARGETS]


def _layers(cfg: ModelConfig) -> list[int]:
    return sorted({0, cfg.decoder.num_layers - 1})


def _indices(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Rows and columns of a kernel's values: evenly spaced in its memory, with an odd step."""
    size = int(np.prod(shape))
    return np.unravel_index((np.arange(_VALUES) * (size // _VALUES | 1)) % size, shape)


def of_weights(weights: Weights, cfg: ModelConfig) -> Footing:
    """Of weights on disk, or as they are merged while they are read."""
    names = [f"decoder.layers.{i}.{place}.kernel" for place in _PLACES for i in _layers(cfg)]
    values = [x[_indices(x.shape)].astype(np.float32) for _, x in weights.read(names)]
    return Footing(np.stack(values), np.dtype(weights.infos[names[0]].dtype))


def of_arrays(arrays: Mapping[str, jax.Array], cfg: ModelConfig) -> Footing:
    """Of a model's arrays by module name, layers stacked, on any mesh; with several processes all must call this."""
    kernels = [arrays[f"decoder.layers.{place}.kernel"] for place in _PLACES]

    def take(kernels: list[jax.Array]) -> list[jax.Array]:
        rows = [x[np.array(_layers(cfg))][(slice(None), *_indices(x.shape[1:]))] for x in kernels]
        return [r.astype(np.float32) for r in rows]

    values = [host(x) for x in jax.jit(take)(kernels)]
    return Footing(np.concatenate(values), np.dtype(kernels[0].dtype))


def require(wanted: Footing, found: Footing, what: str) -> None:
    """Refuses weights that are not what adapters stand on; ``what`` begins the sentence."""
    if different := wanted.differences(found):
        raise UserError(
            f"{what}, and the weights given are others: {different:,} of {found.values.size:,} compared values differ."
            " Adapters of a second stage need the first stage's model. Use them with that; or make one folder of all"
            " stages, for the base of the first: unichar convert --adapters-of RUN OUT"
        )
