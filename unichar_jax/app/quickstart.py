"""The quickstart: one character, customised on this machine, from what ships with the package.

Steps, each a call into the library that a user could make: find or draw the character, run Unified-SFT from
the mini base (or from random weights of a preset), load the result, let it answer and draw. Nothing here is
known to the library below.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from unichar_jax.config import presets
from unichar_jax.config.data import DataConfig
from unichar_jax.config.train import SFTConfig
from unichar_jax.errors import UserError


@dataclass(frozen=True)
class Quickstart:
    """Settings of the quickstart.

    Attributes:
      data: a character folder in the RoleScape-20 layout (``.../train/NAME``); by default a character of the
        mini world is drawn.
      character: which character of the mini world.
      base: model to start from; a preset's name that does not ship weights starts from random ones.
      out: folder of everything that is made.
      steps: of Unified-SFT; by default the preset's.
      seed: of the character's pictures and of sampling.
    """

    data: Path | None = None
    character: str = "Pip"
    base: str = "mini"
    out: Path = Path("runs/quickstart")
    steps: int | None = None
    seed: int = 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def character_folder(cfg: Quickstart) -> Path:
    """The training folder of the character: the user's, or one drawn now.

    Raises:
      UserError: the folder is not ``.../train/NAME``, or no character of that name is known.
    """
    if cfg.data is not None:
        folder = cfg.data.expanduser()
        if not folder.is_dir() or folder.resolve().parent.name != "train":
            raise UserError(
                f"--data {cfg.data}: expected an existing character folder .../train/NAME in the RoleScape-20 layout;"
                " 'unichar data new NAME --images DIR' makes one from pictures."
            )
        return folder
    from unichar_jax.data.miniworld.cast import member
    from unichar_jax.data.miniworld.write import write_character

    data = cfg.out / "data"
    folder = data / "personalized_data" / "train" / cfg.character
    if not folder.is_dir():
        write_character(member(cfg.character), data, seed=cfg.seed)
    return folder


def sft_config(cfg: Quickstart, folder: Path) -> SFTConfig:
    """The laptop preset of Unified-SFT on this character."""
    base = presets.load(SFTConfig, "sft-debug" if cfg.base == "debug" else "sft-mini")
    data: DataConfig = dataclasses.replace(
        base.data, path=str(folder.parent.parent), characters=(folder.name,), seed=cfg.seed
    )
    return dataclasses.replace(
        base,
        base=cfg.base,
        run_dir=str(cfg.out / "sft"),
        data=data,
        steps=cfg.steps or base.steps,
    )


def run(cfg: Quickstart) -> Path:
    """Does it all; returns the run's directory."""
    from unichar_jax.cli.talk import flow_settings, load_engine
    from unichar_jax.sampling.session import Persona, RolePlay
    from unichar_jax.sampling.text import TextSettings
    from unichar_jax.training.sft import train

    started = time.perf_counter()
    folder = character_folder(cfg)
    say(f"[1/3] the character: {folder}")
    sft = sft_config(cfg, folder)
    say(f"[2/3] Unified-SFT, {sft.steps} steps")
    made = train(sft)
    say("[3/3] the character answers and draws")
    with load_engine(made) as engine:
        play = RolePlay(engine, Persona.from_folder(folder))
        play.reply("Hello! Who are you?", TextSettings(max_tokens=80, temperature=0.7, seed=cfg.seed))
        turn = play.picture(flow_settings(30, 4.0, made))
        transcript = play.save(cfg.out / "transcript")
    print(f"\nyou:   {turn.user}\n{play.persona.name}:  {turn.reply}")
    print(f"\nreply and picture: {transcript}")
    print(f"the run:           {made}   ({(time.perf_counter() - started) / 60:.1f} minutes)")
    print(
        f'\nnext:  unichar chat {made}\n       unichar draw {made} "{cfg.character} is waving in the snow." -n 8'
    )
    return made
