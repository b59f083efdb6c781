"""Contact sheets as one picture: a row for every prompt, a block of columns for every model."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from unichar_jax.app.report import Comparison
from unichar_jax.data.images import open_image, to_rgb

_GAP, _BLOCK_GAP, _LINE, _INK = 4, 18, 16, (40, 42, 48)


def contact_sheet(comparison: Comparison, side: int = 128) -> Image.Image:
    """Draws the sheet.

    Args:
      comparison: prompts, and what each model drew.
      side: of a picture in the sheet, in pixels.
    """
    font = ImageFont.load_default(12)
    widths = [max([len(row) for row in c.pictures] + [1]) * (side + _GAP) for c in comparison.columns]
    width = sum(widths) + _BLOCK_GAP * (len(widths) - 1) + 2 * _GAP
    lines = [textwrap.wrap(p, max(20, width // 7)) for p in comparison.prompts]
    heights = [len(told) * _LINE + side + 3 * _GAP for told in lines]
    sheet = Image.new("RGB", (width, _LINE + 2 * _GAP + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    lefts = [_GAP + sum(widths[:i]) + i * _BLOCK_GAP for i in range(len(widths))]
    for column, left in zip(comparison.columns, lefts, strict=True):
        pen.text((left, _GAP), f"{column.label} {column.note}".strip(), _INK, font)
    top = _LINE + 2 * _GAP
    for place, told in enumerate(lines):
        for line in told:
            pen.text((_GAP, top), line, _INK, font)
            top += _LINE
        for column, left in zip(comparison.columns, lefts, strict=True):
            for number, picture in enumerate(column.pictures[place]):
                sheet.paste(_fit(picture.image, side), (left + number * (side + _GAP), top + _GAP))
        top += side + 3 * _GAP
    return sheet


def _fit(image: Image.Image | str | Path, side: int) -> Image.Image:
    image = to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
    scale = side / max(image.size)
    size = [max(1, round(n * scale)) for n in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
