"""Accelerators by name, with their limits; and which of them is here.

Peaks are dense bf16, from Google's and NVIDIA's data sheets; link is one device's bandwidth to its neighbours
inside a slice or a node.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import jax

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device: bf16 FLOP/s, memory (bytes that a program may use), bytes/s of memory and of the links."""

    name: str
    platform: str
    flops: float
    memory: float
    bandwidth: float
    link: float


CHIPS: dict[str, Chip] = {
    c.name: c
    for c in (
        Chip("v5e", "tpu", 197e12, 15.75 * GIB, 819e9, 90e9),
        Chip("v5p", "tpu", 459e12, 95 * GIB, 2765e9, 270e9),
        Chip("v6e", "tpu", 918e12, 31.25 * GIB, 1640e9, 180e9),
        Chip("a100-40", "cuda", 312e12, 40e9, 1555e9, 300e9),
        Chip("a100-80", "cuda", 312e12, 80e9, 2039e9, 300e9),
        Chip("rtx4090", "cuda", 165e12, 24e9, 1008e9, 32e9),
        Chip("h100", "cuda", 989e12, 80e9, 3350e9, 450e9),
        Chip("h200", "cuda", 989e12, 141e9, 4800e9, 450e9),
    )
}

# What JAX calls a device, by its beginning, most specific first; and its name in the table of chips.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-PCIE-40GB": "a100-40",
    "NVIDIA A100": "a100-80",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
}


def device_name() -> str:
    """The devices' name in the table of chips; of others what JAX calls them, as a word."""
    kind = jax.devices()[0].device_kind
    known = next((name for start, name in _KINDS.items() if kind.startswith(start)), None)
    return known or re.sub(r"[^a-z0-9]+", "-", kind.lower())


@functools.cache
def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of all devices of the run together; None where the kind is not in the table."""
    name = device_name()
    return CHIPS[name].flops * jax.device_count() if name in CHIPS else None
