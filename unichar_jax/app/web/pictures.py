"""Pictures in and out of the web demo: uploads judged before they are decoded, and bytes for the browser.

A picture that is sent never becomes a file: it is parsed in memory, its header judged first, then decoded,
turned upright, put on white, made smaller, and kept without metadata.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageOps

from unichar_jax.app.web.settings import Refused
from unichar_jax.data.images import FORMATS, to_rgb

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
        return Image.open(io.BytesIO(self.data)).convert("RGB")


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
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise Refused(413, "The picture has too many pixels; please send a smaller copy.") from None
    except Exception:
        raise Refused(415, f"That is not a picture I can read; please send {', '.join(FORMATS)}.") from None
    width, height = image.size
    if width * height > max_pixels:
        raise Refused(
            413,
            f"The picture has {width}x{height} pixels; at most {max_pixels // 10**6} million are taken."
            " Please send a smaller copy.",
        )
    if min(width, height) < 8:
        raise Refused(415, f"The picture is only {width}x{height} pixels; please send a larger one.")
    try:
        image.draft("RGB", (LARGEST, LARGEST))  # a JPEG is decoded at about the size it is needed in
        return shown(ImageOps.exif_transpose(image))
    except Exception:  # whatever a decoder says of a broken file
        raise Refused(415, "The picture is broken; please save it again and send that.") from None
