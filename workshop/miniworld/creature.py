"""The characters: ten species in flat rounded shapes, with poses, faces and accessories.

A character is painted back to front around a fixed skeleton in picture units: the head is centred
at (48, 43), the ground is at 90. A species brings its ears, tail, muzzle and proportions; poses
move arms, legs and props; everything else is shared, so that an expression or an accessory looks
the same on everyone.
"""

from __future__ import annotations

import math

from workshop.miniworld.anatomy import BEAK, CX, CY, INK, METAL, PALETTE, SHAPES, WHITE
from workshop.miniworld.outfit import wear
from workshop.miniworld.pen import Pen, Point, mix, shade
from workshop.miniworld.world import Look, Scene


class Creature:
    """One character in one scene, ready to be painted with a pen."""

    def __init__(self, pen: Pen, look: Look, scene: Scene) -> None:
        self.pen, self.look, self.scene = pen, look, scene
        self.shape = SHAPES[look.species]
        self.body = PALETTE[look.colour]
        self.belly = PALETTE[look.belly]
        self.mark = shade(self.body, 0.52)

    def paint(self) -> None:
        """Paints everything from back to front."""
        pen, look = self.pen, self.look
        if self.scene.pose == "sitting":
            self._bench()
        wear(pen, look, "behind")
        self._tail()
        self._legs()
        self._trunk()
        self._ears()
        self._head()
        wear(pen, look, "head")
        self._face()
        wear(pen, look, "face")
        wear(pen, look, "neck")
        self._arms()
        if self.scene.expression == "sleepy":
            self._snore()

    # -- body ---------------------------------------------------------------------------------

    def _tail(self) -> None:
        pen, body, belly = self.pen, self.body, self.belly
        match self.look.species:
            case "fox":
                pen.tilted(71, 74, 15, 7.6, -38, shade(body))
                pen.tilted(70.6, 73.6, 14, 6.6, -38, body)
                pen.tilted(78.5, 67.4, 6, 5.4, -38, belly)
            case "cat":
                pen.curve((58, 82), (80, 88), (78, 70), 4.6, shade(body))
                pen.curve((78, 70), (76, 62), (83, 61), 4.6, shade(body))
            case "mouse":
                pen.curve((58, 84), (74, 92), (80, 80), 2.2, mix(body, (250, 160, 170), 0.6))
                pen.curve((80, 80), (84, 72), (90, 76), 2.2, mix(body, (250, 160, 170), 0.6))
            case "rabbit":
                pen.ball(63, 79, 5.4, 5.4, belly)
            case "penguin" | "owl":
                pen.poly([(56, 80), (72, 88), (58, 89)], shade(body))
            case _:
                pass

    def _legs(self) -> None:
        if self.look.species == "ghost":
            return
        pen, species = self.pen, self.look.species
        foot = {"penguin": BEAK, "owl": BEAK, "robot": METAL}.get(species, self.body)
        match self.scene.pose:
            case "jumping":
                for side in (-1, 1):
                    pen.line([(CX + side * 8, 80), (CX + side * 16, 87)], 6, shade(self.body, 0.86))
                    pen.ball(CX + side * 18, 88, 6, 3.8, foot)
            case "sitting":
                pass
            case _:
                for side in (-1, 1):
                    pen.box(CX + side * 7 - 3.2, 80, CX + side * 7 + 3.2, 89, shade(self.body, 0.86), 2)
                    pen.ball(CX + side * 8, 88.4, 6.4, 3.6, foot)

    def _trunk(self) -> None:
        pen, (rx, ry) = self.pen, self.shape.body
        y = 71.0
        if self.look.species == "robot":
            pen.box(CX - rx, y - ry, CX + rx, y + ry, shade(self.body), 4)
            pen.box(CX - rx + 0.8, y - ry + 0.8, CX + rx - 1.2, y + ry - 1.4, self.body, 3.6)
            self._pattern_trunk()
            pen.box(CX - 9, y - 8, CX + 9, y + 11, shade(self.belly), 3)
            pen.box(CX - 8.2, y - 7.2, CX + 8.2, y + 10, self.belly, 2.6)
        elif self.look.species == "ghost":
            hem = 92.0 if self.scene.pose != "jumping" else 94.0
            for inset, fill in ((0.0, shade(self.body)), (1.0, self.body)):
                left, right = CX - 22 + inset, CX + 22 - inset * 1.4
                points = [(left, 43.0), (right, 43.0), (right + 1, hem - 5)]
                for i in range(24, -1, -1):
                    x = left - 1 + (right - left + 2) * i / 24
                    points.append((x, hem - 2 + 3 * math.cos(i * math.pi / 3) - inset))
                pen.poly(points, fill)
            self._pattern_trunk()
            pen.oval(CX, 75, 11, 10.5, self.belly)
        else:
            pen.ball(CX, y, rx, ry, self.body, 1.1)
            self._pattern_trunk()
            pen.oval(CX, y + 2.5, rx * 0.68, ry * 0.72, self.belly)
        if self.scene.pose == "sitting" and self.look.species != "ghost":
            foot = {"penguin": BEAK, "owl": BEAK, "robot": METAL}.get(self.look.species, self.body)
            for side in (-1, 1):
                pen.ball(CX + side * 12, 84.5, 6.6, 6.8, foot)
                pen.oval(
                    CX + side * 12,
                    85.2,
                    3.4,
                    3.6,
                    self.belly if foot == self.body else shade(foot, 0.9),
                )

    def _pattern_trunk(self) -> None:
        pen, (rx, _) = self.pen, self.shape.body
        if self.look.pattern == "striped":
            for y in (64.5, 71.5, 78.5):
                for side in (-1, 1):
                    edge = CX + side * (rx - (1.4 if y != 71.5 else 0.6))
                    pen.line([(edge, y), (edge - side * 7.5, y + 0.8)], 3.2, self.mark)
        elif self.look.pattern == "spotted":
            for dx, y, r in (
                (0.8, 66, 2.3),
                (0.72, 78, 2.5),
                (-0.8, 71.5, 2.5),
                (-0.66, 80.5, 2.0),
                (-0.62, 63, 2.0),
            ):
                pen.oval(CX + dx * rx, y, r + 0.6, r + 0.6, self.mark)

    # -- head ---------------------------------------------------------------------------------

    def _ears(self) -> None:
        pen, body, belly = self.pen, self.body, self.belly
        for side in (-1, 1):

            def at(points: list[Point], side: int = side) -> list[Point]:
                return [(CX + side * x, y) for x, y in points]

            match self.look.species:
                case "fox":
                    pen.rimmed(at([(5, 29), (18, 9), (24, 38)]), body, 0.9)
                    pen.poly(at([(11, 29), (17.2, 15), (20.5, 34)]), belly)
                    pen.poly(at([(14.6, 14.4), (18, 9), (19.2, 15)]), INK)
                case "cat":
                    pen.rimmed(at([(6, 28), (20, 14), (23.5, 38)]), body, 0.9)
                    pen.poly(at([(11, 29), (18.6, 20), (20.5, 34)]), belly)
                case "bear":
                    pen.ball(CX + side * 17.5, 27, 7.4, 7.4, body)
                    pen.oval(CX + side * 17.2, 27.4, 4.2, 4.2, belly)
                case "rabbit":
                    pen.tilted(CX + side * 10.5, 17, 5.4, 15, side * 9, shade(body))
                    pen.tilted(CX + side * 10.3, 16.8, 4.6, 14.2, side * 9, body)
                    pen.tilted(CX + side * 10.4, 18, 2.6, 11, side * 9, belly)
                case "mouse":
                    pen.ball(CX + side * 19.5, 27, 12, 12, body)
                    pen.oval(CX + side * 19.5, 27.4, 8.2, 8.2, belly)
                case "owl":
                    pen.rimmed(at([(6, 28), (21, 15), (22, 36)]), body, 0.9)
                case "robot":
                    pen.box(CX + side * 23 - 2.4, 38, CX + side * 23 + 2.4, 49, METAL, 1.4)
                case _:
                    pass
        if self.look.species == "robot":
            pen.line([(CX, 27), (CX, 15)], 1.8, METAL)
            pen.ball(CX, 13, 3.6, 3.6, belly)
        if self.look.species == "fox":
            for side in (-1, 1):
                pen.poly(
                    [(CX + side * 14, 42), (CX + side * 27.5, 52), (CX + side * 12, 60)],
                    shade(body, 0.92),
                )

    def _head(self) -> None:
        pen, (rx, ry), body, belly = self.pen, self.shape.head, self.body, self.belly
        species = self.look.species
        if species == "robot":
            pen.box(CX - rx, CY - ry, CX + rx, CY + ry, shade(body), 6)
            pen.box(CX - rx + 0.8, CY - ry + 0.8, CX + rx - 1.2, CY + ry - 1.4, body, 5.4)
        elif species == "ghost":
            pen.oval(CX, CY, rx, ry, shade(body))
            pen.oval(CX - 0.2, CY + 0.8, rx - 1, ry - 1, body)
            pen.box(CX - rx + 1, CY + 2, CX + rx - 1.4, CY + 16, body)
        else:
            pen.ball(CX, CY, rx, ry, body, 1.2)
        self._pattern_head()
        match species:
            case "fox":
                for side in (-1, 1):
                    pen.tilted(CX + side * 9, 53, 11, 6.5, -side * 28, belly)
                pen.oval(CX, 54, 8, 7, belly)
            case "cat" | "mouse":
                pen.oval(CX, 53.5, 8.5, 6.5, belly)
            case "bear":
                pen.oval(CX, 52.5, 11, 8.5, belly)
            case "rabbit":
                pen.oval(CX, 53.5, 8, 6.8, belly)
            case "owl":
                for side in (-1, 1):
                    pen.oval(CX + side * 9.5, 40.5, 10.4, 10.8, belly)
            case "penguin":
                for side in (-1, 1):
                    pen.oval(CX + side * 7, 41.5, 9, 10.5, belly)
                pen.oval(CX, 50, 13.5, 10.5, belly)
            case "frog":
                pen.oval(CX, 53, 18, 6, belly)
                for side in (-1, 1):
                    pen.ball(CX + side * 13.5, 28, 8.4, 8.4, body)
            case "ghost":
                pen.oval(CX, 53.5, 9.5, 6.8, belly)
            case "robot":
                pen.box(CX - 16, 32, CX + 16, 57, belly, 4)
            case _:
                pass

    def _pattern_head(self) -> None:
        pen, (rx, ry) = self.pen, self.shape.head
        if self.look.pattern == "striped":
            for side in (-1, 1):
                for y in (43.5, 49.5):
                    inset = rx * (1 - math.sqrt(max(0.0, 1 - ((y - CY) / ry) ** 2))) + 0.6
                    edge = CX + side * (rx - inset)
                    pen.line([(edge, y), (edge - side * 6, y)], 3.0, self.mark)
            for dx in (-5, 0, 5):
                pen.line(
                    [(CX + dx, CY - ry + 1.8 + abs(dx) * 0.25), (CX + dx, CY - ry + 7)],
                    3.0,
                    self.mark,
                )
        elif self.look.pattern == "spotted":
            for dx, dy, r in (
                (-0.3, -0.72, 2.6),
                (0.4, -0.66, 2.2),
                (0.82, 0.05, 2.4),
                (-0.84, 0.1, 2.4),
                (0.74, 0.5, 1.9),
                (-0.74, 0.5, 1.9),
                (0.06, -0.5, 1.7),
            ):
                pen.oval(CX + dx * rx, CY + dy * ry, r + 0.5, r + 0.5, self.mark)

    # -- face ---------------------------------------------------------------------------------

    def _face(self) -> None:
        self._nose()
        for side in (-1, 1):
            self._eye(side)
        self._mouth()
        if self.look.species in ("cat", "mouse"):
            for side in (-1, 1):
                for dy in (-1.4, 1.6):
                    self.pen.line(
                        [(CX + side * 15, 52 + dy * 0.6), (CX + side * 26, 52 + dy * 2.4)], 0.7, INK
                    )

    def _nose(self) -> None:
        pen, y = self.pen, self.shape.mouth - 4.6
        match self.look.species:
            case "owl" | "penguin":
                pen.poly([(CX - 4.4, y - 1.6), (CX + 4.4, y - 1.6), (CX, y + 3.6)], shade(BEAK, 0.9))
                pen.poly([(CX - 4.4, y - 1.6), (CX + 4.4, y - 1.6), (CX, y + 1.6)], BEAK)
            case "fox" | "bear":
                pen.oval(CX, y + 0.4, 3.2, 2.3, INK)
            case "cat" | "rabbit" | "mouse":
                pen.oval(CX, y + 0.6, 2.3, 1.7, (228, 96, 120))
            case _:
                pass

    def _eye(self, side: int) -> None:
        pen = self.pen
        x, y = CX + side * self.shape.eyes[0], self.shape.eyes[1]
        match self.scene.expression:
            case "happy":
                pen.oval(x, y, 4.0, 4.8, INK)
                pen.oval(x - 1.3, y - 1.8, 1.5, 1.5, WHITE)
                pen.oval(x + 1.3, y + 1.8, 0.8, 0.8, WHITE)
                pen.oval(CX + side * 15, self.shape.mouth - 2.0, 3.2, 2.0, (255, 130, 140))
            case "sad":
                pen.oval(x, y + 0.6, 3.8, 4.2, INK)
                pen.oval(x - 1.2, y - 0.6, 1.3, 1.3, WHITE)
                pen.line([(x - side * 4.2, y - 7.6), (x + side * 4.2, y - 4.6)], 1.9, INK)
                drop = (x + side * 2.6, y + 9.5)
                pen.poly(
                    [(drop[0] - 2.1, drop[1]), (drop[0], drop[1] - 5.4), (drop[0] + 2.1, drop[1])],
                    (92, 186, 255),
                )
                pen.oval(drop[0], drop[1] + 0.4, 2.2, 2.4, (92, 186, 255))
                pen.oval(drop[0] - 0.6, drop[1], 0.7, 0.9, WHITE)
            case "angry":
                pen.oval(x, y + 0.8, 4.0, 4.2, INK)
                pen.oval(x - 1.1, y + 0.8, 1.2, 1.2, WHITE)
                pen.line([(x - side * 5.0, y - 1.6), (x + side * 5.4, y - 6.4)], 3.0, INK)
            case "surprised":
                pen.oval(x, y, 6.2, 6.6, INK)
                pen.oval(x, y, 5.2, 5.6, WHITE)
                pen.oval(x, y, 2.4, 2.6, INK)
                pen.curve((x - 3.6, y - 8.6), (x, y - 11), (x + 3.6, y - 8.6), 1.5, INK, 6)
            case _:
                pen.curve((x - 4.6, y), (x, y + 5), (x + 4.6, y), 2.0, INK, 8)

    def _mouth(self) -> None:
        pen, y = self.pen, self.shape.mouth
        match self.scene.expression:
            case "happy":
                pen.slice(CX, y - 1.4, 6.6, 7.4, 0, 180, INK)
                pen.slice(CX, y + 2.6, 4.0, 3.2, 0, 180, (240, 92, 100))
            case "sad":
                pen.curve((CX - 5, y + 3.4), (CX, y - 3), (CX + 5, y + 3.4), 2.0, INK, 8)
            case "angry":
                pen.box(CX - 6.4, y - 1.2, CX + 6.4, y + 4.2, INK, 1.6)
                pen.box(CX - 5.2, y - 0.2, CX + 5.2, y + 3.2, WHITE, 0.8)
                for dx in (-2.6, 0.0, 2.6):
                    pen.line([(CX + dx, y), (CX + dx, y + 3)], 0.7, INK)
            case "surprised":
                pen.oval(CX, y + 1.6, 3.6, 4.6, INK)
                pen.oval(CX, y + 3.4, 2.0, 2.0, (240, 92, 100))
            case _:
                pen.oval(CX, y + 1.0, 2.4, 1.8, INK)

    def _snore(self) -> None:
        for x, y, s in ((75.0, 29.0, 3.0), (81.5, 20.5, 4.0), (89.0, 10.5, 5.0)):
            points = [(x - s, y - s), (x + s, y - s), (x - s, y + s), (x + s, y + s)]
            self.pen.line(points, 2.6, INK)
            self.pen.line(points, 1.5, WHITE)

    # -- arms and props -----------------------------------------------------------------------

    def _arm(self, side: int, hand: Point) -> None:
        pen, width = self.pen, self.shape.arm
        start = (CX + side * (self.shape.body[0] - 2.5), 65.0)
        skin = METAL if self.look.species == "robot" else self.body
        pen.line([start, hand], width, shade(skin, 0.74))
        pen.line([start, hand], width - 1.6, shade(skin, 0.96))
        self._pattern_arm(start, hand)
        if self.look.species == "robot":
            pen.ball(*hand, 4.2, 4.2, self.body)

    def _pattern_arm(self, start: Point, hand: Point) -> None:
        """Bands across the arm or dots along it, so that a book or a cape never hides the pattern."""
        dx, dy = hand[0] - start[0], hand[1] - start[1]
        reach = math.hypot(dx, dy)
        half = self.shape.arm / 2 - 1.2
        for along in (0.5, 0.85):
            x, y = start[0] + dx * along, start[1] + dy * along
            if self.look.pattern == "striped":
                u, v = -dy / reach * half, dx / reach * half
                self.pen.line([(x - u, y - v), (x + u, y + v)], 2.2, self.mark)
            elif self.look.pattern == "spotted":
                self.pen.oval(x, y, 1.8, 1.8, self.mark)

    def _arms(self) -> None:
        pen = self.pen
        down = {side: (CX + side * (self.shape.body[0] + 5.5), 77.0) for side in (-1, 1)}
        match self.scene.pose:
            case "waving":
                self._arm(-1, down[-1])
                self._arm(1, (79, 52))
                for r in (6.5, 10.0):
                    points = [
                        (79 + r * math.cos(a), 50 + r * math.sin(a)) for a in (-1.1, -0.75, -0.4, -0.05)
                    ]
                    pen.line(points, 2.0, INK)
                    pen.line(points, 1.2, WHITE)
            case "jumping":
                for side in (-1, 1):
                    self._arm(side, (CX + side * 30, 51))
            case "reading":
                cover = (126, 84, 60)
                for side in (-1, 1):
                    outer = CX + side * 18.5
                    pen.poly([(CX, 68), (outer, 64.5), (outer, 81.5), (CX, 85)], cover)
                    pen.poly(
                        [
                            (CX, 67),
                            (outer - side * 1.6, 63.5),
                            (outer - side * 1.6, 79.5),
                            (CX, 83),
                        ],
                        (255, 252, 240),
                    )
                    for y in (69.0, 72.5, 76.0):
                        pen.line([(CX + side * 3.5, y), (CX + side * 14, y - 2.4)], 0.9, (176, 170, 170))
                pen.line([(CX, 67), (CX, 83.5)], 1.0, cover)
                for side in (-1, 1):
                    self._arm(side, (CX + side * 19.5, 75))
            case "holding a balloon":
                self._arm(1, down[1])
                pen.curve((17, 66), (20, 52), (13.5, 40), 0.9, INK)
                pen.poly([(11, 42.5), (16, 42.5), (13.5, 38)], (196, 36, 60))
                pen.oval(13.5, 27, 10, 12, (196, 36, 60))
                pen.oval(13.1, 26.6, 9.1, 11.1, (236, 60, 84))
                pen.tilted(9.6, 21.6, 1.7, 3.2, 28, (255, 196, 204))
                self._arm(-1, (17.5, 66))
            case "sitting":
                for side in (-1, 1):
                    self._arm(side, (CX + side * (self.shape.body[0] + 4.5), 79.0))
            case _:
                for side in (-1, 1):
                    self._arm(side, down[side])

    def _bench(self) -> None:
        pen, wood = self.pen, (164, 112, 70)
        for x in (24, 66):
            pen.box(x, 84, x + 6, 95, shade(wood, 0.72), 1)
        pen.box(17, 80, 79, 87.5, shade(wood, 0.8), 2)
        pen.box(17, 79.4, 79, 84.4, wood, 2)
