"""FLUX's image autoencoder: pictures to latents and back.

Convolutional encoder and decoder with group normalisation, one attention block at the lowest resolution, and
a diagonal Gaussian posterior. Layout here is NHWC; kernels are HWIO. Attention projections are 1x1
convolutions in the published file and plain dense kernels here. The blocks' names follow the published file
so that its table of names stays short. Never trained by Unified-SFT: latents are computed once per image and
cached.

Source: FLUX.1's autoencoder as used by BAGEL (arXiv 2505.14683); shapes in the class docstrings.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from unichar_jax.config.model import AutoencoderConfig
from unichar_jax.models import params
from unichar_jax.models.layers import Dense

POSITIONS_AT_ONCE = 2**18
"""Positions of the arrays that one convolution takes, those of a picture of 512 pixels; larger go in strips."""

QUERIES_AT_ONCE = 1024
"""Positions that look at all others together."""

_EPS = 1e-6


class Conv(nnx.Module):
    """k x k convolution, NHWC; ``stride`` 2 pads one row and column at the bottom and right only.

    It multiplies in its kernel's dtype and returns its input's.
    """

    def __init__(self, c_in: int, c_out: int, size: int = 3, stride: int = 1):
        init = params.uniform_fan_in(c_in * size * size)
        self.kernel = params.declare((size, size, c_in, c_out), (None,) * 4, init)
        self.bias = params.declare((c_out,), (None,), init)
        self.size, self.stride = size, stride

    def __call__(self, x: jax.Array) -> jax.Array:
        pad = (self.size // 2, self.size // 2) if self.stride == 1 else (0, 1)
        kernel = self.kernel[...]

        def convolved(x: jax.Array, rows: tuple[int, int]) -> jax.Array:
            y = jax.lax.conv_general_dilated(
                x.astype(kernel.dtype),
                kernel,
                window_strides=(self.stride, self.stride),
                padding=(rows, pad),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            return y.astype(x.dtype)

        batch, height, width, _ = x.shape
        strips = -(-batch * height * width // POSITIONS_AT_ONCE)
        strips = next((n for n in range(strips, height) if height % n == 0), height)
        if strips == 1 or self.stride != 1:
            return convolved(x, pad) + self.bias[...]
        # Strips of rows with the rows beside them: the same sums, and a bound on what the search for the fastest
        # algorithm tries.
        rows, x = height // strips, jnp.pad(x, ((0, 0), pad, (0, 0), (0, 0)))
        strip = lambda i: jax.lax.dynamic_slice_in_dim(x, i * rows, rows + self.size - 1, axis=1)  # noqa: E731
        y = jax.lax.map(lambda i: convolved(strip(i), (0, 0)), jnp.arange(strips))
        return jnp.moveaxis(y, 0, 1).reshape(batch, height, width, -1) + self.bias[...]


class GroupNorm(nnx.Module):
    """Group normalisation over (height, width, channels of the group); statistics in float32."""

    def __init__(self, channels: int, groups: int):
        self.scale = params.declare((channels,), (None,), params.ones)
        self.bias = params.declare((channels,), (None,), params.zeros)
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - self._group_mean(y)
        y = y * jax.lax.rsqrt(self._group_mean(jnp.square(y)) + _EPS)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)

    def _group_mean(self, x: jax.Array) -> jax.Array:
        """Mean over each group, ``[B, 1, 1, C]``: per channel first, so that the big array keeps its
        layout."""
        b, _, _, c = x.shape
        mean = x.mean(axis=(1, 2)).reshape(b, self.groups, c // self.groups).mean(axis=-1)
        return jnp.repeat(mean, c // self.groups, axis=-1)[:, None, None, :]


class ResBlock(nnx.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        self.norm1 = GroupNorm(c_in, groups)
        self.conv1 = Conv(c_in, c_out)
        self.norm2 = GroupNorm(c_out, groups)
        self.conv2 = Conv(c_out, c_out)
        self.nin_shortcut = Conv(c_in, c_out, size=1) if c_in != c_out else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nnx.Module):
    """Single-head attention over all positions of one image."""

    def __init__(self, channels: int, groups: int):
        self.norm = GroupNorm(channels, groups)
        dims = (None, None)
        self.q = Dense(channels, channels, dims)
        self.k = Dense(channels, channels, dims)
        self.v = Dense(channels, channels, dims)
        self.proj_out = Dense(channels, channels, dims)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        h = self.norm(x).reshape(b, height * width, c)
        q, k, v = self.q(h), self.k(h), self.v(h)

        def look(q: jax.Array) -> jax.Array:
            scores = jnp.einsum("bc,bkc->bk", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(scores * c**-0.5, axis=-1).astype(v.dtype)
            return jnp.einsum("bk,bkc->bc", weights, v)

        # A picture of 1,024 pixels has 16,384 positions: the scores of all at once are a gigabyte.
        h = jnp.moveaxis(jax.lax.map(look, jnp.moveaxis(q, 1, 0), batch_size=QUERIES_AT_ONCE), 0, 1)
        return x + self.proj_out(h).reshape(x.shape)


class Mid(nnx.Module):
    def __init__(self, channels: int, groups: int):
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nnx.Module):
    """The blocks of one resolution, and the convolution that leaves it (``resample``), if any."""

    def __init__(
        self, c_in: int, c_out: int, blocks: int, groups: int, *, down: bool = False, up: bool = False
    ):
        sizes = [(c_in if i == 0 else c_out, c_out) for i in range(blocks)]
        self.block = nnx.List([ResBlock(a, b, groups) for a, b in sizes])
        self.downsample = Conv(c_out, c_out, stride=2) if down else None
        self.upsample = Conv(c_out, c_out) if up else None

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return x


class Encoder(nnx.Module):
    def __init__(self, cfg: AutoencoderConfig):
        widths = [cfg.channels * m for m in cfg.multipliers]
        last = len(widths) - 1
        self.conv_in = Conv(cfg.in_channels, cfg.channels)
        self.down = nnx.List(
            [
                Level(c_in, c_out, cfg.num_res_blocks, cfg.norm_groups, down=i < last)
                for i, (c_in, c_out) in enumerate(zip([cfg.channels, *widths], widths, strict=False))
            ]
        )
        self.mid = Mid(widths[-1], cfg.norm_groups)
        self.norm_out = GroupNorm(widths[-1], cfg.norm_groups)
        self.conv_out = Conv(widths[-1], 2 * cfg.latent_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Level i of ``up`` works at the resolution of the encoder's level i; the last one runs first."""

    def __init__(self, cfg: AutoencoderConfig):
        widths = [cfg.channels * m for m in cfg.multipliers]
        inputs = [*widths[1:], widths[-1]]
        self.conv_in = Conv(cfg.latent_channels, widths[-1])
        self.mid = Mid(widths[-1], cfg.norm_groups)
        self.up = nnx.List(
            [
                Level(inputs[i], widths[i], cfg.num_res_blocks + 1, cfg.norm_groups, up=i > 0)
                for i in range(len(widths))
            ]
        )
        self.norm_out = GroupNorm(widths[0], cfg.norm_groups)
        self.conv_out = Conv(widths[0], cfg.in_channels)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid(self.conv_in(z))
        for level in reversed(list(self.up)):
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Autoencoder(nnx.Module):
    """Images ``[B, H, W, 3]`` in [-1, 1] to scaled latents ``[B, H/8, W/8, C]`` and back."""

    def __init__(self, cfg: AutoencoderConfig):
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.cfg = cfg

    def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Posterior mean and log-variance, each ``[B, h, w, C]``, before scaling; no clamp."""
        mean, logvar = jnp.split(self.encoder(images), 2, axis=-1)
        return mean, logvar

    def scale_latent(self, z: jax.Array) -> jax.Array:
        return self.cfg.scale * (z - self.cfg.shift)

    def sample(self, mean: jax.Array, logvar: jax.Array, eps: jax.Array | None) -> jax.Array:
        """A scaled latent from the posterior; ``eps`` standard normal, or None for the mean."""
        z = mean if eps is None else mean + jnp.exp(0.5 * logvar) * eps
        return self.scale_latent(z)

    def encode(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        mean, logvar = self.moments(images)
        eps = None if key is None else jax.random.normal(key, mean.shape, mean.dtype)
        return self.sample(mean, logvar, eps)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Scaled latents to images; in [-1, 1] up to overshoot (clip when making pixels)."""
        return self.decoder(latents / self.cfg.scale + self.cfg.shift)


def decoding_in(autoencoder: Autoencoder, dtype: str) -> Autoencoder:
    """The autoencoder with a decoder whose convolutions multiply in ``dtype``; all else stays as it is.

    In bfloat16 half of the memory, and none of the algorithms for float32 that ask for tens of gigabytes. What lies
    between convolutions, and the first and the last of them, whose rounding would show most, stay in float32: on
    the mini autoencoder the picture moves by 0.1 grey levels in the mean (measured).
    """

    def lower(name: str, x: jax.Array) -> jax.Array:
        inner = (
            name.startswith("decoder.") and x.ndim == 4 and "conv_in" not in name and "conv_out" not in name
        )
        return x.astype(dtype) if inner else x

    return params.map_named(lower, autoencoder)


def patchify(latents: jax.Array, patch: int) -> jax.Array:
    """``[..., h*p, w*p, C]`` -> ``[..., h*w, p*p*C]``: rows of the grid first, channel fastest inside a
    token."""
    *lead, height, width, c = latents.shape
    h, w = height // patch, width // patch
    x = latents.reshape(*lead, h, patch, w, patch, c)
    n = len(lead)
    x = jnp.transpose(x, (*range(n), n, n + 2, n + 1, n + 3, n + 4))
    return x.reshape(*lead, h * w, patch * patch * c)


def unpatchify(tokens: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
    """Inverse of ``patchify`` for a grid of ``(h, w)`` tokens."""
    *lead, _, width = tokens.shape
    h, w = grid
    c = width // patch**2
    x = tokens.reshape(*lead, h, w, patch, patch, c)
    n = len(lead)
    x = jnp.transpose(x, (*range(n), n, n + 2, n + 1, n + 3, n + 4))
    return x.reshape(*lead, h * patch, w * patch, c)
