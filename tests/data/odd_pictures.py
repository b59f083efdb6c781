"""Pictures of every kind that people bring, made here, each with what everybody must see in it.

``odd_pictures(folder)`` writes ``folder/<kind>/<file>`` and returns, for each kind, the file and either the
pixels (uint8 ``[H, W, 3]``, worked out without the code that is tested) or words of the refusal.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, features

Seen = np.ndarray | str

RAMP = np.tile(np.linspace(0, 1, 128), (96, 1))
"""Dark left, bright right."""

RGB = np.stack([RAMP * 255, np.full_like(RAMP, 60), (1 - RAMP) * 255], -1).astype(np.uint8)
RGB[:20, :20] = (255, 255, 0)  # a yellow mark, top left

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
"""What each EXIF orientation asks for."""


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, kind: int, extra: bytes = b"") -> bytes:
    """A PNG of 16 bits, which Pillow cannot write in colour; ``kind`` is PNG's colour type."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    size = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, kind, 0, 0, 0)
    body = _chunk(b"IHDR", size) + extra + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _bomb(side: int = 20_000) -> bytes:
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" * (1 + side // 8)) for _ in range(side)) + packer.flush()
    size = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", size) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _plain(data: bytes) -> np.ndarray:
    """The stored pixels, as they lie in the file."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    white = Image.new("RGB", rgb.shape[1::-1], "white")
    white.paste(Image.fromarray(rgb), mask=Image.fromarray(alpha))
    return np.asarray(white)


def odd_pictures(folder: Path) -> dict[str, tuple[Path, Seen]]:
    made: dict[str, tuple[Path, Seen]] = {}

    def add(kind: str, name: str, data: bytes, seen: Seen) -> None:
        path = folder / kind / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        made[kind] = path, seen

    im = Image.fromarray(RGB)
    for step in (_grey, _coloured, _turned, _moving, _refused):
        step(add, im)
    for kind, name in (("upper", "A.PNG"), ("spaces", "My Photo (1).png"), ("emoji", "日本 🎀.png")):
        add(kind, name, _saved(im, "PNG"), RGB)
    jpeg = _saved(im, "JPEG")
    add("jpg_upper", "B.JPG", jpeg, _plain(jpeg))
    add("jpeg_named_png", "a.png", jpeg, _plain(jpeg))
    return made


def _grey(add: Callable, im: Image.Image) -> None:
    deep, grey = (RAMP * 65535).astype(np.uint16), (RAMP * 255).astype(np.uint8)
    high = (deep >> 8).astype(np.uint8)
    three = lambda x: np.repeat(x[..., None], 3, -1)  # noqa: E731
    half = np.where(RAMP < 0.5, 0, 255).astype(np.uint8)
    add("grey16", "a.png", _saved(Image.fromarray(deep), "PNG"), three(high))
    add("grey8", "a.png", _saved(Image.fromarray(grey), "PNG"), three(grey))
    add(
        "one_bit",
        "a.png",
        _saved(Image.fromarray(RAMP > 0.5), "PNG"),
        three(np.where(RAMP > 0.5, 255, 0).astype(np.uint8)),
    )
    clear = three(np.where(deep == 0, 255, high))
    add("grey16_trns", "a.png", png(deep, 0, _chunk(b"tRNS", struct.pack(">H", 0))), clear)
    faded = Image.fromarray(np.stack([grey, half], -1), "LA")
    add("grey_alpha", "a.png", _saved(faded, "PNG"), _on_white(three(grey), half))
    deep_faded = np.stack([deep, half.astype(np.uint16) * 257], -1)
    add("grey16_alpha", "a.png", png(deep_faded, 4), _on_white(three(high), half))


def _coloured(add: Callable, im: Image.Image) -> None:
    deep = (np.stack([RAMP, RAMP * 0.2, 1 - RAMP], -1) * 65535).astype(np.uint16)
    high = (deep >> 8).astype(np.uint8)
    half = np.where(RAMP < 0.5, 0, 255).astype(np.uint8)
    add("rgb16", "a.png", png(deep, 2), high)
    clear = np.where((deep == deep[50, 5]).all(-1)[..., None], 255, high).astype(np.uint8)
    add("rgb16_trns", "a.png", png(deep, 2, _chunk(b"tRNS", deep[50, 5].astype(">u2").tobytes())), clear)
    whole = np.concatenate([deep, (half.astype(np.uint16) * 257)[..., None]], -1)
    add("rgb16_alpha", "a.png", png(whole, 6), _on_white(high, half))
    few = im.quantize(16)
    table = np.array(few.getpalette(), np.uint8).reshape(-1, 3)
    numbers = np.asarray(few)
    add("palette", "a.png", _saved(few, "PNG"), table[numbers])
    mark = few.getpixel((5, 5))
    clear = np.where((numbers == mark)[..., None], 255, table[numbers]).astype(np.uint8)
    add("palette_trns", "a.png", _saved(few, "PNG", transparency=mark), clear)
    alphas = np.arange(0, 256, 17, dtype=np.uint8)
    faded = _saved(few, "PNG", transparency=alphas.tobytes())
    add("palette_alpha", "a.png", faded, _on_white(table[numbers], alphas[numbers]))
    ink = _saved(im.convert("CMYK"), "JPEG", quality=90)
    add("cmyk", "a.jpg", ink, _plain(ink))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ink = _saved(im.convert("CMYK"), "JPEG", quality=90, icc_profile=profile)
    add("cmyk_profile", "a.jpg", ink, _plain(ink))


def _turned(add: Callable, im: Image.Image) -> None:
    for turn, upright in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = turn
        lossless = {"PNG": {}, "WEBP": {"lossless": True}}
        for kind, options in (lossless | {"JPEG": {"quality": 92}}).items():
            data = _saved(im, kind, exif=exif, **options)
            add(f"exif{turn}_{kind.lower()}", f"a.{kind.lower()}", data, upright(_plain(data)))
    exif = Image.Exif()
    exif[0x0112] = 6
    if features.check("avif"):
        data = _saved(im, "AVIF", exif=exif.tobytes())
        add("exif_avif", "a.avif", data, np.rot90(_plain(data), -1))
    deep = Image.fromarray((RAMP * 65535).astype(np.uint16))
    seen = np.rot90(np.repeat(((RAMP * 65535).astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, -1), -1)
    add("exif_grey16", "a.png", _saved(deep, "PNG", exif=exif), seen)
    add(
        "exif_damaged",
        "a.jpg",
        _saved(im, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff"),
        _plain(_saved(im, "JPEG")),
    )


def _moving(add: Callable, im: Image.Image) -> None:
    frames = [Image.new("RGB", (64, 64), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    red = np.full((64, 64, 3), (255, 0, 0), np.uint8)
    several = {"save_all": True, "append_images": frames[1:], "duration": 100}
    add("anim_webp", "a.webp", _saved(frames[0], "WEBP", lossless=True, **several), red)
    add("anim_png", "a.png", _saved(frames[0], "PNG", **several), red)
    gif = _saved(frames[0], "GIF", **several)
    add("gif", "a.gif", gif, "GIF content")
    add("gif_named_png", "a.png", gif, "GIF content")
    both = _saved(im, "MPO", save_all=True, append_images=[frames[0].resize(im.size)])
    add("two_in_a_jpeg", "a.jpg", both, _plain(both))


def _refused(add: Callable, im: Image.Image) -> None:
    whole, jpeg = _saved(im, "PNG"), _saved(im, "JPEG", progressive=True, quality=95)
    deep = Image.fromarray((RAMP * 65535).astype(np.uint16))
    add("bmp_named_png", "a.png", _saved(im, "BMP"), "BMP content")
    add("tiff16", "a.tif", _saved(deep, "TIFF"), "TIFF content")
    add("tiff_float", "a.png", _saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "TIFF content")
    add("svg", "a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG content")
    add("tiny", "a.png", _saved(Image.new("RGB", (1, 1), (9, 9, 9)), "PNG"), "only 1x1 pixels")
    add("thin", "a.png", _saved(Image.new("RGB", (3, 4000), (9, 99, 9)), "PNG"), "only 3x4000 pixels")
    add("seven", "a.png", _saved(im.resize((40, 7)), "PNG"), "only 40x7 pixels")
    add("bomb", "a.png", _bomb(), "pixels")
    add("truncated", "a.png", whole[: len(whole) * 2 // 3], "corrupt")
    add("truncated_jpg", "a.jpg", jpeg[: len(jpeg) * 2 // 3], "corrupt")
    add("html", "a.png", b"<!DOCTYPE html><html><body>403 Forbidden</body></html>", "unknown content")
    add("empty", "a.png", b"", "unknown content")
    heic = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + b"\0" * 40
    add("heic", "a.png", heic, "HEIC")
