"""Looking at a run: early warning of reward hacking, and the best and worst pictures.

A policy that has found a trick draws the same rewarded picture again and again: the reward climbs while the
pictures of a group become alike. The warning compares the last rounds with the first: reward up by more
than the first rounds' scatter, distances inside groups down by more than a fifth. It warns and decides
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

LOST_DIVERSITY = 0.8
"""Warn when distances inside groups fall below this part of the first rounds'."""


@dataclass
class HackingWatch:
    """Remembers mean reward and mean distance of each round.

    Attributes:
      window: rounds that are averaged at both ends.
    """

    window: int = 5
    _rewards: list[float] = field(default_factory=list)
    _spreads: list[float] = field(default_factory=list)

    @classmethod
    def resumed(cls, records: Iterable[dict[str, float]], window: int = 5) -> HackingWatch:
        """One that has seen the records of a metrics file."""
        watch = cls(window)
        for record in records:
            watch.add(record["reward"], record["spread"])
        return watch

    def add(self, reward: float, spread: float) -> str | None:
        """Notes a round; returns a warning if the signs are there."""
        self._rewards.append(reward)
        self._spreads.append(spread)
        n = self.window
        if len(self._rewards) < 2 * n:
            return None
        before, now = np.array(self._rewards[:n]), np.mean(self._rewards[-n:])
        spread_before, spread_now = np.mean(self._spreads[:n]), np.mean(self._spreads[-n:])
        if now <= before.mean() + before.std() or spread_now >= LOST_DIVERSITY * spread_before:
            return None
        return (
            f"warning: the reward rose from {before.mean():.3f} to {now:.3f} while the pictures of a group"
            f" came closer together, from {spread_before:.3f} to {spread_now:.3f}: the policy may have found"
            " a trick. Look at the pictures; raise the weight of diversity or of kl, or stop earlier."
        )


def best_and_worst(
    images: np.ndarray, rewards: np.ndarray, prompts: Sequence[str], group: int, rows: int = 6
) -> Image.Image:
    """A sheet: for some groups the best and the worst picture, with rewards and prompt.

    Args:
      images: uint8 ``[B, H, W, 3]``, groups one after the other.
      rewards: ``[B]``.
      prompts: of each picture.
      group: pictures of a group.
      rows: groups that are shown, those with the widest range of rewards.
    """
    grouped = rewards.reshape(-1, group)
    chosen = np.argsort(-np.ptp(grouped, axis=1), kind="stable")[:rows]
    height, width = images.shape[1:3]
    strip = 24
    sheet = Image.new("RGB", (2 * width, len(chosen) * (height + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, g in enumerate(chosen):
        top = row * (height + strip)
        best, worst = g * group + grouped[g].argmax(), g * group + grouped[g].argmin()
        draw.text((2, top), f"{prompts[best][: width // 3]}", fill="black")
        draw.text((2, top + 11), f"{rewards[best]:.3f}", fill="black")
        draw.text((width + 2, top + 11), f"{rewards[worst]:.3f}", fill="black")
        for column, i in enumerate((best, worst)):
            sheet.paste(Image.fromarray(images[i]), (column * width, top + strip))
    return sheet
