"""The attention kernels by name. Each has ``prepare(q_meta, k_meta) -> data`` and ``run(data, q, k, v)``.

``reference`` holds all scores; ``chunked`` runs on anything without L^2 memory; ``splash`` is the TPU's, ``flash``
NVIDIA's.
``cudnn`` calls that library, with the whole mask.
``auto`` takes the best one for the platform (on a GPU: the fastest that is right there, ``choice.py``) and says once in
the log which and why. A kernel that is asked for by name and cannot run is an error, never another kernel.

What a backward pass can keep of a kernel carries the checkpoint name ``attention_out`` (``Compute.remat``).
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol

import jax

from unichar_jax.errors import UserError, require_known
from unichar_jax.models.kernels.chunked import Chunked
from unichar_jax.models.kernels.cudnn import Cudnn
from unichar_jax.models.kernels.flash import Flash
from unichar_jax.models.kernels.reference import Reference
from unichar_jax.models.kernels.sharded import platform
from unichar_jax.models.kernels.splash import Splash
from unichar_jax.models.streams import TokenMeta

_log = logging.getLogger(__name__)


class Kernel(Protocol):
    """An attention kernel.

    ``prepare`` runs once per forward pass, ``run`` in every layer. Queries and keys are the same tokens; with
    ``over_cache`` there may be more keys, cached ones before them (absent means False).
    ``unsupported`` says why the kernel cannot run on a platform, or None if it can.
    """

    def prepare(self, q: TokenMeta, k: TokenMeta) -> Any: ...

    def run(self, data: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array: ...

    def unsupported(self, platform: str) -> str | None: ...


KERNELS: dict[str, Kernel] = {
    "reference": Reference(),
    "chunked": Chunked(),
    "cudnn": Cudnn(),
    "flash": Flash(),
    "flash_interpret": Flash(interpret=True),
    "splash": Splash(),
    "splash_interpret": Splash(interpret=True),
}


_settled: dict[str, tuple[str, str]] = {}


def settle(name: str, reason: str) -> None:
    """From now on ``auto`` is this kernel on the platform of the default device."""
    _settled[platform()] = name, reason
    _announce.cache_clear()


def choose(platform: str) -> tuple[str, str]:
    """The kernel that ``auto`` stands for on a platform, and the reason in words."""
    if platform in _settled:
        return _settled[platform]
    if platform == "tpu":
        reason = KERNELS["splash"].unsupported(platform)
        if reason is None:
            return "splash", "the TPU kernel skips what the mask hides and holds no scores"
        return "chunked", f"splash cannot run: {reason}"
    if platform in ("gpu", "cuda"):
        return "flash", "the GPU kernel skips what the mask hides and holds no scores"
    return "chunked", "it skips what the mask hides and holds no scores, anywhere"


@functools.cache
def _announce(platform: str) -> str:
    name, reason = choose(platform)
    _log.info("attention kernel: %s (%s)", name, reason)
    return name


def resolve(name: str) -> str:
    """``auto`` becomes a kernel's name, logged once; any other name is checked and returned.

    Raises:
      UserError: the kernel is unknown, or cannot run on the platform of the mesh (or the default device).
    """
    if name == "auto":
        return _announce(platform())
    require_known("attention kernel", name, KERNELS, "auto or one of")
    reason = KERNELS[name].unsupported(platform())
    if reason:
        raise UserError(
            f"attention kernel '{name}' cannot run here: {reason}. Set compute.attention to auto, or to"
            " chunked, which runs everywhere."
        )
    return name


def get(name: str) -> Kernel:
    """The kernel of that name; a ``UserError`` if it is unknown or cannot run here."""
    return KERNELS[resolve(name)]
