"""Draws a character in a scene: the picture half of the mini world.

Everything is painted with flat shapes at four times the size on a cached background and shrunk
once by averaging, which gives clean smooth edges in a few milliseconds. The result depends on the
look, the scene and the size alone.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from workshop.miniworld.creature import Creature
from workshop.miniworld.pen import SUPERSAMPLE, UNITS, Pen, shade
from workshop.miniworld.places import LIGHTS, MARGIN, background
from workshop.miniworld.world import Look, Scene

GROUND = 90.0
JUMP = 7.0


def draw(look: Look, scene: Scene, size: int = 96) -> np.ndarray:
    """Paints one picture.

    Args:
        look: who is in the picture.
        scene: what happens in it; `scene.jitter` moves and scales the character a little.
        size: width and height in pixels.

    Returns:
        uint8 RGB array [size, size, 3].
    """
    rng = np.random.default_rng(scene.jitter)
    shift_x, shift_y, slide_x, slide_y = rng.uniform(-1, 1, size=4)
    zoom = rng.uniform(0.92, 0.99)
    unit = size * SUPERSAMPLE / UNITS
    left = round(MARGIN * (1 + 0.95 * slide_x) * unit)
    top = round(MARGIN * (1 + 0.5 * slide_y) * unit)
    full = size * SUPERSAMPLE
    backdrop = background(scene.place, scene.time, bool(rng.integers(2)), size)
    canvas = backdrop.crop((left, top, left + full, top + full))

    x = (48 + 2.0 * shift_x) * unit - 48 * unit * zoom
    y = (GROUND + 1.0 + shift_y) * unit - GROUND * unit * zoom
    ground = Pen(canvas, unit * zoom, x, y)
    jumping = scene.pose == "jumping"
    dark = shade(LIGHTS[scene.time]((150, 150, 150)), 0.62)
    ground.oval(48, GROUND + 1.5, 16 if jumping else 22, 2.6 if jumping else 3.2, dark)
    lift = (JUMP if jumping else 0.0) * unit * zoom
    Creature(Pen(canvas, unit * zoom, x, y - lift), look, scene).paint()
    return np.asarray(canvas.reduce(SUPERSAMPLE))


def contact_sheet(pictures: list[np.ndarray], columns: int) -> Image.Image:
    """Tiles pictures of one size [size, size, 3] into a sheet with `columns` columns."""
    size = pictures[0].shape[0]
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (size + 2), rows * (size + 2)), (255, 255, 255))
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), ((i % columns) * (size + 2), (i // columns) * (size + 2)))
    return sheet
