"""Described devices, to compile for without having any.

``v5e:8x8`` is a TPU slice, ``h200:1x1x8`` are GPUs (slices x hosts x devices). TPU programs are compiled by
libtpu, which runs on a CPU host; NVIDIA's by the CUDA plugin, which can be told a GPU's properties in place
of finding one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from unichar_jax.errors import UserError, require_known
from unichar_jax.parallel.chips import CHIPS, Chip

# What the CUDA compiler asks of a device, where none is there (a GpuTargetConfigProto in text).
_TARGET = """gpu_device_info {{
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  core_count: {cores}  fpus_per_core: {units}  threads_per_warp: 32
  threads_per_block_limit: 1024  threads_per_core_limit: {threads}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}  shared_memory_per_block_optin: {most_shared}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}  device_memory_size: {memory:.0f}
  l2_cache_size: {cache}  clock_rate_ghz: {clock}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name}"
"""


@dataclass(frozen=True)
class _Architecture:
    """Of a GPU, from CUDA's tables: units and threads of a core, bytes of its shared memory and of the L2 cache."""

    capability: tuple[int, int]
    cores: int
    units: int
    threads: int
    shared: int
    most_shared: int
    cache: int
    clock: float


_HOPPER = _Architecture((9, 0), 132, 128, 2048, 233472, 232448, 52428800, 1.98)
_AMPERE = _Architecture((8, 0), 108, 64, 2048, 167936, 166912, 41943040, 1.41)
_ADA = _Architecture((8, 9), 128, 128, 1536, 102400, 101376, 75497472, 2.52)
_ARCHITECTURES = {"h100": _HOPPER, "h200": _HOPPER, "a100-40": _AMPERE, "a100-80": _AMPERE, "rtx4090": _ADA}


@dataclass(frozen=True)
class Topology:
    """``size`` devices of one kind. ``text`` is how the user named it."""

    text: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Reads ``chip:AxB`` or ``chip:AxBxC``."""
        name, _, shape = text.partition(":")
        require_known(f"topology '{text}': chip", name, CHIPS)
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
            example = "h200:1x1x8" if CHIPS[name].platform == "cuda" else "v5e:8x8"
            raise UserError(f"topology '{text}': expected chip:AxB or chip:AxBxC, such as {example}.")
        return cls(text, CHIPS[name], tuple(map(int, shape.split("x"))))

    def devices(self) -> Sequence[Any]:
        """Described devices: fit for a mesh and for compilation, not for running.

        Raises:
          UserError: the compiler for this platform is not installed, or refuses the topology.
        """
        from jax.experimental import topologies

        try:
            if self.chip.platform == "tpu":
                _require_tpu_compiler()
                return topologies.get_topology_desc(platform="tpu", topology_name=self.text).devices
            _require_cuda_compiler()
            return topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                topology="x".join(map(str, (1,) * (3 - len(self.shape)) + self.shape)),
                target_config=_TARGET.format(
                    name=self.chip.name.upper(),
                    memory=self.chip.memory,
                    bandwidth=self.chip.bandwidth,
                    **dataclasses.asdict(_ARCHITECTURES[self.chip.name]),
                ),
            ).devices
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            raise UserError(
                f"topology '{self.text}': the compiler refuses it: {str(error).splitlines()[0]}"
            ) from None


def _require_tpu_compiler() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for TPUs needs the TPU compiler (libtpu), which runs on a CPU host too:"
            " pip install 'unichar-jax[tpu]'."
        )
    # Nothing is run: no metadata server to ask, no chip to lock.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def _require_cuda_compiler() -> None:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(
            "planning for NVIDIA GPUs needs the CUDA compiler, which runs on a CPU host too:"
            " pip install 'unichar-jax[cuda]', or without CUDA's libraries: pip install 'unichar-jax[gpu-compiler]'."
        )
