"""The autoencoder against a plain PyTorch reading of the published architecture, written below.

The reading uses PyTorch's own convolution, group norm and attention and the names of ``ae.safetensors``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from tests.parity.golden import assert_close  # noqa: E402
from tests.torch_parity.common import TOLERANCE, names, numpy_tensors, randomize  # noqa: E402
from unichar_jax.checkpoint import table  # noqa: E402
from unichar_jax.config.model import AutoencoderConfig  # noqa: E402
from unichar_jax.models.autoencoder import Autoencoder  # noqa: E402

pytestmark = pytest.mark.torch

CFG = AutoencoderConfig(channels=8, multipliers=(1, 2, 4), num_res_blocks=2, latent_channels=5, norm_groups=4)


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(CFG.norm_groups, channels, eps=1e-6)


def _conv(c_in: int, c_out: int) -> nn.Module:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class _Res(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(c_in), _conv(c_in, c_out)
        self.norm2, self.conv2 = _norm(c_out), _conv(c_out, c_out)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Attn(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.norm = _norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(out)


class _Down(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Up(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = _conv(c, c)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _mid(c: int) -> nn.Module:
    return nn.ModuleDict(dict(block_1=_Res(c, c), attn_1=_Attn(c), block_2=_Res(c, c)))


def _run_mid(mid: nn.Module, x):
    return mid["block_2"](mid["attn_1"](mid["block_1"](x)))


class _Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        c, levels = CFG.channels, []
        self.conv_in = _conv(CFG.in_channels, c)
        for i, m in enumerate(CFG.multipliers):
            wide = CFG.channels * m
            parts = dict(block=nn.ModuleList([_Res(c, wide), _Res(wide, wide)]))
            if i < len(CFG.multipliers) - 1:
                parts["downsample"] = _Down(wide)
            levels.append(nn.ModuleDict(parts))
            c = wide
        self.down, self.mid = nn.ModuleList(levels), _mid(c)
        self.norm_out, self.conv_out = _norm(c), _conv(c, 2 * CFG.latent_channels)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for block in level["block"]:
                x = block(x)
            if "downsample" in level:
                x = level["downsample"](x)
        return self.conv_out(F.silu(self.norm_out(_run_mid(self.mid, x))))


class _Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        c, levels = CFG.channels * CFG.multipliers[-1], {}
        self.conv_in, self.mid = _conv(CFG.latent_channels, c), _mid(c)
        for i in reversed(range(len(CFG.multipliers))):
            wide = CFG.channels * CFG.multipliers[i]
            blocks = nn.ModuleList([_Res(c, wide), _Res(wide, wide), _Res(wide, wide)])
            parts = dict(block=blocks)
            if i > 0:
                parts["upsample"] = _Up(wide)
            levels[i] = nn.ModuleDict(parts)
            c = wide
        self.up = nn.ModuleList([levels[i] for i in range(len(levels))])
        self.norm_out, self.conv_out = _norm(c), _conv(c, CFG.in_channels)

    def forward(self, z):
        x = _run_mid(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"](x)
        return self.conv_out(F.silu(self.norm_out(x)))


@pytest.fixture(scope="module")
def pair():
    theirs = randomize(nn.ModuleDict(dict(encoder=_Encoder(), decoder=_Decoder())))
    tensors, entries = numpy_tensors(theirs), table.autoencoder_table(CFG)
    assert set(tensors) == names(entries)
    return theirs, table.module_from_torch(Autoencoder(CFG), entries, tensors)


def _nchw(x) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def test_encode(pair):
    theirs, ours = pair
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 3, 24, 16)).astype(np.float32)
    eps = rng.standard_normal((2, CFG.latent_channels, 6, 4)).astype(np.float32)
    with torch.no_grad():
        mean, logvar = theirs["encoder"](torch.tensor(images)).chunk(2, dim=1)
        latent = CFG.scale * (mean + torch.exp(0.5 * logvar) * torch.tensor(eps) - CFG.shift)
    got_mean, got_logvar = ours.moments(jnp.asarray(images.transpose(0, 2, 3, 1)))
    got_latent = ours.sample(got_mean, got_logvar, eps.transpose(0, 2, 3, 1))
    assert_close(_nchw(got_mean), mean.numpy(), TOLERANCE, "mean")
    assert_close(_nchw(got_logvar), logvar.numpy(), TOLERANCE, "logvar")
    assert_close(_nchw(got_latent), latent.numpy(), TOLERANCE, "latent")


def test_decode(pair):
    theirs, ours = pair
    z = np.random.default_rng(1).standard_normal((2, CFG.latent_channels, 6, 4)).astype(np.float32)
    with torch.no_grad():
        expected = theirs["decoder"](torch.tensor(z) / CFG.scale + CFG.shift).numpy()
    assert_close(_nchw(ours.decode(jnp.asarray(z.transpose(0, 2, 3, 1)))), expected, TOLERANCE, "image")
