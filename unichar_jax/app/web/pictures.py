"""Pictures in and out of the web demo: uploads judged before they are decoded, and bytes for the browser.

A picture that is sent never becomes a file: it is parsed in memory, its header judged first, then decoded,
turned upright, put on white, made smaller, and kept without metadata.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from unichar_jax.app.web.settings import Refused
from unichar_jax.data.images import (
    FORMATS,
    MIN_SIDE,
    ImageError,
    LargeImageError,
    SmallImageError,
    UnknownImageError,
    open_image,
    to_rgb,
)

LARGEST = 1024
"""Longer side of a picture that is kept."""

_LOSSLESS = 256


@dataclass(frozen=True)
class Shown:
    """A picture as the browser gets it."""

    data: bytes
    mime: str
    width: int
    height: int

    def image(self) -> Image.Image:
        """Its pixels."""
        return open_image(self.data)


def shown(image: Image.Image, largest: int = LARGEST) -> Shown:
    """Bytes of a picture: PNG if it is small, JPEG otherwise."""
    image = to_rgb(image)
    if max(image.size) > largest:
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    kind = "PNG" if max(image.size) <= _LOSSLESS else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 92}))
    return Shown(buffer.getvalue(), f"image/{kind.lower()}", *image.size)


def read_upload(data: bytes, max_pixels: int) -> Shown:
    """A picture that was sent, made safe to keep and to look at.

    Raises:
      Refused: not a picture of a known format, too many pixels, or broken.
    """
    try:
        made = shown(open_image(data, max_pixels=max_pixels, near=LARGEST))
    except LargeImageError as error:
        raise Refused(
            413,
            f"The picture has too many pixels ({error.got}); at most {max_pixels // 10**6} million are taken."
            " Please send a smaller copy.",
        ) from None
    except SmallImageError as error:
        raise Refused(415, str(error).replace("the picture", "The picture", 1)) from None
    except UnknownImageError as error:
        told = f"That is not a picture I can read ({error.got}); please send {', '.join(FORMATS)}."
        raise Refused(415, told) from None
    except ImageError:
        raise Refused(415, "The picture is broken; please save it again and send that.") from None
    if min(made.width, made.height) < MIN_SIDE:
        raise Refused(415, "The picture is too thin to be looked at; please cut a piece out and send that.")
    return made
