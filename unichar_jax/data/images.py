"""From picture files to model input: safe opening, RGB on white, resize rule, patches.

A picture is opened only inside a folder that the caller names, and only after its header says that
it is of a sane format and size, so a hostile data folder can neither make us read another file nor
fill the memory. The size rule and the pixels follow BAGEL (arXiv 2505.14683) as UniCharacter uses
it: both sides are snapped to a stride, resizing is PIL's bicubic, values lie in [-1, 1].

This module knows nothing of characters or tasks, caches nothing, and never writes a file.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from PIL import Image

from unichar_jax.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")
"""File formats that are opened; what counts is the content, not the file's name."""

MAX_PIXELS = 50_000_000
"""Largest picture that is decoded (width x height); larger ones are taken for decompression bombs."""

MAX_BYTES = 128 * 2**20
"""Largest picture file that is read."""


class ImageError(UserError):
    """A picture that cannot or must not be opened."""


class UnsafePathError(ImageError):
    """A path that leaves the folder it belongs to."""


def resolve_inside(root: Path, relative: str | os.PathLike[str]) -> Path:
    """Returns ``root / relative`` if that is inside ``root``, symbolic links followed.

    Raises:
      UnsafePathError: the path is absolute, climbs out with ``..``, is a link to a place outside of
        ``root``, or holds a NUL character. Nothing is opened.
    """
    text = os.fspath(relative)
    shown = repr(text)
    if "\0" in text:
        raise UnsafePathError(f"{root}: the path {shown} holds a NUL character; rename the file.")
    path = Path(text)
    if path.is_absolute():
        raise UnsafePathError(
            f"{root}: the path {shown} is absolute; expected a path relative to this folder. "
            "Copy the file into the folder and name it relative to it."
        )
    if ".." in path.parts:
        raise UnsafePathError(
            f"{root}: the path {shown} climbs out of the folder with '..'. "
            "Copy the file into the folder and name it relative to it."
        )
    try:
        base = root.resolve()
        target = (base / path).resolve()
    except (OSError, RuntimeError) as error:  # loops of links, names that are too long
        raise UnsafePathError(f"{root}: the path {shown} cannot be resolved ({error}).") from None
    if not target.is_relative_to(base):
        raise UnsafePathError(
            f"{root}: {shown} is a symbolic link that leaves the folder; it is not followed. "
            "Replace the link by a copy of the file."
        )
    return target


def _open_header(path: str | os.PathLike[str], root: Path) -> Image.Image:
    """Opens a picture lazily: the header is parsed and judged, no pixel is decoded."""
    where = os.fspath(path)
    file = resolve_inside(root, path)
    if not file.exists():
        raise ImageError(f"{root}: the image {where!r} is absent; add it or drop its record.")
    if not file.is_file():
        raise ImageError(f"{root}: the image {where!r} is not a regular file.")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ImageError(
            f"{root}: the image {where!r} has {size} bytes; expected at most {MAX_BYTES}. "
            "Save a smaller copy."
        )
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise _bomb(root, where, "more pixels than can be decoded safely") from None
    except Exception as error:
        raise ImageError(
            f"{root}: {where!r} is not a readable image ({_reason(error)}); "
            f"expected {', '.join(FORMATS)} content."
        ) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise _bomb(root, where, f"{width}x{height} pixels")
    return image


def _bomb(root: Path, where: str, got: str) -> ImageError:
    return ImageError(
        f"{root}: the image {where!r} has {got}; at most {MAX_PIXELS} are decoded "
        "(a decompression bomb?). Save a smaller copy."
    )


def _reason(error: Exception) -> str:
    return "unknown content" if isinstance(error, Image.UnidentifiedImageError) else str(error)


def image_header(path: str | os.PathLike[str], root: Path) -> tuple[str, str, tuple[int, int]]:
    """Format, mode and (width, height) of the image ``path`` inside ``root``, without its pixels."""
    with _open_header(path, root) as image:
        return str(image.format), image.mode, image.size


def open_image(path: str | os.PathLike[str], root: Path) -> Image.Image:
    """Decodes the image ``path`` inside ``root``, in its own mode.

    Raises:
      UnsafePathError: ``path`` leaves ``root``.
      ImageError: absent, not a regular file, too large, not an image, or truncated.
    """
    image = _open_header(path, root)
    try:
        image.load()
    except Exception as error:
        image.close()
        raise ImageError(
            f"{root}: the image {os.fspath(path)!r} is truncated or corrupt ({error}); "
            "save it again from its source."
        ) from None
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB copy; transparency is composited on white with the alpha channel."""
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def resize_rule(
    width: int,
    height: int,
    stride: int,
    min_size: int,
    max_size: int,
    max_pixels: int,
    img_num: int = 1,
) -> tuple[int, int]:
    """Target (width, height): both sides multiples of ``stride``, aspect kept up to rounding.

    The picture is shrunk until its longer side is at most ``max_size``, but never so far that the
    shorter side falls under ``min_size``; then the pixel budget ``max_pixels / img_num`` and the
    longer side are enforced, in this order. Rounding is to even, as in Python. As in the reference,
    the budget's *area* ratio scales each side; it binds only where a sample has several images.
    """

    def scaled(scale: float, w: int, h: int) -> tuple[int, int]:
        def snap(value: int) -> int:
            return max(stride, int(round(value / stride) * stride))

        return snap(round(w * scale)), snap(round(h * scale))

    shrink = min(max_size / max(width, height), 1.0)
    width, height = scaled(max(shrink, min_size / min(width, height)), width, height)
    if width * height > max_pixels / img_num:
        width, height = scaled(max_pixels / img_num / (width * height), width, height)
    if max(width, height) > max_size:
        width, height = scaled(max_size / max(width, height), width, height)
    return width, height


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """How a picture becomes pixels of the model.

    Attributes:
      stride: both sides become multiples of this: pixels of one token.
      min_size: lower bound of the shorter side, in pixels.
      max_size: upper bound of the longer side, in pixels.
      max_pixels: upper bound of width x height for all images of a sample together.
      square: cut the centre square out first; with ``min_size == max_size`` every picture then has
        one size, which small models want.
    """

    stride: int
    min_size: int
    max_size: int
    max_pixels: int = 14 * 14 * 9 * 1024
    square: bool = False

    def __post_init__(self) -> None:
        for name in ("stride", "min_size", "max_size", "max_pixels"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"ImageTransform.{name}: expected at least 1, got {value}.")
        if self.min_size > self.max_size:
            raise UserError(
                f"ImageTransform: min_size {self.min_size} exceeds max_size {self.max_size}; "
                "lower min_size or raise max_size."
            )
        for name in ("min_size", "max_size"):
            if getattr(self, name) % self.stride:
                raise UserError(
                    f"ImageTransform.{name}: expected a multiple of stride {self.stride}, "
                    f"got {getattr(self, name)}."
                )

    def size(self, width: int, height: int, img_num: int = 1) -> tuple[int, int]:
        """(width, height) after the transform, from a picture's size alone."""
        if self.square:
            width = height = min(width, height)
        return resize_rule(width, height, self.stride, self.min_size, self.max_size, self.max_pixels, img_num)

    def tokens(self, width: int, height: int, img_num: int = 1) -> int:
        """Number of ``stride`` x ``stride`` tokens that a picture of this size becomes."""
        width, height = self.size(width, height, img_num)
        return (width // self.stride) * (height // self.stride)

    def resize(self, image: Image.Image, img_num: int = 1) -> Image.Image:
        """The picture as RGB on white, cut and resized; PIL bicubic with antialiasing."""
        image = to_rgb(image)
        if self.square and image.width != image.height:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        return image.resize(self.size(*image.size, img_num), Image.Resampling.BICUBIC)

    def __call__(self, image: Image.Image, img_num: int = 1) -> np.ndarray:
        """float32 ``[height, width, 3]`` in [-1, 1]."""
        pixels = np.asarray(self.resize(image, img_num), dtype=np.float32)
        return (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


T2I_TRANSFORM = ImageTransform(stride=16, min_size=512, max_size=1024)
"""Images to be drawn (through the autoencoder), BAGEL-7B: 1024 to 4096 latent tokens."""

VIT_TRANSFORM = ImageTransform(stride=14, min_size=378, max_size=980, max_pixels=2_007_040)
"""Images to be looked at (through the vision tower), BAGEL-7B: 729 to 4900 tokens."""

MINI_T2I_TRANSFORM = ImageTransform(stride=16, min_size=96, max_size=96, square=True)
"""Images to be drawn, mini model: always 96 x 96 pixels, 36 latent tokens."""

MINI_VIT_TRANSFORM = ImageTransform(stride=14, min_size=70, max_size=70, square=True)
"""Images to be looked at, mini model: always 70 x 70 pixels, 25 tokens."""


def patchify(pixels: np.ndarray, patch: int = 14) -> np.ndarray:
    """Cuts ``[height, width, channels]`` into ``[tokens, patch * patch * channels]``.

    Tokens run row by row; inside a token the order is (row, column, channel), channel fastest, as
    the vision tower's weights expect (588 values for 14 x 14 x 3).
    """
    height, width, channels = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"image {width}x{height}: sides are not multiples of the patch {patch}")
    grid = pixels.reshape(height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, patch * patch * channels)


def position_ids(rows: int, columns: int, side: int) -> np.ndarray:
    """Rows of the ``side`` x ``side`` position table, int32 ``[rows * columns]``: row * side + col."""
    if max(rows, columns) > side:
        raise ValueError(f"a {rows}x{columns} grid does not fit a {side}x{side} position table")
    grid = np.arange(rows)[:, None] * side + np.arange(columns)[None, :]
    return grid.reshape(-1).astype(np.int32)
