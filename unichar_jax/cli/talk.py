"""``unichar chat``, ``draw`` and ``ask``: a finished run, or any model directory, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from unichar_jax.app import engines
from unichar_jax.app.engines import flow_settings
from unichar_jax.cli.train import use_compilation_cache
from unichar_jax.errors import UserError

if TYPE_CHECKING:
    from unichar_jax.sampling.engine import Engine

Model = Annotated[Path, tyro.conf.Positional]


def load_engine(path: Path, dtype: str = "float32") -> Engine:
    """As ``app.engines.load_engine``, with compiled programs kept between starts."""
    use_compilation_cache()
    return engines.load_engine(path, dtype)


def character_folder(run: Path, character: Path | None) -> Path | None:
    """The character a run was trained on, unless the caller names a folder; None if neither is known."""
    if character is not None:
        return character
    root, names = engines.training_data(run)
    if root is None:
        return None
    from unichar_jax.data.rolescape import find_characters

    wanted = [f for f in find_characters(root, "train") if not names or f.name in names]
    return wanted[0] if wanted else None


def chat(
    run: Model,
    /,
    character: Path | None = None,
    description: str | None = None,
    opening: str | None = None,
    pictures: bool = True,
    thinking: bool = False,
    temperature: float = 0.7,
    steps: int = 30,
    guidance: float = 4.0,
    seed: int = 0,
    out: Path | None = None,
) -> int:
    """Talks with the character; each reply is followed by its picture. An empty line or Ctrl-D ends.

    Args:
      run: a finished run, or a model directory.
      character: its folder; by default the one of the run.
      description: persona, in place of the folder's.
      opening: first words, in place of the folder's.
      pictures: draw every reply.
      thinking: let the character plan each picture in words first.
      temperature: of the replies; 0 is greedy.
      steps: of drawing.
      guidance: strength of the text when drawing.
      seed: of the conversation.
      out: folder of the transcript and its pictures; by default transcript/ in the run.
    """
    from unichar_jax.sampling.session import Persona, RolePlay
    from unichar_jax.sampling.text import TextSettings

    console = Console()
    folder = character_folder(run, character)
    if folder is None and description is None:
        raise UserError(
            f"{run}: no character is known; name one with --character FOLDER, or say who it is with --description."
        )
    persona = (
        Persona("the character", description or "", opening or "")
        if folder is None
        else Persona.from_folder(folder, description=description, opening=opening)
    )
    out = out or run / "transcript"
    with console.status("loading the model ..."):
        engine = load_engine(run)
    with engine:
        play = RolePlay(engine, persona)
        console.print(f"[bold]{persona.name}[/bold]  [dim](an empty line ends)[/dim]")
        if persona.opening:
            console.print(f"[green]{persona.name}:[/green] {persona.opening}")
        while True:
            try:
                said = console.input("[cyan]you:[/cyan] ").strip()
            except (EOFError, KeyboardInterrupt):
                said = ""
            if not said:
                break
            console.print(f"[green]{persona.name}:[/green] ", end="")
            settings = TextSettings(max_tokens=300, temperature=temperature, seed=seed)
            play.reply(said, settings, on_text=lambda piece: console.print(piece, end="", markup=False))
            console.print()
            if pictures:
                with console.status("drawing ..."):
                    play.picture(flow_settings(steps, guidance, run), thinking=thinking)
                play.save(out)
                console.print(f"[dim]picture: {out / f'turn-{len(play.turns):03d}.png'}[/dim]")
        if play.turns:
            console.print(f"transcript: {play.save(out)}")
    return 0


def draw(
    run: Model,
    prompt: Annotated[str, tyro.conf.Positional],
    /,
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4,
    steps: int = 30,
    guidance: float = 4.0,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> int:
    """Draws a prompt several times and writes a contact sheet.

    Args:
      run: a finished run, or a model directory.
      prompt: what to draw.
      n: pictures, of seeds SEED, SEED + 1, ...
      steps: of drawing.
      guidance: strength of the text.
      size: height and width in pixels; by default that of training.
      seed: of the first picture.
      out: the PNG to write; by default drawing.png in the run.
    """
    import math

    import numpy as np
    from PIL import Image

    with load_engine(run) as engine:
        drawn = engine.generate_images(
            [prompt], n, flow_settings(steps, guidance, run), size=size, seed=seed
        )[0]
    columns = min(n, max(1, math.ceil(math.sqrt(n))) if n > 4 else n)
    width, height = drawn[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(n / columns) * height), "white")
    for i, picture in enumerate(drawn):
        sheet.paste(Image.fromarray(np.asarray(picture)), (i % columns * width, i // columns * height))
    out = out or run / "drawing.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    print(f"{n} pictures of seeds {seed} to {seed + n - 1}: {out}")
    return 0


def ask(
    run: Model,
    question: Annotated[str, tyro.conf.Positional],
    /,
    image: Path | None = None,
    max_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
) -> int:
    """Asks a question about a picture, or about what the character knows.

    Args:
      run: a finished run, or a model directory.
      question: in the words of the training data.
      image: a picture to look at.
      max_tokens: of the answer.
      temperature: 0 is greedy.
      seed: of the answer.
    """
    from unichar_jax.sampling.text import TextSettings

    with load_engine(run) as engine:
        print(engine.answer(image, question, TextSettings(max_tokens, temperature, seed=seed)))
    return 0
