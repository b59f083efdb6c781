"""Role play: the prompts are those of training, the turns add up, and nothing said is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unichar_jax.data import templates
from unichar_jax.errors import UserError
from unichar_jax.sampling.engine import Engine, EngineConfig
from unichar_jax.sampling.flow import FlowSettings
from unichar_jax.sampling.session import TRANSCRIPT, Persona, RolePlay
from unichar_jax.sampling.text import TextSettings

BO = Persona("Bo", "Bo is a red square .", "Hello !")
SHORT = TextSettings(max_tokens=4, temperature=0.7)
QUICK, SIZE = FlowSettings(num_timesteps=4), (32, 48)


class Spy:
    """An engine that notes what it is asked."""

    def __init__(self, engine: Engine):
        self._engine, self.asked = engine, []

    def __getattr__(self, name: str):
        value = getattr(self._engine, name)
        if not name.startswith("submit"):
            return value

        def submit(prompt, *args, **kwargs):
            self.asked.append((name, prompt, args))
            return value(prompt, *args, **kwargs)

        return submit


@pytest.fixture(scope="module")
def engine(model, autoencoder, tokenizer) -> Iterator[Engine]:
    with Engine(model, autoencoder, tokenizer) as engine:
        yield engine


def test_a_turn_is_asked_as_in_training(engine: Engine) -> None:
    spy = Spy(engine)
    session = RolePlay(spy, BO)
    pieces: list[str] = []
    first = session.reply("Who are you ?", SHORT, on_text=pieces.append)
    assert "".join(pieces) == first.reply
    second = session.reply("And now ?", SHORT)
    assert (first.seed, second.seed) == (0, 1)
    drawn = session.picture(QUICK, size=SIZE)
    asked = [prompt for _, prompt, _ in spy.asked]
    history = [("user", "Who are you ?"), ("Bo", first.reply)]
    assert asked == [
        templates.dialogue("Bo", BO.description, BO.opening, "Who are you ?"),
        templates.dialogue("Bo", BO.description, BO.opening, "And now ?", history),
        templates.t2i(BO.description, "And now ?", second.reply),
    ]
    assert session.turns == [first, drawn]
    assert drawn.image is not None
    assert drawn.image.size == (48, 32)
    again = RolePlay(engine, BO)
    assert again.reply("Who are you ?", SHORT, seed=0).reply == first.reply


@pytest.mark.parametrize("as_shipped", [False, True])
def test_a_plan_is_asked_as_in_training_or_as_shipped(engine: Engine, as_shipped: bool) -> None:
    spy = Spy(engine)
    spy.config = EngineConfig(as_shipped=as_shipped)
    session = RolePlay(spy, BO)
    reply = session.reply("Who are you ?", SHORT).reply
    drawn = session.picture(QUICK, thinking=True, planning=TextSettings(max_tokens=3), size=SIZE)
    told = (BO.description, "Who are you ?", reply)
    ask = templates.thinking_prompt_as_shipped if as_shipped else templates.thinking_prompt
    assert [prompt for _, prompt, _ in spy.asked[1:]] == [
        ask(*told),
        templates.t2i_with_thinking(*told, "", ""),
    ]
    assert drawn.plan == ("", "")


def test_the_reference_image_is_seen_and_the_prompt_is_whole(engine: Engine) -> None:
    image, greedy = Image.linear_gradient("L"), TextSettings(max_tokens=12)
    spy = Spy(engine)
    seen = RolePlay(spy, BO, reference_image=image).reply("Hi", greedy).reply
    [(_, prompt, (picture, _))] = spy.asked
    assert prompt == templates.dialogue("Bo", BO.description, BO.opening, "Hi")
    assert picture is image
    assert seen == engine.answer(image, prompt, greedy)
    assert seen != RolePlay(engine, BO).reply("Hi", greedy).reply


def test_what_a_long_conversation_tells_stays_bounded(engine: Engine) -> None:
    session = RolePlay(engine, BO, remember=4)
    told = []
    for i in range(9):
        told.append(session.prompt(f"say {i}").count("\nuser: ") + session.prompt("").count("\nuser: "))
        session.reply(f"say {i}", TextSettings(max_tokens=1))
    assert [n // 2 for n in told] == [0, 1, 2, 3, 4, 3, 4, 3, 4]
    assert len(session.turns) == 9
    session.undo()
    assert len(session.turns) == 8


def test_the_folder_says_who_is_played_unless_the_caller_does(tiny_root: Path) -> None:
    folder = tiny_root / "train" / "Friends-Tess"
    read = Persona.from_folder(folder)
    assert (read.name, read.opening) == ("Tess", "Hello, I roll.")
    told = Persona.from_folder(folder, description="Tess is a cube.", opening="")
    assert (told.name, told.description, told.opening) == ("Tess", "Tess is a cube.", "")


def test_a_transcript_is_a_conversation_that_goes_on(engine: Engine, tmp_path: Path) -> None:
    session = RolePlay(engine, BO, reference_image=Image.new("RGB", (20, 20), "blue"))
    session.reply("Grüß dich", SHORT)
    session.picture(QUICK, size=SIZE, thinking=True, planning=TextSettings(max_tokens=2))
    session.reply("More", SHORT)
    folder = session.save(tmp_path / "talk")
    assert sorted(p.name for p in folder.iterdir()) == ["reference.png", TRANSCRIPT, "turn-001.png"]
    assert "Grüß dich" in (folder / TRANSCRIPT).read_text(encoding="utf-8")

    restored = RolePlay.restore(engine, folder)
    assert restored.persona == BO
    assert np.array_equal(np.asarray(restored.turns[0].image), np.asarray(session.turns[0].image))
    strip = lambda turns: [replace(t, image=None) for t in turns]  # noqa: E731
    assert strip(restored.turns) == strip(session.turns)
    assert restored.reply("On", SHORT).reply == session.reply("On", SHORT).reply

    restored.save(folder)
    assert len(json.loads((folder / TRANSCRIPT).read_text(encoding="utf-8"))["turns"]) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["talk"]


def test_mistakes_lose_nothing(engine: Engine, tmp_path: Path) -> None:
    session = RolePlay(engine, BO)
    with pytest.raises(UserError, match="nothing to draw yet"):
        session.picture()
    session.reply("Hi", SHORT)
    with pytest.raises(UserError, match="not valid Unicode"):
        session.reply("\udc00")
    with pytest.raises(UserError, match="multiples of 16"):
        session.picture(size=(3, 3))
    assert len(session.turns) == 1
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        session.save(tmp_path)
    assert (tmp_path / "diary.txt").read_text() == "mine"
    with pytest.raises(UserError, match="no transcript"):
        RolePlay.restore(engine, tmp_path)
    (tmp_path / TRANSCRIPT).write_text("[]")
    with pytest.raises(UserError, match="not a transcript"):
        RolePlay.restore(engine, tmp_path)
    with pytest.raises(UserError, match="remember"):
        RolePlay(engine, BO, remember=1)
