"""LPIPS on AlexNet: how different two pictures look, for diversity.

``features`` gives the five normalised activations of a picture, ``distance`` compares two sets of them, so
that the distances of all pairs of a group need each picture's features once. Weights: torchvision's AlexNet
and the five linear heads of LPIPS 0.1.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
(arXiv 1801.03924); Krizhevsky, "One weird trick" (arXiv 1404.5997).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unichar_jax.models import params

SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
_EPS = 1e-10

Features = tuple[jax.Array, ...]


@dataclass(frozen=True)
class LpipsConfig:
    """Widths of the five convolutions; only tests change them."""

    widths: tuple[int, int, int, int, int] = (64, 192, 384, 256, 256)


class Conv(nnx.Module):
    """Convolution with symmetric padding, then ReLU; NHWC."""

    def __init__(self, c_in: int, c_out: int, size: int, stride: int, pad: int):
        init = params.uniform_fan_in(c_in * size * size)
        self.kernel = params.declare((size, size, c_in, c_out), (None,) * 4, init)
        self.bias = params.declare((c_out,), (None,), init)
        self.stride, self.pad = stride, pad

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            window_strides=(self.stride, self.stride),
            padding=((self.pad, self.pad),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(y + self.bias[...])


class Head(nnx.Module):
    """A weight for each channel: a 1 x 1 convolution to one channel, without bias."""

    def __init__(self, channels: int):
        init = params.uniform_fan_in(channels)
        self.kernel = params.declare((1, 1, channels, 1), (None,) * 4, init)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[0, 0]


def _max_pool(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


class Lpips(nnx.Module):
    def __init__(self, cfg: LpipsConfig | None = None):
        a, b, c, d, e = (cfg or LpipsConfig()).widths
        self.conv = nnx.List(
            [
                Conv(3, a, size=11, stride=4, pad=2),
                Conv(a, b, size=5, stride=1, pad=2),
                Conv(b, c, size=3, stride=1, pad=1),
                Conv(c, d, size=3, stride=1, pad=1),
                Conv(d, e, size=3, stride=1, pad=1),
            ]
        )
        self.lin = nnx.List([Head(n) for n in (a, b, c, d, e)])

    def features(self, images: jax.Array) -> Features:
        """Images ``[B, H, W, 3]`` in [0, 1], sides >= 31, to five maps ``[B, h, w, C]`` of unit vectors."""
        x = ((2 * images - 1) - SHIFT) / SCALE
        maps = []
        for i, conv in enumerate(self.conv):
            x = conv(_max_pool(x) if i in (1, 2) else x)
            length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
            maps.append(x / (length + _EPS))
        return tuple(maps)

    def distance(self, a: Features, b: Features) -> jax.Array:
        """LPIPS ``[B]`` of features that broadcast against each other."""
        maps = (lin(jnp.square(x - y)) for lin, x, y in zip(self.lin, a, b, strict=True))
        return jnp.stack([m.mean(axis=(1, 2, 3)) for m in maps]).sum(axis=0)

    def pairwise(self, features: Features) -> jax.Array:
        """LPIPS of all pairs, ``[B, B]``; one row at a time, to hold one row of differences."""
        return jax.lax.map(lambda one: self.distance(tuple(x[None] for x in one), features), features)
