"""A small pen over Pillow: rounded shapes in picture units, drawn oversized for smooth edges.

One unit is 1/96 of the picture's width, whatever its size in pixels. Shapes are painted without
antialiasing on a canvas `SUPERSAMPLE` times too large; the caller shrinks it once at the end.
The pen knows no characters and no places.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

SUPERSAMPLE = 4
UNITS = 96

Colour = tuple[int, int, int]
Point = tuple[float, float]

_CIRCLE = tuple((math.cos(2 * math.pi * i / 36), math.sin(2 * math.pi * i / 36)) for i in range(36))


@functools.cache
def mix(a: Colour, b: Colour, amount: float) -> Colour:
    """Blends two colours: all `a` at amount 0, all `b` at 1."""
    red, green, blue = (round(x + (y - x) * amount) for x, y in zip(a, b, strict=True))
    return red, green, blue


@functools.cache
def shade(colour: Colour, factor: float = 0.8) -> Colour:
    """Darkens a colour (factor below 1), a little towards blue, as shadows are."""
    r, g, b = colour
    return round(r * factor), round(g * factor), round(b * min(1.0, factor + 0.06))


class Pen:
    """Draws on an image with an origin and a scale; all coordinates are in picture units."""

    def __init__(self, image: Image.Image, scale: float, x: float = 0.0, y: float = 0.0) -> None:
        """`scale` is pixels for one unit; (x, y) are the pixel coordinates of the origin."""
        self._draw = ImageDraw.Draw(image)
        self._scale, self._x, self._y = scale, x, y

    def _at(self, points: Sequence[Point]) -> list[Point]:
        s, x, y = self._scale, self._x, self._y
        return [(px * s + x, py * s + y) for px, py in points]

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """An ellipse around (x, y)."""
        self._draw.ellipse(self._at([(x - rx, y - ry), (x + rx, y + ry)]), fill=fill)

    def ball(self, x: float, y: float, rx: float, ry: float, fill: Colour, rim: float = 0.9) -> None:
        """An ellipse with a darker rim that is thicker at the lower right, as if lit from above."""
        self.oval(x, y, rx, ry, shade(fill))
        self.oval(x - rim * 0.35, y - rim * 0.45, rx - rim, ry - rim, fill)

    def tilted(self, x: float, y: float, rx: float, ry: float, degrees: float, fill: Colour) -> None:
        """An ellipse turned clockwise."""
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        self.poly([(x + rx * u * c - ry * v * s, y + rx * u * s + ry * v * c) for u, v in _CIRCLE], fill)

    def poly(self, points: Sequence[Point], fill: Colour) -> None:
        """A filled polygon."""
        self._draw.polygon(self._at(points), fill=fill)

    def rimmed(self, points: Sequence[Point], fill: Colour, inner: float = 0.86) -> None:
        """A filled polygon with a darker rim, by shrinking it towards its middle."""
        self.poly(points, shade(fill))
        mx = sum(p[0] for p in points) / len(points)
        my = sum(p[1] for p in points) / len(points)
        self.poly([(mx + (x - mx) * inner, my + (y - my) * inner) for x, y in points], fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, radius: float = 0.0) -> None:
        """A rectangle from corner to corner, with rounded corners if `radius` is positive."""
        corners = self._at([(x0, y0), (x1, y1)])
        if radius:
            self._draw.rounded_rectangle(corners, radius=radius * self._scale, fill=fill)
        else:
            self._draw.rectangle(corners, fill=fill)

    def line(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """A thick line through the points with round ends and corners."""
        r = width * self._scale / 2
        at = self._at(points)
        self._draw.line(at, fill=fill, width=max(1, round(2 * r)))
        for x, y in at:
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def curve(self, a: Point, b: Point, c: Point, width: float, fill: Colour, steps: int = 10) -> None:
        """A thick quadratic curve from `a` to `c`, pulled towards `b`."""
        points = []
        for i in range(steps + 1):
            t = i / steps
            u, v, w = (1 - t) ** 2, 2 * t * (1 - t), t * t
            points.append((u * a[0] + v * b[0] + w * c[0], u * a[1] + v * b[1] + w * c[1]))
        self.line(points, width, fill)

    def slice(self, x: float, y: float, rx: float, ry: float, start: float, end: float, fill: Colour) -> None:
        """An ellipse cut straight between two angles (degrees, clockwise from the right)."""
        corners = self._at([(x - rx, y - ry), (x + rx, y + ry)])
        self._draw.chord(corners, start, end, fill=fill)
