"""Writes the named cast as it ships: ten characters in the layout of RoleScape-20.

    python -m workshop.miniworld

Every file is a function of the code alone: the same command writes the same texts and pixels again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from workshop.miniworld.cast import CAST
from workshop.miniworld.write import write_character


@dataclasses.dataclass(frozen=True)
class Cast:
    """Where to write, and how many pictures of each character."""

    out: Path = Path("checkpoints/mini/cast")
    """Gets personalized_data/ and personalized_t2i/; folders of the cast that are there are replaced."""
    train_images: int = 10
    test_images: int = 6


def write_cast(cfg: Cast) -> Path:
    """Writes everybody; returns the folder."""
    for member in CAST.values():
        write_character(
            member, cfg.out, train_images=cfg.train_images, test_images=cfg.test_images, overwrite=True
        )
    return cfg.out


def main() -> None:
    print(write_cast(tyro.cli(Cast)))


if __name__ == "__main__":
    main()
