"""Proportions and paints shared by everything that draws a character.

Coordinates are picture units (96 to a picture's width). Every head is centred at (CX, CY) and the
ground is at 90, so that faces and accessories fit all species.
"""

from __future__ import annotations

import dataclasses

from workshop.miniworld.pen import Colour, Point

CX, CY = 48.0, 43.0

PALETTE: dict[str, Colour] = {
    "red": (218, 52, 52),
    "orange": (247, 142, 38),
    "yellow": (252, 216, 66),
    "green": (84, 172, 78),
    "blue": (66, 128, 222),
    "purple": (142, 84, 196),
    "pink": (250, 152, 190),
    "white": (248, 247, 244),
}
INK: Colour = (52, 34, 44)
WHITE: Colour = (255, 255, 255)
BEAK: Colour = (250, 174, 52)
METAL: Colour = (150, 158, 172)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Proportions of a species, in units."""

    head: Point = (22.5, 19.5)
    body: Point = (14.5, 16.0)
    eyes: Point = (9.0, 42.0)
    mouth: float = 51.5
    arm: float = 6.4
    top: float = 24.5


SHAPES = {
    "fox": Shape(head=(23.5, 18.5)),
    "cat": Shape(head=(23.5, 18.5)),
    "bear": Shape(head=(23.5, 20.0), body=(17.0, 16.5), arm=8.0),
    "rabbit": Shape(head=(20.5, 19.0), body=(13.5, 16.0)),
    "owl": Shape(head=(23.0, 20.0), body=(18.0, 18.0), eyes=(9.5, 40.5), mouth=53.5, arm=9.0),
    "frog": Shape(head=(25.0, 16.5), body=(15.0, 15.0), eyes=(13.5, 28.0), mouth=48.0, top=20.5),
    "robot": Shape(head=(22.0, 18.0), body=(14.5, 15.0), arm=5.0, top=26.0),
    "ghost": Shape(head=(22.0, 22.0), body=(20.0, 17.0), arm=7.0, top=22.0),
    "penguin": Shape(head=(20.5, 19.0), body=(17.5, 18.0), eyes=(8.0, 41.0), mouth=53.0, arm=7.0),
    "mouse": Shape(head=(20.5, 17.5), body=(13.0, 15.0), eyes=(8.0, 43.0), mouth=53.0, arm=5.4, top=27.0),
}
