"""DINOv2 (ViT-B/14 by default): what a picture shows, without words, for identity.

The feature of a picture is the class token of the normed last layer. The learned positions are those of a
518-pixel picture; other sizes interpolate them as the Hub's library does.

Source: DINOv2 (arXiv 2304.07193), in the shape of the Hub's ``facebook/dinov2-base``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unichar_jax.models import params
from unichar_jax.models.encoders import transformer
from unichar_jax.models.encoders.transformer import PatchEmbedding, TransformerConfig
from unichar_jax.models.layers import LayerNorm
from unichar_jax.records import Record


@dataclass(frozen=True)
class Dinov2Config:
    """Sizes; the defaults are ViT-B/14. ``image_size`` is that of the learned positions, not of the input."""

    transformer: TransformerConfig = field(
        default_factory=lambda: TransformerConfig(768, 3072, 12, 12, 1e-6, "gelu", layer_scale=True)
    )
    image_size: int = 518
    patch_size: int = 14

    @classmethod
    def from_hub(cls, config: Record) -> Dinov2Config:
        """From the Hub's ``config.json``; what a file leaves out has the library's defaults."""
        if config.flag("use_swiglu_ffn"):
            config.error(
                "use_swiglu_ffn",
                "False",
                "True",
                "use dinov2-small, dinov2-base or dinov2-large (giant alone has it)",
            )
        hidden = config.whole("hidden_size", 768)
        sizes = dict(
            hidden_size=hidden,
            mlp_size=int(hidden * config.number("mlp_ratio", 4, 0.01, 64)),
            num_layers=config.whole("num_hidden_layers", 12),
            num_heads=config.whole("num_attention_heads", 12),
            norm_eps=config.number("layer_norm_eps", 1e-6, 0, 1),
            activation=config.choice("hidden_act", "gelu", "quick_gelu"),
        )
        image_size, patch_size = config.whole("image_size", 224), config.whole("patch_size", 16)
        config.found.refuse()
        return cls(TransformerConfig(**sizes, layer_scale=True), image_size, patch_size)


class Dinov2(nnx.Module):
    def __init__(self, cfg: Dinov2Config):
        h, side = cfg.transformer.hidden_size, cfg.image_size // cfg.patch_size
        self.patch_embedding = PatchEmbedding(cfg.patch_size, h, bias=True)
        self.class_embedding = params.declare((1, 1, h), (None,) * 3, params.normal(0.02))
        self.position_embedding = params.declare((1, side * side + 1, h), (None,) * 3, params.normal(0.02))
        self.layers = transformer.stack(cfg.transformer)
        self.norm = LayerNorm(h, cfg.transformer.norm_eps)
        self.cfg = cfg

    def __call__(self, images: jax.Array) -> jax.Array:
        """Preprocessed images ``[B, H, W, 3]`` (sides multiples of the patch) to features ``[B, hidden]``."""
        grid = (images.shape[1] // self.cfg.patch_size, images.shape[2] // self.cfg.patch_size)
        x = transformer.prepend(self.class_embedding[...], self.patch_embedding(images))
        x = x + self._positions(grid).astype(x.dtype)
        return self.norm(transformer.run(self.layers, x)[:, 0])

    def _positions(self, grid: tuple[int, int]) -> jax.Array:
        """The learned positions, interpolated to another grid where it is not the learned one."""
        learned = self.position_embedding[...]
        side = self.cfg.image_size // self.cfg.patch_size
        if grid == (side, side):
            return learned
        table = learned[0, 1:].reshape(side, side, -1)
        rows, columns = (jnp.asarray(bicubic_matrix(side, n)) for n in grid)
        table = jnp.einsum("rs,cz,szh->rch", rows, columns, table.astype(jnp.float32))
        return jnp.concatenate([learned[:, :1], table.reshape(1, grid[0] * grid[1], -1)], axis=1)


@functools.lru_cache(maxsize=16)
def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """PyTorch's bicubic interpolation along one axis as a matrix, float32 ``[new_size, size]``.

    Cubic convolution with a = -0.75, half-pixel centres, edges repeated, no antialiasing:
    ``torch.nn.functional.interpolate(mode="bicubic")``. (JAX's and PIL's cubic filters have a = -0.5.)
    """
    a, matrix = -0.75, np.zeros((new_size, size))
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    for tap in range(-1, 3):
        source = np.floor(centre) + tap
        d = np.abs(centre - source)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        columns = np.clip(source, 0, size - 1).astype(int)
        np.add.at(matrix, (np.arange(new_size), columns), np.where(d <= 1, near, far))
    return matrix.astype(np.float32)
