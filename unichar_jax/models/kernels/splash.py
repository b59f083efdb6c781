"""JAX's TPU splash attention under our hybrid mask, for any packing with one compilation and no L^2 memory.

Tokens are put into the order of ``layout.py``, once around the kernel. There the mask is a function of one
int32 per query, evaluated inside the kernel, and the blocks that it leaves empty are skipped; both are
traced, so the mask is data.

The library builds such masks on the host only. We build its ``MaskInfo`` ourselves and call the entry point
beneath its public classes; ``unsupported`` compares its signature with the one that this was written for.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unichar_jax.models.kernels import layout as layout_lib
from unichar_jax.models.kernels.layout import Code, Layout
from unichar_jax.models.kernels.sharded import per_device
from unichar_jax.models.streams import TokenMeta

try:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
except ImportError:  # reported by unsupported
    library = None

_ENTRY_POINT = (
    "fwd_mask_info dq_mask_info dkv_mask_info q k v segment_ids sinks is_mqa block_sizes save_residuals"
    " mask_value attn_logits_soft_cap residual_checkpoint_name mask_function interpret"
)
_MASK_INFO = "data_next mask_next block_mask partial_mask_blocks q_sequence is_dynamic_mask"


def _library_mismatch() -> str | None:
    found = "absent"
    if library is not None and hasattr(library, "_splash_attention"):
        found = " ".join(inspect.signature(library._splash_attention).parameters)
        if (found, " ".join(MaskInfo._fields)) == (_ENTRY_POINT, _MASK_INFO):
            return None
    return (
        f"the splash attention of jax {jax.__version__} is not the one that this kernel calls (jax 0.10.2's):"
        f" expected arguments '{_ENTRY_POINT}', found '{found}'; install jax==0.10.2"
    )


class Splash:
    """The kernel. ``interpret`` runs it step by step on any backend: for tests, far too slow for work."""

    def __init__(self, interpret: bool = False):
        self.interpret = interpret

    def unsupported(self, platform: str) -> str | None:
        if not self.interpret and platform != "tpu":
            return f"it is a TPU kernel, and this is '{platform}'"
        return _library_mismatch()

    def prepare(self, q: TokenMeta, k: TokenMeta) -> Layout:
        length = q.shape[1]
        if k.shape != q.shape:
            raise ValueError(f"splash is self-attention: {length} queries, {k.shape[1]} keys")
        places = layout_lib.capacity(length)
        if places > layout_lib.MAX_CAPACITY:
            raise ValueError(
                f"splash takes up to {layout_lib.MAX_CAPACITY} places, {length} tokens need {places}"
            )
        make = functools.partial(layout_lib.make_layout, places=places, block=layout_lib.block_size(length))
        return per_device(make, q)

    def run(self, data: Layout, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attention ``[B, L, heads, d]``; padding is zero, a row that found no room in the layout is NaN."""
        return per_device(functools.partial(_attend, self.interpret), data, q, k, v)


def _attend(interpret: bool, data: Layout, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # the kernel does not scale

    def to_places(x: jax.Array) -> jax.Array:
        return layout_lib.move(x, data.source, data.place).swapaxes(1, 2)

    attend_row = functools.partial(_attend_row, interpret)
    out = jax.lax.map(lambda row: attend_row(*row), (data, to_places(q), to_places(k), to_places(v)))
    out = layout_lib.move(out.swapaxes(1, 2), data.place, data.source)
    return jnp.where(data.overflow[:, None, None, None], jnp.nan, out)


def _attend_row(interpret: bool, data: Layout, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One row: the layout without its batch axis, q ``[heads, C, d]``, k and v ``[kv_heads, C, d]``."""
    places = data.source.shape[0]
    block = places // data.live.shape[0]
    info = functools.partial(
        MaskInfo, mask_next=None, block_mask=data.live[None].astype(jnp.int32), partial_mask_blocks=None
    )
    over_keys = info(data_next=_next_live(data.live, 1)[None], q_sequence=data.code)
    over_queries = info(data_next=_next_live(data.live, 0)[None], q_sequence=data.code)
    return library._splash_attention(
        over_keys,
        over_keys,
        over_queries,
        q,
        k,
        v,
        library.SegmentIds(data.sample, data.sample),
        is_mqa=False,
        block_sizes=library.BlockSizes(*[block] * 8),
        save_residuals=False,
        mask_value=library.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="attention_out",
        mask_function=_mask_function(places),
        interpret=interpret,
    )


@functools.cache  # the library compiles once per function object
def _mask_function(places: int) -> Callable[[Any, Any], jax.Array]:
    return Code.for_places(places).visible


def _next_live(live: jax.Array, axis: int) -> jax.Array:
    """For each block, the next live one along ``axis`` (the last one after it): what to fetch meanwhile."""
    here = jax.lax.broadcasted_iota(jnp.int32, live.shape, axis)
    size = live.shape[axis]
    following = jax.lax.cummin(jnp.where(live, here, size), axis=axis, reverse=True)
    last = jnp.where(live, here, 0).max(axis=axis, keepdims=True)
    return jnp.where(following < size, following, last)
