"""From strings and pictures to the parts that a model reads.

This is where input is judged: what is not valid text or not a sane picture is a ``UserError`` here, before
anything is queued. Pictures that are looked at go straight to the size that training used. The reference's
inference code first resizes them as if they were to be drawn, and so shows the model more and blurrier
patches than it was tuned on; ``as_shipped`` does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from unichar_jax.config.model import ModelConfig
from unichar_jax.data import images as image_io
from unichar_jax.data import words
from unichar_jax.data.images import ImageTransform, patchify, position_ids
from unichar_jax.data.transforms import Transforms
from unichar_jax.errors import UserError
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.sampling import pixels
from unichar_jax.sampling.context import Picture, Text
from unichar_jax.sampling.text import Tokenizer

ImageLike = Image.Image | str | Path
Size = tuple[int, int]
"""(height, width) in pixels."""


def open_picture(image: ImageLike) -> Image.Image:
    """A picture from a path, or one that the caller opened, as the model sees it; raises as the door does."""
    return image_io.open_image(image)


@dataclass(frozen=True)
class PartMaker:
    """Makes parts for one model.

    Attributes:
      cfg: of the model.
      tokenizer, autoencoder: of the same model; without an autoencoder nothing can be drawn or given.
      transforms: how pictures are prepared.
      as_shipped: resize pictures that are looked at twice, as the reference's inference does.
    """

    cfg: ModelConfig
    tokenizer: Tokenizer
    autoencoder: Autoencoder | None
    transforms: Transforms
    as_shipped: bool = False

    def text(self, prompt: str) -> Text:
        """A text framed as a turn: BOS, its tokens, EOS."""
        prompt = words.clean(prompt)
        return Text(tuple(self.cfg.special_tokens.frame(self.tokenizer.encode(prompt))))

    def look(self, image: ImageLike) -> Picture:
        """A picture to look at."""
        picture, transform = open_picture(image), self.transforms.look
        if self.as_shipped:
            picture = self.transforms.draw.resize(picture)
            smallest = 16 * transform.stride  # 224 pixels for BAGEL
            if not transform.square:
                transform = ImageTransform(transform.stride, smallest, transform.max_size)
        values = transform(picture)
        rows, columns = (n // transform.stride for n in values.shape[:2])
        grid = position_ids(rows, columns, self.cfg.vision.max_patches_per_side)
        return Picture("vit", patchify(values, transform.stride), grid)

    def given(self, image: ImageLike) -> Picture:
        """A picture as clean latents, for drawing another from it; the posterior's mean."""
        if self.autoencoder is None:
            raise UserError("there is no autoencoder, so no picture can be given; load one.")
        values = self.transforms.draw(open_picture(image))
        patch = self.cfg.latent_patch_size
        latents = pixels.encode_images(self.autoencoder, values[None], patch)
        grid = position_ids(*self.grid(values.shape[:2]), self.cfg.max_latent_size)
        return Picture("latent", np.asarray(latents[0], np.float32), grid)

    def given_size(self, image: ImageLike) -> Size:
        """(height, width) that a given picture has for the model."""
        width, height = self.transforms.draw.size(*open_picture(image).size)
        return height, width

    def grid(self, size: Size | None) -> tuple[int, int]:
        """Latent rows and columns of a picture of that size (default: the largest square of training)."""
        step = self.cfg.pixels_per_latent
        most = self.cfg.max_latent_size * step
        height, width = size or (self.transforms.draw.max_size,) * 2
        if any(side % step or not 0 < side <= most for side in (height, width)):
            raise UserError(
                f"size {height}x{width}: expected (height, width) in multiples of {step} pixels, at most"
                f" {most} each."
            )
        return height // step, width // step
