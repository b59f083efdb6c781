"""What a character wears: eight accessories, each large enough to read at 96 pixels.

An accessory has one or two layers (a cape hangs behind the body and closes at the neck); `wear`
paints the part of it that belongs to one layer, so that the painter of the body need not know
which accessory it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from workshop.miniworld.anatomy import CX, CY, PALETTE, SHAPES, WHITE, Shape
from workshop.miniworld.pen import Colour, Pen, shade
from workshop.miniworld.world import Look

GOLD: Colour = (255, 208, 64)


def wear(pen: Pen, look: Look, layer: str) -> None:
    """Paints what the look's accessory shows in a layer: "behind", "head", "face" or "neck"."""
    painter = _LAYERS[layer].get(look.accessory)
    if painter:
        painter(pen, SHAPES[look.species], PALETTE[look.accessory_colour])


def _hat(pen: Pen, shape: Shape, cloth: Colour) -> None:
    y = shape.top + 1.5
    pen.poly([(CX - 9.5, y - 16), (CX + 9.5, y - 16), (CX + 8.5, y), (CX - 8.5, y)], shade(cloth))
    pen.poly([(CX - 8.7, y - 15.2), (CX + 8.3, y - 15.2), (CX + 7.3, y), (CX - 7.7, y)], cloth)
    pen.box(CX - 8.7, y - 5, CX + 8.7, y - 1.4, shade(cloth, 0.55))
    pen.box(CX - 15, y - 2, CX + 15, y + 2.2, shade(cloth), 2)
    pen.box(CX - 15, y - 2, CX + 15, y + 1.2, cloth, 1.6)


def _crown(pen: Pen, shape: Shape, cloth: Colour) -> None:
    y = shape.top + 1.5
    spikes = [(-12, 0), (-13, -11), (-6.5, -5.5), (0, -13), (6.5, -5.5), (13, -11), (12, 0)]
    pen.rimmed([(CX + dx, y + dy) for dx, dy in spikes], cloth, 0.9)
    pen.box(CX - 12, y - 2.4, CX + 12, y + 1.6, shade(cloth), 1.4)
    for dx, dy in ((-13, -11), (0, -13), (13, -11)):
        pen.ball(CX + dx, y + dy, 2.1, 2.1, cloth)
    for dx in (-7, 0, 7):
        pen.oval(CX + dx, y - 0.4, 1.2, 1.2, GOLD if cloth == PALETTE["white"] else WHITE)


def _headphones(pen: Pen, shape: Shape, cloth: Colour) -> None:
    rx, top = shape.head[0], shape.top - 3.5
    band = []
    for i in range(19):
        a = math.pi + math.pi * i / 18
        band.append((CX + (rx + 0.5) * math.cos(a), CY + (CY - top) * math.sin(a)))
    pen.line(band, 4.2, shade(cloth, 0.72))
    pen.line(band, 2.8, cloth)
    for side in (-1, 1):
        pen.ball(CX + side * (rx + 0.5), CY + 1, 5.0, 8.0, shade(cloth, 0.72))
        pen.ball(CX + side * (rx + 1.5), CY + 0.6, 3.8, 6.8, cloth)


def _flower(pen: Pen, shape: Shape, cloth: Colour) -> None:
    # A frog's eyes sit on top of its head, so its flower goes beside them.
    x, y = (CX - 24, 25.0) if shape is SHAPES["frog"] else (CX - 14, shape.top + 1.5)
    petals = [math.radians(72 * i - 90) for i in range(5)]
    for a in petals:
        pen.oval(x + 5.6 * math.cos(a), y + 5.6 * math.sin(a), 4.7, 4.7, shade(cloth, 0.74))
    for a in petals:
        pen.oval(x + 5.4 * math.cos(a), y + 5.4 * math.sin(a), 4.0, 4.0, cloth)
    like_gold = cloth in (PALETTE["yellow"], PALETTE["orange"])
    pen.oval(x, y, 3.4, 3.4, (120, 76, 48) if like_gold else GOLD)


def _glasses(pen: Pen, shape: Shape, cloth: Colour) -> None:
    dx, y = shape.eyes
    radius = 8.4
    pen.line([(CX - dx + radius - 1, y), (CX + dx - radius + 1, y)], 2.4, cloth)
    for side in (-1, 1):
        ring = []
        for i in range(25):
            a = 2 * math.pi * i / 24
            ring.append((CX + side * dx + radius * math.cos(a), y + radius * math.sin(a)))
        pen.line(ring, 3.6, shade(cloth, 0.66))
        pen.line(ring, 2.5, cloth)


def _cape(pen: Pen, shape: Shape, cloth: Colour) -> None:
    half = [(13, 58), (33, 74), (36, 87), (18, 85)]
    outer = [(CX + x, y) for x, y in half] + [(CX, 88)] + [(CX - x, y) for x, y in reversed(half)]
    pen.rimmed(outer, cloth, 0.93)
    for dx in (-26, 26):
        pen.line([(CX + dx * 0.66, 67), (CX + dx, 83)], 1.2, shade(cloth, 0.72))


def _clasp(pen: Pen, shape: Shape, cloth: Colour) -> None:
    rx, y = shape.body[0], 61.5
    pen.box(CX - rx, y - 2, CX + rx, y + 2.4, shade(cloth, 0.78), 2)
    pen.box(CX - rx + 0.6, y - 1.6, CX + rx - 0.6, y + 1.4, cloth, 1.6)
    pen.ball(CX, y + 0.6, 2.6, 2.6, WHITE if cloth == PALETTE["yellow"] else GOLD)


def _bow_tie(pen: Pen, shape: Shape, cloth: Colour) -> None:
    y = 62.5
    for side in (-1, 1):
        wing = [(CX, y), (CX + side * 11.5, y - 6), (CX + side * 11.5, y + 6)]
        pen.rimmed(wing, cloth, 0.84)
    pen.ball(CX, y, 3.2, 3.6, shade(cloth, 0.86))


def _scarf(pen: Pen, shape: Shape, cloth: Colour) -> None:
    rx, y = shape.body[0], 61.5
    dark = shade(cloth, 0.74)
    pen.box(CX + 3, y, CX + 10.5, y + 19, dark, 1.6)
    pen.box(CX + 3.8, y, CX + 9.6, y + 18, shade(cloth, 0.94), 1.4)
    for dx in (4.4, 6.7, 9.0):
        pen.line([(CX + dx, y + 17), (CX + dx, y + 20)], 0.9, dark)
    pen.box(CX - rx - 2, y - 3.4, CX + rx + 2, y + 4.6, dark, 4)
    pen.box(CX - rx - 1.2, y - 2.8, CX + rx + 1.2, y + 3.4, cloth, 3.4)


_LAYERS: dict[str, dict[str, Callable[[Pen, Shape, Colour], None]]] = {
    "behind": {"cape": _cape},
    "head": {"hat": _hat, "crown": _crown, "headphones": _headphones, "flower": _flower},
    "face": {"glasses": _glasses},
    "neck": {"bow tie": _bow_tie, "scarf": _scarf, "cape": _clasp},
}
