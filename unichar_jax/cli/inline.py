"""A picture as coloured characters, for any terminal that knows colours: two pixels to a character."""

from __future__ import annotations

from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text


def inline(picture: Image.Image, columns: int = 48) -> Text:
    """The picture at most ``columns`` characters wide; an upper half block shows one pixel above another."""
    width = min(columns, picture.width)
    height = max(1, round(picture.height * width / picture.width / 2))
    small = picture.convert("RGB").resize((width, 2 * height), Image.Resampling.LANCZOS)
    color = lambda x, y: Color.from_rgb(*small.getpixel((x, y)))  # noqa: E731
    text = Text()
    for row in range(0, 2 * height, 2):
        for x in range(width):
            text.append("▀", Style(color=color(x, row), bgcolor=color(x, row + 1)))
        text.append("\n")
    return text
