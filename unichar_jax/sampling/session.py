"""Role play: a conversation with a character that answers in words and in pictures.

``RolePlay`` keeps the conversation, builds each prompt from it as training did (``data.templates``), and
asks an engine. Turns begin alike, so the engine reads only what is new in each. A turn is a reply; a picture
of it can follow, with or without a plan in words. What the caller says of a character wins over what its
folder says.

Where the reference's inference departs from its own training this follows training; an engine with
``as_shipped`` follows the reference.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from unichar_jax.data import rolescape, templates, words
from unichar_jax.data.templates import Thinking
from unichar_jax.errors import UserError
from unichar_jax.sampling.batching import Job
from unichar_jax.sampling.engine import Engine
from unichar_jax.sampling.flow import FlowSettings
from unichar_jax.sampling.parts import ImageLike, Size, open_picture
from unichar_jax.sampling.roster import BASE
from unichar_jax.sampling.text import TextSettings

SPEAKING = TextSettings(max_tokens=500, temperature=0.7)
"""How a character speaks."""

PLANNING = TextSettings(max_tokens=1000)
"""How a character plans a picture."""

TRANSCRIPT = "transcript.json"


@dataclass(frozen=True)
class Persona:
    """Who is played: short name, description, and the words the character opens with."""

    name: str
    description: str
    opening: str = ""

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, description: str | None = None, opening: str | None = None
    ) -> Persona:
        """The persona of a character folder; ``description`` and ``opening`` replace what is there."""
        character = rolescape.read_character(Path(folder))
        return cls(
            character.name,
            character.description if description is None else description,
            character.opening if opening is None else opening,
        )


@dataclass(frozen=True)
class Turn:
    """One exchange.

    Attributes:
      user: what the user said.
      reply: what the character answered.
      seed: of the reply.
      image: the picture, if one was drawn, and its seed.
      plan: what the character planned before it was drawn.
    """

    user: str
    reply: str
    seed: int
    image: Image.Image | None = None
    image_seed: int | None = None
    plan: Thinking | None = None


class RolePlay:
    """A conversation with one character. Not thread-safe; any number of them can share an engine.

    Args:
      engine: answers and draws.
      persona: who is played.
      reference_image: a picture that the character sees before each reply.
      model: the engine's name of the character's model.
      remember: the latest turns that a prompt tells of. When there are more, the older half is left out at
        once, so that most turns still begin as the one before.
    """

    def __init__(
        self,
        engine: Engine,
        persona: Persona,
        *,
        reference_image: ImageLike | None = None,
        model: str = BASE,
        remember: int = 20,
    ):
        if remember < 2:
            raise UserError(f"remember: expected at least 2 turns, got {remember}.")
        self.engine, self.persona, self.model, self.remember = engine, persona, model, remember
        opened = None if reference_image is None else open_picture(reference_image)
        self.reference_image = reference_image if isinstance(reference_image, Image.Image) else opened
        self.turns: list[Turn] = []
        self._first_told = 0

    # -- talking --------------------------------------------------------------------------------------------

    def reply(
        self,
        user: str,
        settings: TextSettings = SPEAKING,
        *,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
        on_job: Callable[[Job], None] | None = None,
    ) -> Turn:
        """Says something to the character and takes its answer as the next turn.

        Args:
          user: what is said.
          settings: of decoding.
          seed: of the answer (default: that of ``settings`` plus the number of turns).
          on_text: called with pieces of the answer as they come.
          on_job: called with the job that is waited for: another thread may cancel it.
        """
        user = words.clean(user, self.persona.name)
        seed = settings.seed + len(self.turns) if seed is None else seed
        job = self.engine.submit_text(
            self.prompt(user),
            self.reference_image,
            replace(settings, seed=seed),
            model=self.model,
            wait=True,
        )
        turn = Turn(user, _said(_wait(job, on_text, on_job)), seed)
        self.turns.append(turn)
        return turn

    def prompt(self, user: str) -> str:
        """What the character is asked with when the user says something now."""
        while len(self.turns) - self._first_told > self.remember:
            self._first_told += self.remember // 2
        told = self.turns[self._first_told :]
        history = [line for t in told for line in (("user", t.user), (self.persona.name, t.reply))]
        who = self.persona
        return templates.dialogue(who.name, who.description, who.opening, user, history)

    # -- drawing --------------------------------------------------------------------------------------------

    def picture(
        self,
        settings: FlowSettings | None = None,
        *,
        thinking: bool = False,
        planning: TextSettings = PLANNING,
        size: Size | None = None,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
        on_job: Callable[[Job], None] | None = None,
    ) -> Turn:
        """Draws the latest turn; the picture becomes part of it.

        Args:
          settings: times and guidance.
          thinking: let the character plan the picture first.
          planning: how the plan is decoded.
          size: (height, width) in pixels.
          seed: of the picture (default: that of the turn).
          on_text: called with pieces of the plan as they come.
          on_job: called with each job that is waited for: another thread may cancel it.
        """
        if not self.turns:
            raise UserError("there is nothing to draw yet; say something to the character first.")
        turn = self.turns[-1]
        seed = turn.seed if seed is None else seed
        told = (self.persona.description, turn.user, turn.reply)
        plan, prompt = None, templates.t2i(*told)
        if thinking:
            as_shipped = self.engine.config.as_shipped
            ask = templates.thinking_prompt_as_shipped if as_shipped else templates.thinking_prompt
            job = self.engine.submit_text(
                ask(*told), None, replace(planning, seed=seed), model=self.model, wait=True
            )
            plan = templates.parse_thinking(_said(_wait(job, on_text, on_job)))
            prompt = templates.t2i_with_thinking(*told, *plan)
        job = self.engine.submit_images(
            prompt, 1, settings, size=size, seed=seed, model=self.model, wait=True
        )
        image = _wait(job, on_job=on_job)[0]
        self.turns[-1] = replace(turn, image=image, image_seed=seed, plan=plan)
        return self.turns[-1]

    def undo(self) -> Turn | None:
        """Takes the latest turn back."""
        self._first_told = min(self._first_told, max(0, len(self.turns) - 1))
        return self.turns.pop() if self.turns else None

    # -- transcripts ----------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Writes the conversation and its pictures to ``folder``, in place of an older transcript there.

        Nothing is half written: the new transcript appears whole or not at all.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / TRANSCRIPT).is_file() and any(folder.iterdir()):
            raise UserError(f"{folder}: holds other files; name a new folder for the transcript.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            self._write(fresh)
            fresh.chmod(0o755)
            old = fresh.with_name(fresh.name + "-old")
            if folder.exists():
                os.replace(folder, old)
            os.replace(fresh, folder)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        return folder

    def _write(self, folder: Path) -> None:
        who = self.persona
        record: dict[str, object] = {
            "name": who.name,
            "description": who.description,
            "opening": who.opening,
        }
        if self.reference_image is not None:
            open_picture(self.reference_image).save(folder / "reference.png")
            record["reference_image"] = "reference.png"
        turns: list[dict[str, object]] = []
        for number, turn in enumerate(self.turns, 1):
            entry: dict[str, object] = {"user": turn.user, "reply": turn.reply, "seed": turn.seed}
            if turn.plan is not None:
                entry["thinking"], entry["instruction"] = turn.plan
            if turn.image is not None:
                entry["image"] = f"turn-{number:03d}.png"
                entry["image_seed"] = turn.image_seed
                turn.image.save(folder / str(entry["image"]))
            turns.append(entry)
        text = json.dumps(record | {"turns": turns}, ensure_ascii=False, indent=2)
        (folder / TRANSCRIPT).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def restore(
        cls, engine: Engine, folder: str | Path, *, model: str = BASE, remember: int = 20
    ) -> RolePlay:
        """Takes a saved conversation up again."""
        path = Path(folder) / TRANSCRIPT
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            picture = lambda name: open_picture(path.parent / name) if name else None  # noqa: E731
            session = cls(
                engine,
                Persona(record["name"], record["description"], record["opening"]),
                reference_image=picture(record.get("reference_image")),
                model=model,
                remember=remember,
            )
            for entry in record["turns"]:
                planned = "thinking" in entry
                session.turns.append(
                    Turn(
                        entry["user"],
                        entry["reply"],
                        entry["seed"],
                        picture(entry.get("image")),
                        entry.get("image_seed"),
                        Thinking(entry["thinking"], entry["instruction"]) if planned else None,
                    )
                )
        except FileNotFoundError:
            raise UserError(f"{path}: no transcript here; expected a folder that was saved.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a transcript ({type(error).__name__}: {error}).") from None
        return session


def _said(text: str) -> str:
    """What a model wrote, as it can be told it again: it marks no picture's place."""
    return text.replace(templates.IMAGE_PLACEHOLDER, "")


def _wait(
    job: Job,
    on_text: Callable[[str], None] | None = None,
    on_job: Callable[[Job], None] | None = None,
):
    """The job's result, its pieces passed on; an interrupted caller cancels it."""
    try:
        if on_job is not None:
            on_job(job)
        if on_text is not None:
            for piece in job:
                on_text(piece)
        return job.result()
    except BaseException:
        job.cancel()
        raise
