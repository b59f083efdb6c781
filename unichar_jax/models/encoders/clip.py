"""CLIP: pictures and texts in one space (ViT-L/14 by default), for text-image match.

``encode_images`` and ``encode_texts`` give unit vectors whose dot product is the cosine of the match.
Pictures come preprocessed (``scoring/preprocess.py``), texts as token ids; neither is done here.

Source: CLIP (arXiv 2103.00020), in the shape of the Hub's ``openai/clip-vit-large-patch14``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from unichar_jax.models import params
from unichar_jax.models.encoders import transformer
from unichar_jax.models.encoders.transformer import PatchEmbedding, TransformerConfig, unit
from unichar_jax.models.layers import Dense, Embedding, LayerNorm
from unichar_jax.records import Record


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of both towers; the defaults are ViT-L/14."""

    text: TransformerConfig = field(
        default_factory=lambda: TransformerConfig(768, 3072, 12, 12, 1e-5, "quick_gelu")
    )
    vision: TransformerConfig = field(
        default_factory=lambda: TransformerConfig(1024, 4096, 24, 16, 1e-5, "quick_gelu")
    )
    projection_dim: int = 768
    vocab_size: int = 49408
    max_length: int = 77
    end_of_text: int = 49407
    image_size: int = 224
    patch_size: int = 14

    @classmethod
    def from_hub(cls, config: Record) -> ClipConfig:
        """From the Hub's ``config.json``; what a file leaves out has the library's defaults."""
        text, vision = (config.inner(n) or Record(config.found, config.file, n, {}) for n in _TOWERS)
        vocab = text.whole("vocab_size", 49408)
        # OpenAI's files say 2, which is wrong: the library then takes the largest id, which ends every text.
        end = text.whole("eos_token_id", 49407, low=0)
        sizes = dict(
            projection_dim=config.whole("projection_dim", 512),
            vocab_size=vocab,
            max_length=text.whole("max_position_embeddings", 77),
            end_of_text=vocab - 1 if end == 2 else end,
            image_size=vision.whole("image_size", 224),
            patch_size=vision.whole("patch_size", 32),
        )
        towers = _tower(text, (512, 2048, 12, 8)), _tower(vision, (768, 3072, 12, 12))
        config.found.refuse()
        return cls(*(TransformerConfig(*tower) for tower in towers), **sizes)


_TOWERS = ("text_config", "vision_config")


def _tower(config: Record, defaults: tuple[int, int, int, int]) -> tuple[int, int, int, int, float, str]:
    hidden, inner, layers, heads = defaults
    return (
        config.whole("hidden_size", hidden),
        config.whole("intermediate_size", inner),
        config.whole("num_hidden_layers", layers),
        config.whole("num_attention_heads", heads),
        config.number("layer_norm_eps", 1e-5, 0, 1),
        config.choice("hidden_act", "quick_gelu", "gelu"),
    )


class ImageTower(nnx.Module):
    def __init__(self, cfg: ClipConfig):
        h = cfg.vision.hidden_size
        positions = (cfg.image_size // cfg.patch_size) ** 2 + 1
        self.patch_embedding = PatchEmbedding(cfg.patch_size, h, bias=False)
        self.class_embedding = params.declare((h,), (None,), params.normal(h**-0.5))
        self.position_embedding = Embedding(positions, h, (None, None), params.normal(0.02))
        self.pre_norm = LayerNorm(h, cfg.vision.norm_eps)
        self.layers = transformer.stack(cfg.vision)
        self.post_norm = LayerNorm(h, cfg.vision.norm_eps)
        self.projection = Dense(h, cfg.projection_dim, (None, None), bias=False)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = transformer.prepend(self.class_embedding[...], self.patch_embedding(images))
        x = self.pre_norm(x + self.position_embedding.embedding[...])
        return self.projection(self.post_norm(transformer.run(self.layers, x)[:, 0]))


class TextTower(nnx.Module):
    def __init__(self, cfg: ClipConfig):
        h = cfg.text.hidden_size
        self.token_embedding = Embedding(cfg.vocab_size, h, (None, None), params.normal(0.02))
        self.position_embedding = Embedding(cfg.max_length, h, (None, None), params.normal(0.02))
        self.layers = transformer.stack(cfg.text)
        self.final_norm = LayerNorm(h, cfg.text.norm_eps)
        self.projection = Dense(h, cfg.projection_dim, (None, None), bias=False)
        self.end_of_text = cfg.end_of_text

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.token_embedding(ids) + self.position_embedding.embedding[: ids.shape[1]]
        x = self.final_norm(transformer.run(self.layers, x, causal=True))
        # The first end token stands for the text; attention is causal, so the padding after it is not seen.
        end = jnp.argmax(ids == self.end_of_text, axis=1)
        return self.projection(x[jnp.arange(len(ids)), end])


class Clip(nnx.Module):
    def __init__(self, cfg: ClipConfig):
        self.image = ImageTower(cfg)
        self.text = TextTower(cfg)
        self.logit_scale = params.declare((), (), params.zeros)  # part of the file; cosines need none
        self.cfg = cfg

    def encode_images(self, images: jax.Array) -> jax.Array:
        """Preprocessed images ``[B, size, size, 3]`` to unit vectors ``[B, projection_dim]``."""
        return unit(self.image(images))

    def encode_texts(self, ids: jax.Array) -> jax.Array:
        """Token ids ``[B, L]``, each row with an end token, to unit vectors ``[B, projection_dim]``."""
        return unit(self.text(ids))

    def logits(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """CLIP's own logits ``[images, texts]`` of unit vectors: cosines times the learned scale."""
        return jnp.exp(self.logit_scale[...]) * images @ texts.T
