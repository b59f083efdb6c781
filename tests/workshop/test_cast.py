"""The cast that ships is what the workshop's command writes, and the quickstart starts from it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from unichar_jax.app.quickstart import Quickstart, character_folder
from unichar_jax.data.check import check
from unichar_jax.errors import UserError
from workshop.miniworld.__main__ import Cast, write_cast
from workshop.miniworld.cast import CAST, member
from workshop.miniworld.write import write_character

SHIPPED = REPOSITORY / "checkpoints" / "mini" / "cast"


def differences(folder: Path, other: Path) -> list[str]:
    """Files that are in one only, or differ: pictures by their pixels and mode, all else by its bytes."""
    names, others = (
        {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} for root in (folder, other)
    )
    found = sorted(names ^ others)
    for name in sorted(names & others):
        if name.endswith(".png"):
            with Image.open(folder / name) as one, Image.open(other / name) as two:
                same = one.mode == two.mode and np.array_equal(np.asarray(one), np.asarray(two))
        else:
            same = (folder / name).read_bytes() == (other / name).read_bytes()
        if not same:
            found.append(name)
    return found


def test_what_ships_is_what_the_command_writes(tmp_path):
    assert differences(SHIPPED, write_cast(Cast(tmp_path))) == []
    assert {p.name for p in (SHIPPED / "personalized_data" / "train").iterdir()} == set(CAST)


def test_another_pixel_another_letter_and_an_absent_file_are_noticed(tmp_path):
    one, two = (write_character(member("Pip"), tmp_path / name) for name in ("one", "two"))
    assert differences(one, two) == []
    pixels = np.array(Image.open(two / "3.png"))
    pixels[5, 6, 1] ^= 1
    Image.fromarray(pixels).save(two / "3.png")
    profile = two / "Pip_full_profile.txt"
    profile.write_text(profile.read_text() + " ")
    (two / "Pip_attributes.json").unlink()
    assert differences(one, two) == ["Pip_attributes.json", "3.png", "Pip_full_profile.txt"]


def test_it_is_small_and_without_faults():
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*")) < 6_000_000
    report = check(SHIPPED)
    assert report.ok
    assert len(report.folders) >= 2 * len(CAST)


@pytest.mark.parametrize("name", ["Pip", "Luna"])
def test_the_quickstart_has_the_folder_that_the_drawing_code_writes(name, tmp_path):
    folder = character_folder(Quickstart(out=tmp_path / "run", character=name))
    drawn = write_character(member(name), tmp_path / "drawn")
    assert folder.relative_to(tmp_path / "run" / "data") == drawn.relative_to(tmp_path / "drawn")
    assert differences(tmp_path / "run" / "data", tmp_path / "drawn") == []


def test_the_quickstart_keeps_what_is_there_and_copies_what_an_interruption_left_over(tmp_path):
    cfg = Quickstart(out=tmp_path)
    folder = character_folder(cfg)
    (folder / "Pip_full_profile.txt").write_text("my own words")
    prompts = tmp_path / "data" / "personalized_t2i" / "Pip"
    prompts.rename(prompts.with_name(".Pip.partial"))
    (prompts.with_name(".Pip.partial") / "half").touch()
    assert character_folder(cfg) == folder
    assert (folder / "Pip_full_profile.txt").read_text() == "my own words"
    assert differences(SHIPPED / "personalized_t2i" / "Pip", prompts) == []


def test_a_character_that_does_not_ship_is_named(tmp_path):
    with pytest.raises(UserError, match=re.escape("did you mean 'Luna'")):
        character_folder(Quickstart(out=tmp_path, character="Lunna"))
    assert not list(tmp_path.iterdir())
