"""``unichar data``: check a folder, start a new character, build the TFDS dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from unichar_jax.cli.main import parses_itself


def check(path: Annotated[Path, tyro.conf.Positional]) -> int:
    """Reports everything wrong with a character folder, or a root of them, at once; exit code 1 if anything
    is.

    Args:
      path: a character's folder, or a folder that holds train/ and test/.
    """
    from unichar_jax.data.check import main_check

    return main_check(path)


def new(
    name: Annotated[str, tyro.conf.Positional],
    images: Path,
    profile: Path | None = None,
    dialogues: Path | None = None,
    out: Path = Path("data"),
) -> int:
    """Starts a character from about ten pictures, a profile and some dialogue.

    Args:
      name: of the character.
      images: folder of pictures; a .txt of the same name is a picture's caption.
      profile: a text file; lines 'Key: value' become facts.
      dialogues: a text file 'User: ...' / 'NAME: ...', or JSON.
      out: where the dataset is written.
    """
    from unichar_jax.data.new_character import new_character, summary

    print(summary(new_character(name, images, profile, dialogues, out=out)))
    return 0


def build(
    source: Annotated[Path | None, tyro.conf.Positional] = None,
    out: Path = Path("data/tfds"),
    character: str = "all",
) -> int:
    """Builds the TFDS dataset 'rolescape20' (ArrayRecord; no TensorFlow needed).

    Args:
      source: folder in the RoleScape-20 layout; without one the dataset is fetched from the Hub.
      out: the dataset's directory.
      character: one character, or 'all'.
    """
    from unichar_jax.data.tfds_rolescape import Rolescape20

    builder = Rolescape20(source=source, config=character, data_dir=out)
    builder.download_and_prepare()
    for split, info in builder.info.splits.items():
        print(f"{split}: {info.num_examples} examples")
    print(f"written to {builder.data_path}; read it with tfds.data_source")
    return 0


@parses_itself
def main(args: list[str]) -> int:
    return tyro.extras.subcommand_cli_from_dict(
        {"check": check, "new": new, "build": build}, args=args, prog="unichar data"
    )
