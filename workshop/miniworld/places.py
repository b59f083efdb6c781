"""Backgrounds: eight places at three times of day, painted once each and kept.

Every place is painted a little larger than the picture so that a scene can slide it about.
Colours are given as at noon; the time of day tints them and hazes them, which also keeps the
background calmer than the character in front of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from workshop.miniworld.pen import SUPERSAMPLE, UNITS, Colour, Pen, mix, shade

MARGIN = 5
"""How far, in units, a background extends beyond the picture on every side."""

LEFT, TOP, RIGHT, BOTTOM = -MARGIN, -MARGIN, UNITS + MARGIN, UNITS + MARGIN


@dataclasses.dataclass(frozen=True)
class Light:
    """One time of day: sky colours, the tint of everything it lights, and lamps in windows."""

    name: str
    sky: tuple[Colour, Colour]
    tint: tuple[float, float, float]
    haze: float
    lamp: Colour | None

    def __call__(self, colour: Colour) -> Colour:
        red, green, blue = (round(c * t) for c, t in zip(colour, self.tint, strict=True))
        return mix((red, green, blue), self.sky[1], self.haze)


LIGHTS = {
    "day": Light("day", ((126, 196, 240), (214, 238, 250)), (1.0, 1.0, 1.0), 0.16, None),
    "sunset": Light("sunset", ((214, 104, 128), (255, 190, 112)), (0.98, 0.78, 0.66), 0.18, (255, 214, 130)),
    "night": Light("night", ((20, 26, 66), (54, 66, 124)), (0.44, 0.50, 0.72), 0.14, (255, 216, 120)),
}

_CLOUD = (255, 255, 255)


def _gradient(size: int, top: Colour, bottom: Colour) -> Image.Image:
    ramp = np.linspace(0, 1, size)[:, None] ** 0.9
    rows = np.asarray(top) * (1 - ramp) + np.asarray(bottom) * ramp
    return Image.fromarray(np.repeat(rows.round().astype(np.uint8)[:, None], size, axis=1))


def _cloud(pen: Pen, light: Light, x: float, y: float, s: float = 1.0) -> None:
    fill = mix(_CLOUD, light.sky[0], 0.12 if light.name == "day" else 0.55)
    for dx, dy, r in ((-6, 1, 3.2), (-1.5, -1.2, 4.6), (4, 0.4, 3.6), (8, 1.6, 2.4)):
        pen.oval(x + dx * s, y + dy * s, r * s * 1.25, r * s, fill)


def _sky(pen: Pen, light: Light, x: float = 80, y: float = 14) -> None:
    """Sun and clouds, a low sun, or a moon with stars, at the upper right."""
    if light.name == "day":
        pen.oval(x, y, 8, 8, mix((255, 236, 140), light.sky[0], 0.45))
        pen.oval(x, y, 6, 6, (255, 232, 110))
        _cloud(pen, light, 18, 13)
        _cloud(pen, light, 57, 5, 0.7)
    elif light.name == "sunset":
        pen.oval(x, y + 22, 14, 14, mix((255, 220, 130), light.sky[1], 0.5))
        pen.oval(x, y + 22, 10.5, 10.5, (255, 236, 150))
        _cloud(pen, light, 16, 15)
        _cloud(pen, light, 82, 9, 0.8)
    else:
        pen.oval(x, y, 7, 7, (250, 240, 190))
        pen.oval(x - 3.4, y - 1.6, 6, 6, light.sky[0])
        for sx, sy in (
            (7, 8),
            (20, 20),
            (31, 6),
            (12, 34),
            (62, 9),
            (90, 30),
            (45, 2),
            (71, 25),
            (4, 22),
        ):
            pen.oval(sx, sy, 0.8, 0.8, (255, 250, 220))


def _pine(pen: Pen, light: Light, x: float, base: float, s: float, leaf: Colour, snow: bool) -> None:
    pen.box(x - 1.6 * s, base - 6 * s, x + 1.6 * s, base, light((120, 82, 56)))
    for i, (w, h) in enumerate(((12, 14), (10, 12), (7, 11))):
        y = base - (5 + 8 * i) * s
        tier = [(x - w * s, y), (x, y - h * s), (x + w * s, y)]
        pen.poly(tier, light(mix(leaf, (255, 255, 255), 0.05 * i)))
        if snow:
            cap = [
                (x - w * s * 0.5, y - h * s * 0.5),
                (x, y - h * s),
                (x + w * s * 0.5, y - h * s * 0.5),
            ]
            pen.poly(cap, light((250, 252, 255)))


def _round_tree(pen: Pen, light: Light, x: float, base: float, s: float, leaf: Colour) -> None:
    pen.box(x - 2 * s, base - 16 * s, x + 2 * s, base, light((132, 92, 62)))
    pen.oval(x, base - 22 * s, 11 * s, 12 * s, light(shade(leaf, 0.88)))
    pen.oval(x - 1.5 * s, base - 23.5 * s, 9 * s, 10 * s, light(leaf))


def _window(pen: Pen, light: Light, x: float, y: float, w: float, h: float, frame: Colour) -> None:
    """A window that shows the time of day, for the places indoors."""
    pen.box(x - 2, y - 2, x + w + 2, y + h + 2, light(frame))
    pen.box(x, y, x + w, y + h, light.sky[0])
    pen.box(x, y + h * 0.55, x + w, y + h, mix(light.sky[0], light.sky[1], 0.6))
    cx = x + w * 0.62
    if light.name == "day":
        pen.oval(cx, y + h * 0.34, 4.2, 4.2, (255, 232, 110))
    elif light.name == "sunset":
        pen.slice(cx, y + h, 7, 7, 180, 360, (255, 236, 150))
    else:
        pen.oval(cx, y + h * 0.34, 4, 4, (250, 240, 190))
        pen.oval(cx - 2.2, y + h * 0.3, 3.4, 3.4, light.sky[0])
        for sx, sy in ((0.2, 0.2), (0.25, 0.7), (0.8, 0.75), (0.45, 0.9)):
            pen.oval(x + w * sx, y + h * sy, 0.7, 0.7, (255, 250, 220))
    pen.box(x + w / 2 - 0.7, y, x + w / 2 + 0.7, y + h, light(frame))
    pen.box(x, y + h / 2 - 0.7, x + w, y + h / 2 + 0.7, light(frame))


def _beach(pen: Pen, light: Light) -> None:
    _sky(pen, light)
    pen.box(LEFT, 47, RIGHT, 72, light((72, 168, 206)))
    pen.box(LEFT, 47, RIGHT, 52, light((96, 186, 218)))
    for x, y in ((6, 55), (66, 56), (84, 60), (26, 60), (52, 54)):
        pen.curve((x, y), (x + 4, y - 2), (x + 8, y), 0.9, light((190, 228, 240)))
    pen.poly([(72, 46), (88, 46), (85, 50), (75, 50)], light((206, 92, 76)))
    pen.poly([(80, 28), (80, 44), (71, 44)], light((250, 250, 246)))
    pen.poly([(81, 32), (81, 44), (87, 44)], light((250, 230, 200)))
    pen.oval(48, 92, 90, 27, light((250, 252, 250)))
    pen.oval(48, 94, 90, 27.5, light((244, 218, 158)))
    pen.curve((10, 78), (6, 54), (15, 33), 3.6, light((158, 112, 74)))
    for end in ((-6, 30), (0, 21), (19, 17), (31, 24), (32, 38), (0, 43)):
        mid = ((15 + end[0]) / 2, (31 + end[1]) / 2 - 6)
        pen.curve((15, 32), mid, end, 4.2, light((92, 168, 92)))
    pen.oval(15, 35, 2, 2, light((120, 84, 54)))
    pen.oval(18, 36, 2, 2, light((120, 84, 54)))
    for i in range(5):
        a = math.radians(72 * i - 90)
        star = (82 + 4.4 * math.cos(a), 84 + 4.4 * math.sin(a))
        pen.line([(82, 84), star], 2.2, light((238, 148, 104)))


def _forest(pen: Pen, light: Light) -> None:
    _sky(pen, light, 60, 9)
    for x, s in ((-2, 1.3), (16, 1.5), (35, 1.25), (62, 1.25), (80, 1.5), (98, 1.3)):
        _pine(pen, light, x, 66, s, (142, 188, 140), snow=False)
    pen.box(LEFT, 57, RIGHT, BOTTOM, light((118, 164, 92)))
    pen.oval(48, 96, 84, 34, light((118, 164, 92)))
    for x, s in ((3, 1.9), (93, 1.9)):
        _pine(pen, light, x, 80, s, (74, 138, 88), snow=False)
    pen.oval(48, 104, 84, 30, light((134, 180, 102)))
    for x, y, s in ((12, 90, 1.0), (85, 88, 1.2)):
        pen.box(x - 1.5 * s, y - 4 * s, x + 1.5 * s, y, light((246, 236, 220)), 1)
        pen.slice(x, y - 3.4 * s, 4.6 * s, 4.6 * s, 180, 360, light((214, 84, 72)))
        pen.oval(x - 1.6 * s, y - 5.6 * s, 0.8 * s, 0.8 * s, light((255, 246, 240)))
        pen.oval(x + 1.8 * s, y - 5.2 * s, 0.8 * s, 0.8 * s, light((255, 246, 240)))


def _city(pen: Pen, light: Light) -> None:
    _sky(pen, light, 51, 12)
    walls = (
        (-6, 18, 16, (196, 160, 150)),
        (13, 32, 28, (166, 176, 198)),
        (26, 42, 39, (206, 188, 160)),
        (58, 40, 73, (170, 186, 190)),
        (70, 24, 85, (200, 170, 168)),
        (83, 10, 102, (160, 170, 196)),
    )
    for x0, y0, x1, colour in walls:
        pen.box(x0, y0, x1, 74, light(colour))
        pen.box(x0, y0, x1, y0 + 2, light(shade(colour, 0.85)))
        glass = light.lamp or (226, 240, 248)
        x = x0 + 2.4
        while x + 3 <= x1 - 1.4:
            for i, y in enumerate(range(int(y0) + 5, 70, 7)):
                dark = light.lamp is not None and (i + int(x)) % 3 == 0
                pen.box(
                    x,
                    y,
                    x + 3,
                    y + 4,
                    light(shade(colour, 0.7)) if dark else mix(glass, colour, 0.15),
                )
            x += 5
    pen.box(LEFT, 72, RIGHT, BOTTOM, light((190, 190, 196)))
    pen.box(LEFT, 82, RIGHT, BOTTOM, light((128, 130, 142)))
    pen.box(LEFT, 80.6, RIGHT, 82, light((226, 226, 226)))
    for x in range(-4, 104, 18):
        pen.box(x, 91, x + 10, 93, light((244, 236, 200)))
    pen.line([(89, 80), (89, 52)], 1.4, light((84, 90, 104)))
    pen.oval(89, 50, 3, 3, light.lamp or light((240, 240, 226)))


def _kitchen(pen: Pen, light: Light) -> None:
    pen.box(LEFT, TOP, RIGHT, BOTTOM, light((250, 236, 204)))
    for y in range(-4, 66, 9):
        pen.line([(LEFT, y), (RIGHT, y)], 0.5, light((236, 216, 178)))
    for x in range(-4, 104, 9):
        pen.line([(x, TOP), (x, 66)], 0.5, light((236, 216, 178)))
    _window(pen, light, 4, 8, 22, 26, (255, 252, 246))
    pen.box(68, 20, 98, 22.5, light((176, 128, 88)))
    for x, colour in ((73, (216, 110, 96)), (82, (104, 164, 172)), (91, (236, 186, 96))):
        pen.box(x - 3.4, 11, x + 3.4, 20, light(colour), 1.5)
        pen.box(x - 3.8, 10, x + 3.8, 12, light(shade(colour, 0.82)), 0.8)
    pen.box(LEFT, 52, 34, 80, light((150, 190, 190)))
    pen.box(62, 52, RIGHT, 80, light((232, 236, 240)))
    pen.box(LEFT, 50, RIGHT, 54, light((186, 140, 100)))
    for x in (4, 20):
        pen.box(x - 7, 57, x + 7, 77, light((170, 206, 204)), 1)
        pen.oval(x, 62, 1.2, 1.2, light((240, 240, 236)))
    pen.box(68, 60, 92, 76, light((84, 92, 108)), 1.5)
    for x in (70, 77, 84, 91):
        pen.oval(x, 57, 1.4, 1.4, light((110, 118, 130)))
    pen.box(72, 41, 88, 50, light((120, 134, 156)), 2)
    pen.box(70, 40, 90, 42, light((96, 108, 130)), 1)
    pen.oval(80, 39, 1.6, 1.2, light((96, 108, 130)))
    pen.curve((77, 36), (74, 32), (77, 28), 1.2, light((255, 255, 255)))
    pen.curve((83, 36), (80, 32), (83, 28), 1.2, light((255, 255, 255)))
    for row, y in enumerate(range(80, 104, 7)):
        for col, x in enumerate(range(-6, 104, 9)):
            pale = (row + col) % 2 == 0
            pen.box(x, y, x + 9, y + 7, light((248, 242, 232) if pale else (214, 160, 142)))


def _snow(pen: Pen, light: Light) -> None:
    _sky(pen, light)
    pen.poly([(-8, 62), (20, 26), (48, 62)], light((176, 196, 224)))
    pen.poly([(12, 36.3), (20, 26), (28, 36.3), (24, 39), (20, 36), (16, 39)], light((252, 254, 255)))
    pen.poly([(40, 62), (70, 32), (104, 62)], light((186, 204, 230)))
    pen.poly([(62, 40), (70, 32), (79, 40), (74, 42), (70, 39.5), (66, 42)], light((252, 254, 255)))
    pen.box(LEFT, 60, RIGHT, BOTTOM, light((226, 236, 250)))
    pen.oval(48, 96, 86, 40, light((226, 236, 250)))
    _pine(pen, light, 5, 72, 1.35, (104, 156, 150), snow=True)
    _pine(pen, light, 22, 66, 0.95, (120, 168, 162), snow=True)
    pen.slice(84, 72, 15, 16, 180, 360, light((196, 214, 240)))
    pen.slice(84, 72, 14, 15, 180, 360, light((236, 244, 255)))
    for y in (62, 67):
        pen.line([(71.5, y), (96.5, y)], 0.7, light((190, 208, 236)))
    pen.slice(80, 72, 5, 8, 180, 360, light((120, 142, 186)))
    pen.oval(48, 104, 90, 34, light((250, 252, 255)))
    for x, y in (
        (8, 14),
        (26, 30),
        (40, 12),
        (58, 20),
        (70, 8),
        (90, 36),
        (34, 46),
        (12, 48),
        (66, 48),
        (94, 6),
    ):
        pen.oval(x, y, 1.1, 1.1, mix((255, 255, 255), light.sky[0], 0.1))


def _castle(pen: Pen, light: Light) -> None:
    _sky(pen, light, 62, 12)
    stone, dark = (190, 184, 194), (158, 152, 168)
    pen.box(16, 36, 80, 76, light(stone))
    for x in range(18, 80, 8):
        pen.box(x, 32, x + 4.4, 37, light(stone))
    for x0, x1, flag in ((0, 20, (206, 84, 92)), (76, 96, (96, 120, 196))):
        mid = (x0 + x1) / 2
        pen.box(x0, 24, x1, 78, light(shade(stone, 0.93)))
        pen.poly([(x0 - 2, 25), (mid, 5), (x1 + 2, 25)], light((170, 96, 110)))
        pen.line([(mid, 6), (mid, -3)], 0.9, light((110, 96, 96)))
        pen.poly([(mid, -4), (mid + 8, -1), (mid, 2)], light(flag))
        pen.box(mid - 3, 34, mid + 3, 44, light.lamp or light((110, 104, 126)), 2.8)
        pen.box(mid - 3, 56, mid + 3, 64, light.lamp or light((110, 104, 126)), 2.8)
    for y in range(42, 76, 6):
        for x in range(22, 74, 10):
            if (x + y) % 4 == 0:
                pen.box(x, y, x + 6, y + 2.6, light(mix(stone, dark, 0.45)), 0.8)
    pen.slice(48, 60, 15, 17, 180, 360, light((128, 96, 76)))
    pen.box(33, 60, 63, 78, light((128, 96, 76)))
    pen.box(LEFT, 77, RIGHT, BOTTOM, light((142, 186, 116)))
    pen.oval(48, 104, 90, 30, light((142, 186, 116)))
    pen.poly([(36, 76), (60, 76), (74, 104), (22, 104)], light((222, 204, 168)))


def _library(pen: Pen, light: Light) -> None:
    pen.box(LEFT, TOP, RIGHT, BOTTOM, light((196, 150, 108)))
    books = (
        (184, 90, 84),
        (96, 132, 168),
        (214, 176, 98),
        (112, 152, 112),
        (152, 112, 160),
        (228, 214, 184),
    )
    rng = np.random.default_rng(4)
    for x0, x1 in ((30, 102),):
        pen.box(x0, TOP, x1, 80, light((142, 96, 62)))
        for y in (-4, 16, 36, 56):
            pen.box(x0 + 2, y, x1, y + 17, light((96, 64, 44)))
            x = x0 + 3.0
            while x < x1 - 3:
                w, h = 3 + 2 * rng.random(), 11 + 4.5 * rng.random()
                colour = books[int(rng.integers(len(books)))]
                pen.box(x, y + 17 - h, x + w - 0.6, y + 17, light(colour))
                pen.box(
                    x,
                    y + 19.5 - h,
                    x + w - 0.6,
                    y + 20.5 - h,
                    light(mix(colour, (255, 255, 255), 0.4)),
                )
                x += w
    _window(pen, light, 3, 8, 20, 34, (250, 236, 210))
    pen.poly([(6, 64), (22, 64), (18, 54), (10, 54)], light.lamp or light((244, 222, 160)))
    pen.line([(14, 64), (14, 72)], 1.6, light((120, 84, 56)))
    pen.box(LEFT, 71, 27, 75, light((120, 80, 52)))
    pen.box(2, 75, 6, 84, light((120, 80, 52)))
    pen.box(20, 75, 24, 84, light((120, 80, 52)))
    pen.box(LEFT, 80, RIGHT, BOTTOM, light((214, 170, 124)))
    for y in (85, 91, 97):
        pen.line([(LEFT, y), (RIGHT, y)], 0.5, light((190, 146, 102)))
    pen.oval(48, 91, 38, 8, light((176, 92, 92)))
    pen.oval(48, 91, 33, 6.4, light((222, 186, 146)))


def _meadow(pen: Pen, light: Light) -> None:
    _sky(pen, light)
    pen.box(LEFT, 62, RIGHT, BOTTOM, light((156, 206, 124)))
    pen.oval(16, 80, 50, 30, light((170, 214, 134)))
    pen.oval(86, 84, 56, 32, light((156, 206, 124)))
    pen.poly([(12, 58), (15, 32), (21, 32), (24, 58)], light((240, 228, 214)))
    pen.poly([(13.5, 32), (18, 25), (22.5, 32)], light((196, 98, 84)))
    for i in range(4):
        a = math.radians(90 * i + 28)
        tip = (18 + 13 * math.cos(a), 33 + 13 * math.sin(a))
        pen.line([(18, 33), tip], 2.6, light((250, 246, 238)))
    pen.oval(18, 33, 1.6, 1.6, light((150, 110, 90)))
    _round_tree(pen, light, 84, 60, 1.0, (120, 184, 104))
    pen.oval(48, 108, 96, 42, light((140, 200, 104)))
    for x in range(-6, 104, 11):
        pen.box(x, 62, x + 3, 72, light((250, 246, 236)), 1)
    pen.box(LEFT, 65, RIGHT, 67, light((250, 246, 236)))
    flowers = ((250, 130, 150), (255, 255, 255), (255, 220, 96), (190, 150, 230))
    spots = (
        (6, 78),
        (16, 88),
        (26, 80),
        (9, 94),
        (74, 80),
        (88, 78),
        (80, 91),
        (93, 90),
        (66, 93),
        (30, 94),
    )
    for i, (x, y) in enumerate(spots):
        for dx, dy in ((-1.3, 0), (1.3, 0), (0, -1.3), (0, 1.3)):
            pen.oval(x + dx, y + dy, 1.3, 1.3, light(flowers[i % 4]))
        pen.oval(x, y, 0.9, 0.9, light((246, 190, 70)))


_PAINTERS: dict[str, Callable[[Pen, Light], None]] = {
    "beach": _beach,
    "forest": _forest,
    "city": _city,
    "kitchen": _kitchen,
    "snow": _snow,
    "castle": _castle,
    "library": _library,
    "meadow": _meadow,
}


@functools.cache
def background(place: str, time: str, mirrored: bool, size: int) -> Image.Image:
    """Returns the oversized background of a place at a time of day.

    The image is `(size + 2 * MARGIN * size / UNITS) * SUPERSAMPLE` pixels wide and high. It is
    shared between calls: crop from it, do not draw on it.
    """
    scale = size * SUPERSAMPLE / UNITS
    light = LIGHTS[time]
    canvas = _gradient(round((UNITS + 2 * MARGIN) * scale), *light.sky)
    _PAINTERS[place](Pen(canvas, scale, MARGIN * scale, MARGIN * scale), light)
    return canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else canvas
