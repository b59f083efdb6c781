"""From runs to the characters that can be met: persona, engine, and what is shown of them.

Everything a page shows of a character is read here, once, when the server starts; later no file is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unichar_jax.app import engines
from unichar_jax.app.web.pictures import Shown, shown
from unichar_jax.data.images import open_image
from unichar_jax.data.portraits import SIDE, Portrait
from unichar_jax.data.rolescape import read_character
from unichar_jax.errors import UserError
from unichar_jax.sampling.engine import Engine
from unichar_jax.sampling.flow import FlowSettings
from unichar_jax.sampling.roster import BASE
from unichar_jax.sampling.session import Persona

Load = Callable[..., Engine]
"""Makes an engine from a run, and ``loras`` by name if there are any."""


@dataclass(frozen=True)
class Guest:
    """A character that can be met.

    Attributes:
      id: in addresses; unique on a server.
      persona: who is played.
      run: name of the run, or of the adapters, that it comes from.
      engine: answers and draws.
      drawing: settings from steps and guidance.
      model: the engine's name of its model.
      pictures: the training pictures, with captions.
      greetings: things to say, from the training scenes.
      ideas: things to draw, from the training captions.
    """

    id: str
    persona: Persona
    run: str
    engine: Engine
    drawing: Callable[[int, float], FlowSettings]
    model: str = BASE
    pictures: tuple[tuple[Shown, str], ...] = ()
    greetings: tuple[str, ...] = ()
    ideas: tuple[str, ...] = ()


def invite(
    runs: Sequence[Path],
    characters: Sequence[Path] = (),
    loras: Mapping[str, Path] | None = None,
    load: Load = engines.load_engine,
) -> list[Guest]:
    """The characters of the runs.

    Args:
      runs: runs or model directories; each is loaded once.
      characters: folders that are met with every run, in place of those it was trained on.
      loras: folders of adapters by name: each is a character around the one run, in place of its own.
      load: makes an engine.

    Raises:
      UserError: a run cannot be loaded, or it is not known whom it plays.
    """
    runs = list(dict.fromkeys(runs))
    if loras:
        if len(runs) > 1 or characters:
            raise UserError(
                "--lora: adapters go around one run, and know their characters; name that run only."
            )
        return _with_adapters(runs[0], loras, load)
    named = [Portrait.of(read_character(folder)) for folder in characters]
    known = {run: named or trained_on(run) for run in runs}  # before gigabytes are loaded
    guests: list[Guest] = []
    for run in runs:
        engine = load(run)
        for who in known[run]:
            persona = Persona(who.name, who.description, who.opening)
            guests.append(_guest(persona, who, run.resolve().name, run, engine, guests))
    return guests


def _with_adapters(run: Path, loras: Mapping[str, Path], load: Load) -> list[Guest]:
    """One engine, and a character for each folder of adapters."""
    personas = {name: engines.lora_persona(folder) for name, folder in loras.items()}
    if unknown := [str(loras[name]) for name, persona in personas.items() if persona is None]:
        raise UserError(f"{', '.join(unknown)}: the adapters do not say which character they play.")
    engine = load(run, loras=loras)
    guests: list[Guest] = []
    for name, folder in loras.items():
        who = next(
            iter(engines.portraits(folder.absolute().parent)), None
        )  # the run that they were trained in
        guests.append(_guest(personas[name], who, name, run, engine, guests, name))
    return guests


def trained_on(run: Path) -> list[Portrait]:
    """The characters that a run was trained on.

    Raises:
      UserError: the run does not say.
    """
    found = engines.portraits(run)
    if not found:
        raise UserError(
            f"{run}: it does not say which character it plays (a model directory, or not there?);"
            " name the character with --character FOLDER."
        )
    return found


def _guest(
    persona: Persona,
    who: Portrait | None,
    label: str,
    run: Path,
    engine: Engine,
    others: Sequence[Guest],
    model: str = BASE,
) -> Guest:
    """A guest, with what is shown of the character if it is known."""
    slug = re.sub(r"[^a-z0-9]+", "-", persona.name.lower()).strip("-") or "character"
    taken = [guest.id for guest in others]
    name = next(n for n in (slug, *(f"{slug}-{i}" for i in range(2, 10_000))) if n not in taken)
    made = Guest(
        id=name,
        persona=persona,
        run=label,
        engine=engine,
        drawing=lambda steps, guidance: engines.flow_settings(steps, guidance, run),
        model=model,
    )
    if who is None:
        return made
    return replace(
        made,
        pictures=tuple((shown(open_image(p), SIDE), caption) for p, caption in who.pictures),
        greetings=who.greetings,
        ideas=who.ideas,
    )
