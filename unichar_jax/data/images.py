"""From picture files to model input: the one door for pictures, resize rule, patches.

**The door.** Every picture that the package did not draw itself comes in through ``open_image``: a file inside
a folder that the caller names, bytes that were sent, or a picture that the caller opened. Whoever asks gets the
same pixels: RGB of 8 bits, upright as its EXIF orientation says, deeper grey scaled (not clipped),
transparency on white, of an animation the first frame. The content decides what a file is, never its name. A
file is judged by its header before a pixel is decoded, so a hostile folder can neither make us read another
file nor fill the memory. Colour profiles are not applied, as in the reference. ``image_header`` tells the
same (the upright size) without decoding, with what is worth a note.

The size rule and the pixels follow BAGEL (arXiv 2505.14683) as UniCharacter uses it: both sides are snapped
to a stride, resizing is PIL's bicubic, values lie in [-1, 1].

This module knows nothing of characters or tasks, caches nothing, and never writes a file.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, features

from unichar_jax.errors import UserError
from unichar_jax.files import digest

FORMATS = ("PNG", "JPEG", "WEBP")
"""File formats that are always read. HEIC and AVIF are read where Pillow, or its plugin, can."""

READ_NAMES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".heic", ".heif", ".avif")
"""Ends of the names of files that are taken for pictures in a folder of all sorts."""

OTHER_NAMES = (".gif", ".bmp", ".tif", ".tiff", ".dng", ".jxl", ".svg")
"""Ends of the names of pictures that are not read; whoever lists a folder names them."""

MAX_PIXELS = 50_000_000
"""Largest picture that is decoded (width x height); larger ones are taken for decompression bombs."""

MIN_SIDE = 8
"""Shortest side, in pixels, of a picture that is read; what the caller made and opened may be smaller."""

SMALL_SIDE, THIN = 32, 4
"""A picture with a side below, or with sides further apart than this ratio, is worth a note."""

MAX_BYTES = 128 * 2**20
"""Largest picture file that is read."""

Source = Image.Image | bytes | str | os.PathLike[str]
"""A picture as it is given: opened by the caller, the bytes of a file, or its path."""


class ImageError(UserError):
    """A picture that cannot or must not be opened; ``got`` says in short what it is, where that is known."""

    def __init__(self, message: str, got: str = "") -> None:
        super().__init__(message)
        self.got = got


class UnknownImageError(ImageError):
    """Content that is no picture, or one of a format that is not read."""


class LargeImageError(ImageError):
    """A picture with too many pixels."""

    def __init__(self, what: str, got: str, most: int) -> None:
        told = f"{what} has {got}; at most {most} are decoded (a decompression bomb?). Save a smaller copy."
        super().__init__(told, got)


class SmallImageError(ImageError):
    """A picture of fewer than ``MIN_SIDE`` pixels on a side."""


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


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """What a picture's header says.

    Attributes:
      format, mode: as Pillow names them.
      width, height: of the upright picture, in pixels.
      orientation: of EXIF; 1 is upright.
      notes: what is worth telling, as (expected, got, what becomes of it).
    """

    format: str
    mode: str
    width: int
    height: int
    orientation: int
    notes: tuple[tuple[str, str, str], ...]


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each EXIF orientation upright."""

_PLUGINS = {"HEIC": ("HEIF", "pillow_heif"), "AVIF": ("AVIF", "pillow_avif")}
"""Pillow's format of a kind of file, and the module that reads it where Pillow does not."""

_OTHER_HEADS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"<svg": "SVG"}
"""First bytes of pictures that are not read, to name them."""


def image_header(source: Source, root: Path | None = None) -> ImageHeader:
    """What the header of a picture says; no pixel is decoded. Raises as ``open_image``."""
    image, _ = _open(source, root, MAX_PIXELS)
    orientation, (width, height) = _orientation(image), image.size
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a telephone's second picture
    kind, mode = str(image.format), image.mode
    if image is not source:
        image.close()
    if orientation > 4:
        width, height = height, width
    notes = []
    if frames > 1:
        notes.append(("one still picture", f"{frames} frames", "the first is used"))
    if min(width, height) < SMALL_SIDE or max(width, height) > THIN * min(width, height):
        drawn = "x".join(map(str, T2I_TRANSFORM.size(width, height)))
        wanted = f"sides of {SMALL_SIDE} pixels or more, none {THIN} times the other"
        notes.append((wanted, f"{width}x{height} pixels", f"BAGEL sees and draws it stretched, at {drawn}"))
    return ImageHeader(kind, mode, width, height, orientation, tuple(notes))


def open_image(
    source: Source,
    root: Path | None = None,
    *,
    alpha: bool = False,
    max_pixels: int = MAX_PIXELS,
    near: int | None = None,
) -> Image.Image:
    """A picture as the package sees it: RGB, upright, on white (see the module).

    Args:
      source: the picture. A path is taken inside ``root``, by default its own folder.
      root: the folder that must hold it.
      alpha: leave transparency; a picture that has some comes as RGBA.
      max_pixels: largest width x height.
      near: a JPEG may be decoded smaller, at about this many pixels on the longer side.

    Raises:
      UnsafePathError: the path leaves ``root``.
      ImageError: absent, not a regular file, too large or small, not an image, or truncated.
    """
    image, what = _open(source, root, max_pixels)
    turn = _TURNS.get(_orientation(image))
    try:
        if near is not None:
            image.draft("RGB", (near, near))
        image.load()
        decoded = _eight_bits(image) if alpha else to_rgb(image)
    except Exception as error:  # decoders raise anything
        if isinstance(error, ImageError):
            raise
        told = f"{what} is truncated or corrupt ({error}); save it again from its source."
        raise ImageError(told) from None
    finally:
        if image is not source:
            image.close()
    decoded.info = {}  # no metadata: opened again, it must not be turned again
    return decoded.transpose(turn) if turn is not None else decoded


def content_of(path: Path) -> str:
    """A digest of a picture's file that changes with the pixels it is seen as."""
    content, orientation = digest(path.read_bytes()), image_header(path).orientation
    return content if orientation == 1 else f"{content} turned {orientation}"


def _open(source: Source, root: Path | None, max_pixels: int) -> tuple[Image.Image, str]:
    """Opens a picture lazily and judges its header; also what to call it in a message."""
    if isinstance(source, Image.Image):
        image, what = source, "the picture"
    elif isinstance(source, bytes):
        image, what = _parsed(io.BytesIO(source), source[:64], "the picture"), "the picture"
    elif isinstance(source, str | os.PathLike):
        if root is None:
            path = Path(source)
            source, root = path.name, path.parent
        file = resolve_inside(root, source)
        what = f"{root}: the image {os.fspath(source)!r}"
        if not file.exists():
            raise ImageError(f"{what} is absent; add it or drop its record.")
        if not file.is_file():
            raise ImageError(f"{what} is not a regular file.")
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ImageError(f"{what} has {size} bytes; expected at most {MAX_BYTES}. Save a smaller copy.")
        with file.open("rb") as opened:
            head = opened.read(64)
        image = _parsed(file, head, what)
    else:
        raise ImageError(f"expected a picture or a path, got {type(source).__name__}.")
    width, height = image.size
    if width * height > max_pixels:
        raise LargeImageError(what, f"{width}x{height} pixels", max_pixels)
    if min(width, height) < MIN_SIDE and image is not source:
        raise SmallImageError(
            f"{what} is only {width}x{height} pixels; expected {MIN_SIDE} or more on each side. Give a larger one."
        )
    return image, what


def _parsed(file: Path | io.BytesIO, head: bytes, what: str) -> Image.Image:
    """The picture, its header parsed, by one of the formats that are read."""
    formats: tuple[str, ...] = FORMATS
    if kind := _boxed(head):
        if not readable(f".{kind.lower()}"):
            told = f"{what} is a {kind} picture, which Pillow cannot read here; {remedy(kind)}."
            raise UnknownImageError(told, f"{kind} content")
        formats = (_PLUGINS[kind][0],)
    try:
        return Image.open(file, formats=formats)
    except Image.DecompressionBombError:
        raise LargeImageError(what, "more pixels than can be decoded safely", MAX_PIXELS) from None
    except Exception as error:
        known = (f"{name} content" for start, name in _OTHER_HEADS.items() if head.startswith(start))
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = next(known, "unknown content") if unknown else str(error)
        raise UnknownImageError(
            f"{what} is not a readable image ({reason}); expected {', '.join(FORMATS)} content, save it as one.",
            reason,
        ) from None


def _boxed(head: bytes) -> str:
    """``HEIC`` or ``AVIF``, if the first bytes are those of one; else empty."""
    if head[4:8] != b"ftyp":
        return ""
    end = min(len(head), int.from_bytes(head[:4], "big"))
    brands = {head[8:12], *(head[i : i + 4] for i in range(16, end, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    return "HEIC" if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"} else ""


def remedy(kind: str) -> str:
    """What to do with a picture of a format that is not read here."""
    plugin = f", or: pip install {_PLUGINS[kind][1].replace('_', '-')}" if kind in _PLUGINS else ""
    return f"save it as PNG or JPEG{plugin}"


def readable(suffix: str) -> bool:
    """Whether pictures with this end of their names can be read here; registers the plugin that does it."""
    kind = {".heic": "HEIC", ".heif": "HEIC", ".avif": "AVIF"}.get(suffix.lower())
    if kind is None:
        return suffix.lower() in READ_NAMES
    if kind == "AVIF" and features.check("avif"):
        return True
    try:
        plugin = importlib.import_module(_PLUGINS[kind][1])  # pillow_avif registers itself
        getattr(plugin, "register_heif_opener", bool)()
    except Exception:  # absent, or not for this Pillow
        return False
    return True


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation as the header tells it; PNG's own reader would decode the picture for it."""
    try:
        value = Image.Image.getexif(image).get(0x0112, 1)
    except Exception:  # damaged metadata
        return 1
    return value if value in _TURNS else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """RGB, or RGBA with transparency; grey of 16 bits is scaled, which PIL would clip at 255."""
    clear = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
            raise ImageError(
                f"a picture of mode {image.mode!r} has no known range of values; expected 8 or 16 bits. Save it as PNG."
            )
        grey = Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))
        if isinstance(clear, int):
            grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        image = grey
    elif isinstance(clear, tuple) and max(clear) > 255:  # PIL reads 16 bits of colour as 8, but not this
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB copy of 8 bits; transparency is composited on white with the alpha channel."""
    image = _eight_bits(image)
    if image.mode == "RGB":
        return image
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
