"""The attention kernels by name. Each has ``prepare(q_meta, k_meta) -> data`` and ``run(data, q, k, v)``.

``reference`` builds the dense mask and the full scores: right everywhere, memory of L^2. Faster kernels register here.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax

from unichar_jax.errors import UserError, did_you_mean
from unichar_jax.models.attention import dense_attention
from unichar_jax.models.streams import TokenMeta, visible


class Kernel(Protocol):
    """An attention kernel; ``why_not`` says why it cannot run here, or None if it can."""

    def prepare(self, q: TokenMeta, k: TokenMeta) -> Any: ...

    def run(self, data: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array: ...

    def why_not(self) -> str | None: ...


class Reference:
    """Dense mask, full scores."""

    def prepare(self, q: TokenMeta, k: TokenMeta) -> jax.Array:
        return visible(q, k)

    def run(self, data: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dense_attention(data, q, k, v)

    def why_not(self) -> str | None:
        return None


KERNELS: dict[str, Kernel] = {"reference": Reference()}


def get(name: str) -> Kernel:
    """The kernel of that name; a ``UserError`` if it is unknown or cannot run on this backend."""
    if name not in KERNELS:
        raise UserError(
            f"attention kernel '{name}' is unknown{did_you_mean(name, KERNELS)}; expected one of"
            f" {', '.join(KERNELS)}."
        )
    reason = KERNELS[name].why_not()
    if reason:
        raise UserError(f"attention kernel '{name}' cannot run here: {reason}")
    return KERNELS[name]
