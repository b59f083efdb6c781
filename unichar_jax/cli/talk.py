"""``unichar chat``, ``draw`` and ``ask``: a finished run, or any model directory, on the command line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from unichar_jax.app import engines
from unichar_jax.app.engines import Weights, flow_settings
from unichar_jax.cli.inline import inline
from unichar_jax.cli.train import use_compilation_cache
from unichar_jax.errors import UserError

if TYPE_CHECKING:
    from unichar_jax.sampling.engine import Engine
    from unichar_jax.sampling.flow import FlowSettings
    from unichar_jax.sampling.session import Persona, RolePlay
    from unichar_jax.sampling.text import TextSettings

Model = Annotated[Path, tyro.conf.Positional]


def load_engine(
    path: Path,
    dtype: str | None = None,
    loras: Mapping[str, Path] | None = None,
    *,
    as_shipped: bool = False,
    weights: Weights = None,
) -> Engine:
    """As ``app.engines.load_engine``, with compiled programs kept between starts."""
    use_compilation_cache()
    return engines.load_engine(path, dtype, loras, as_shipped=as_shipped, weights=weights)


def chat(
    run: Model,
    /,
    lora: tuple[Path, ...] = (),
    character: Path | None = None,
    description: str | None = None,
    opening: str | None = None,
    image: Path | None = None,
    pictures: bool = True,
    thinking: bool = False,
    max_tokens: int = 300,
    temperature: float = 0.7,
    steps: int = 30,
    guidance: float = 4.0,
    seed: int = 0,
    as_shipped: bool = False,
    weights: Weights = None,
    out: Path | None = None,
) -> int:
    """Talks with the character; each reply is followed by its picture. An empty line or Ctrl-D ends.

    Ctrl-C stops a reply or a picture, not the conversation. "/undo" takes the last exchange back. With several
    --lora folders, "/play NAME" goes on with another character; the base is loaded once.

    Args:
      run: a finished run, or a model directory.
      lora: folders of adapters to put around that model, one for each character (or NAME=FOLDER).
      character: its folder; by default the one of the run, or of the adapters.
      description: persona, in place of the folder's.
      opening: first words, in place of the folder's.
      image: a picture that the character sees before each reply.
      pictures: draw every reply.
      thinking: let the character plan each picture in words first.
      max_tokens: of a reply.
      temperature: of the replies; 0 is greedy.
      steps: of drawing.
      guidance: strength of the text when drawing.
      seed: of the conversation.
      as_shipped: follow the published inference code where it departs from its own training: the prompt that
        asks for a plan, and the size of pictures that are looked at.
      weights: int8 holds the decoder's weights in eight bits: half of the memory of bfloat16.
      out: folder of the transcript and its pictures; by default transcript/ in the run, or beside the
        adapters.
    """
    from unichar_jax.sampling.roster import BASE
    from unichar_jax.sampling.session import RolePlay
    from unichar_jax.sampling.text import TextSettings

    console = Console(highlight=False)
    _look_at(image)
    loras = engines.lora_names(lora)
    if len(loras) > 1 and (character or description or opening or out):
        raise UserError(
            "--character, --description, --opening and --out are for one character; leave them out."
        )
    personas, folders = _who_and_where(run, loras, character, description, opening, out)
    drawing = flow_settings(steps, guidance, run) if pictures else None
    with console.status("loading the model ..."):
        engine = load_engine(run, loras=loras, as_shipped=as_shipped, weights=weights)
    with engine:
        plays = {
            name: RolePlay(engine, who, reference_image=image, model=name if loras else BASE)
            for name, who in personas.items()
        }
        name = next(iter(plays))
        _introduce(console, plays, name)
        while said := _read_line(console):
            play = plays[name]
            if said.startswith("/play"):
                wanted = said.removeprefix("/play").strip()
                if wanted in plays:
                    name = wanted
                    _introduce(console, plays, name)
                else:
                    console.print(f"'{wanted}' is not here; /play one of {', '.join(plays)}", markup=False)
            elif said == "/undo":
                console.print("[dim]taken back[/dim]" if play.undo() else "[dim]nothing was said yet[/dim]")
            else:
                settings = TextSettings(max_tokens=max_tokens, temperature=temperature, seed=seed)
                _exchange(console, play, said, settings, drawing, thinking, folders[name])
        for name, play in plays.items():
            if play.turns:
                console.print(f"transcript: {play.save(folders[name])}", soft_wrap=True)
    return 0


def _read_line(console: Console) -> str:
    """What the user says next; nothing ends the conversation."""
    try:
        return console.input("[cyan]you:[/cyan] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""


def _exchange(
    console: Console,
    play: RolePlay,
    said: str,
    settings: TextSettings,
    drawing: FlowSettings | None,
    thinking: bool,
    folder: Path,
) -> None:
    """One reply as it comes, and its picture. What goes wrong is said, and the conversation goes on."""
    try:
        console.print(f"[green]{play.persona.name}:[/green] ", end="")
        play.reply(said, settings, on_text=lambda piece: console.out(piece, end="", highlight=False))
        console.print()
        if drawing is None:
            return
        with console.status("drawing ..."):
            picture = play.picture(drawing, thinking=thinking).image
            play.save(folder)
        if console.is_terminal and console.color_system and picture is not None:
            console.print(inline(picture), soft_wrap=True)
        place = folder / f"turn-{len(play.turns):03d}.png"
        console.print(f"[dim]picture: {place}[/dim]", soft_wrap=True)
    except KeyboardInterrupt:
        console.print("\n[dim](stopped)[/dim]")
    except UserError as error:
        console.print(f"\n{error}", style="red", markup=False)


def _who_and_where(
    run: Path,
    loras: Mapping[str, Path],
    character: Path | None,
    description: str | None,
    opening: str | None,
    out: Path | None,
) -> tuple[dict[str, Persona], dict[str, Path]]:
    """Persona and transcript folder of every character, by name; without adapters of the run's alone."""
    if loras:
        found = {n: engines.lora_persona(f, character, description, opening) for n, f in loras.items()}
        folders = {
            n: out or f.absolute().with_name(f"{f.absolute().name}-transcript") for n, f in loras.items()
        }
    else:
        found = {run.name: engines.run_persona(run, character, description, opening)}
        folders = {run.name: out or run / "transcript"}
    for name, persona in found.items():
        if persona is None:
            raise UserError(
                f"{loras.get(name, run)}: no character is known; name one with --character FOLDER, or say who it"
                " is with --description."
            )
    return {n: p for n, p in found.items() if p is not None}, folders


def _introduce(console: Console, plays: Mapping[str, RolePlay], name: str) -> None:
    who = plays[name].persona
    others = [n for n in plays if n != name]
    change = f"; /play {' or '.join(others)} for another character" if others else ""
    console.print(f"[bold]{who.name}[/bold]  [dim](an empty line ends{change})[/dim]")
    if who.opening and not plays[name].turns:
        console.print(f"[green]{who.name}:[/green] {who.opening}")


def draw(
    run: Model,
    prompt: Annotated[str, tyro.conf.Positional],
    /,
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4,
    steps: int = 30,
    guidance: float = 4.0,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    lora: Path | None = None,
    weights: Weights = None,
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
      lora: a folder of adapters to put around the model.
      weights: int8 holds the decoder's weights in eight bits: half of the memory of bfloat16.
      out: the PNG to write; by default drawing.png in the run.
    """
    import math

    import numpy as np
    from PIL import Image

    settings = flow_settings(steps, guidance, run)
    with _one(run, lora, weights=weights) as (engine, name):
        drawn = engine.generate_images([prompt], n, settings, size=size, seed=seed, model=name)[0]
    columns = min(n, max(1, math.ceil(math.sqrt(n))) if n > 4 else n)
    width, height = drawn[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(n / columns) * height), "white")
    for i, picture in enumerate(drawn):
        sheet.paste(Image.fromarray(np.asarray(picture)), (i % columns * width, i // columns * height))
    out = out or run / "drawing.png"
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: expected a picture's name, such as {out / 'drawing.png'}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    print(f"{n} pictures of seeds {seed} to {seed + n - 1}: {out}")
    return 0


def ask(
    run: Model,
    asked: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[IMAGE] QUESTION")],
    /,
    image: Path | None = None,
    max_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
    as_shipped: bool = False,
    lora: Path | None = None,
    weights: Weights = None,
) -> int:
    """Asks a question about a picture, or about what the character knows.

    Args:
      run: a finished run, or a model directory.
      asked: a question in the words of the training data, and before it, if you like, a picture to look at.
      image: the picture, another way to give it.
      max_tokens: of the answer.
      temperature: 0 is greedy.
      seed: of the answer.
      as_shipped: look at the picture in the size of the published inference code, which is not that of its
        training.
      lora: a folder of adapters to put around the model.
      weights: int8 holds the decoder's weights in eight bits: half of the memory of bfloat16.
    """
    from unichar_jax.sampling.text import TextSettings

    *before, question = asked or ("",)
    if not question or len(before) > (image is None):
        raise UserError('expected "unichar ask RUN [IMAGE] QUESTION"; put the question in quotes.')
    image = Path(before[0]) if before else image
    _look_at(image)
    with _one(run, lora, as_shipped, weights) as (engine, name):
        print(engine.answer(image, question, TextSettings(max_tokens, temperature, seed=seed), model=name))
    return 0


def _look_at(image: Path | None) -> None:
    """Refuses a picture that cannot be read before gigabytes are loaded, and tells what is odd about it."""
    from unichar_jax.data.images import image_header

    for _, got, becomes in image_header(image).notes if image else ():
        print(f"note: {image}: {got}; {becomes}", file=sys.stderr)


@contextlib.contextmanager
def _one(
    run: Path, lora: Path | None, as_shipped: bool = False, weights: Weights = None
) -> Iterator[tuple[Engine, str]]:
    """An engine, and the name of who answers: the model itself, or the one character around it."""
    loras = engines.lora_names([] if lora is None else [lora])
    with load_engine(run, loras=loras, as_shipped=as_shipped, weights=weights) as engine:
        yield engine, next(iter(loras), "base")
