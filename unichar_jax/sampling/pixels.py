"""Latent tokens to pixels and back, in batches, on the device.

The only place where sampling meets the autoencoder. Batches go through it one picture of 512 pixels, or as many
smaller ones, at a time: its activations are far larger than the pictures, and what a GPU's library tries while
it looks for the fastest convolution is larger still.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unichar_jax.models import autoencoder as ae
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.sampling.tracing import jitted

_PIXELS_AT_ONCE = 2**18


@jitted(static_argnames=("grid", "patch"))
def decode_images(
    autoencoder: Autoencoder, latents: jax.Array, grid: tuple[int, int], patch: int
) -> jax.Array:
    """Pictures uint8 ``[B, H, W, 3]`` from scaled latents in patches ``[B, N, latent_dim]``.

    Values are clipped and truncated, not rounded, as in the reference.
    """

    def decode(tokens: jax.Array) -> jax.Array:
        return autoencoder.decode(ae.unpatchify(tokens, grid, patch)[None])[0]

    pixels = grid[0] * grid[1] * (patch * autoencoder.cfg.downsample) ** 2
    images = jax.lax.map(decode, latents, batch_size=max(1, _PIXELS_AT_ONCE // pixels))
    return (jnp.clip(images * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)


@jitted(static_argnames="patch")
def encode_images(
    autoencoder: Autoencoder, images: jax.Array, patch: int, key: jax.Array | None = None
) -> jax.Array:
    """Scaled latents in patches ``[B, N, latent_dim]`` of pictures ``[B, H, W, 3]`` in [-1, 1].

    With a key the posterior is sampled, as the reference does; without one this is its mean.
    """
    return ae.patchify(autoencoder.encode(images, key), patch)
