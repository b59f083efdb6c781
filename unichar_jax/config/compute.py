"""How a model computes, and over which devices: the settings that change speed and memory, never the result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  numpy knows "bfloat16" once it is imported
import numpy as np

from unichar_jax.errors import UserError, require_known

REMAT_POLICIES = ("none", "full", "offload_inputs", "attention", "most")


@dataclass(frozen=True)
class Compute:
    """How the model computes; nothing here changes what it computes.

    Attributes:
      dtype: of activations and of the weights' compute copy ("bfloat16" or "float32").
      remat: what the backward pass recomputes. "none": nothing; "full": everything but layer inputs;
        "attention": keeps q, k, v and the attention output; "most": keeps gate and up too; "offload_inputs":
        "full" with the layer inputs in host memory.
      attention: kernel name (``models/kernels``).
      unroll: layers per iteration of the scan.
    """

    dtype: str = "bfloat16"
    remat: str = "none"
    attention: str = "reference"
    unroll: int = 1

    def __post_init__(self) -> None:
        require_known("compute.remat:", self.remat, REMAT_POLICIES)
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"compute.dtype: expected bfloat16 or float32, got '{self.dtype}'.")

    @property
    def jax_dtype(self) -> np.dtype:
        return np.dtype(self.dtype)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; ``-1`` (at most one) takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = self.sizes
        if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
            raise UserError(
                f"mesh: data={self.data} fsdp={self.fsdp} tensor={self.tensor}: each must be a positive"
                " number, and at most one may be -1 (take what is left)."
            )

    @property
    def sizes(self) -> tuple[int, int, int]:
        return (self.data, self.fsdp, self.tensor)

    def resolve(self, num_devices: int) -> tuple[int, int, int]:
        """Axis sizes for a number of devices; a ``UserError`` where they do not multiply out."""
        sizes = list(self.sizes)
        known = math.prod(s for s in sizes if s != -1)
        if -1 in sizes and num_devices % known == 0:
            sizes[sizes.index(-1)] = num_devices // known
        if math.prod(sizes) != num_devices:
            raise UserError(
                f"mesh: data={self.data} x fsdp={self.fsdp} x tensor={self.tensor} does not make"
                f" {num_devices} devices; change one of them (or give -1 to one)."
            )
        return sizes[0], sizes[1], sizes[2]
