"""The quickstart: one character, customised on this machine, from what ships with the package.

Steps, each a call into the library that a user could make: find the character; Unified-SFT from the
mini base (or from random weights of a preset); a short Character-GRPO; evaluation on held-out questions and
prompts, the base beside the two stages; a conversation; one report with all of it. A stage that cannot be
had is left out, and the terminal and the report say why. Started again with the same settings it goes on from
what is there. Nothing here is known to the library below.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from unichar_jax.app import engines
from unichar_jax.app.command import called
from unichar_jax.app.evaluate import Evaluation, run_evaluation, versions
from unichar_jax.app.report import (
    Command,
    Comparison,
    Conversation,
    Measurements,
    Picture,
    Report,
    compare,
    conversation,
    curves,
    write_report,
)
from unichar_jax.config import presets
from unichar_jax.config.data import DataConfig
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.train import SFTConfig
from unichar_jax.data import rolescape
from unichar_jax.errors import UserError, did_you_mean
from unichar_jax.evaluation.results import Results
from unichar_jax.evaluation.suite import Progress
from unichar_jax.scoring.folder import EncoderFolder

TASKS = ("knowledge_mcq", "unseen_image_mcq", "vqa", "reply_likelihood", "dialogue", "t2i", "t2t2i")
"""What the report measures: every ability once."""

CAST = presets.resource_dir("checkpoints") / "mini" / "cast"
"""Root of the characters that ship, in the layout of RoleScape-20."""

LINES = ("Hello! Who are you?", "What do you like to do?", "Where are you now?")
"""What the report's conversation says to the character; the last one is drawn."""


@dataclass(frozen=True)
class Quickstart:
    """Customises one character on this machine, and writes a report to open in a browser.

    Attributes:
      data: a character folder in the RoleScape-20 layout (``.../train/NAME``); by default a character that
        ships with the mini model.
      character: which of those.
      base: model to start from; a preset's name that does not ship weights starts from random ones.
      out: folder of everything that is made; by default runs/quickstart, or runs/quickstart-NAME for another
        character than the default.
      steps: of Unified-SFT; by default the preset's.
      rounds: of Character-GRPO; by default the preset's; 0 leaves it out.
      seeds: pictures of every held-out prompt, and replies to every held-out line.
      seed: of training and of sampling.
    """

    data: Path | None = None
    character: str = "Pip"
    base: str = "mini"
    out: Path | None = None
    steps: int | None = None
    rounds: int | None = None
    seeds: int = 2
    seed: int = 0

    @property
    def folder(self) -> Path:
        """Of everything that is made: characters do not share one."""
        home = Path("runs/quickstart")
        name = self.character if self.data is None else self.data.resolve().name
        first = self.data is None and name == type(self).character
        return self.out or (home if first else home.with_name(f"{home.name}-{name}"))


@dataclass
class Story:
    """What happened so far: the models, what could not be had, and how long each step took."""

    models: list[tuple[str, str]] = field(default_factory=list)
    """What the evaluation is to load, and what tables call it."""
    left_out: list[str] = field(default_factory=list)
    minutes: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        say(f"\n== {title}")
        started = time.perf_counter()
        yield
        self.minutes.append((title, (time.perf_counter() - started) / 60))

    def leave_out(self, what: str) -> None:
        say(what)
        self.left_out.append(what)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(cfg: Quickstart, progress: Callable[[str], Progress] | None = None) -> Path:
    """Does it all.

    Args:
      cfg: settings.
      progress: given a model's label, returns what is told of the evaluation's progress.

    Returns:
      The report.

    Raises:
      UserError: the character's folder, the base or a setting is not as it should be.
    """
    from unichar_jax.training import grpo
    from unichar_jax.training import sft as unified_sft

    story = Story()
    with story.step("the character"):
        folder = character_folder(cfg)
        say(str(folder))
    base = presets.folder_or_shipped(cfg.base)
    if (base / "ema.safetensors").is_file():
        story.models += [(f"{base}", "base"), (f"{base}@profile", "base, told everything")]
    else:
        story.leave_out(f"'{cfg.base}' has no weights here: training starts from random ones.")
    with story.step("Unified-SFT: learning to talk and to draw as the character"):
        final = unified_sft.train(sft_config(cfg, folder))
        story.models.append((str(final), "Unified-SFT"))
    reason = why_no_grpo(cfg, folder, base)
    if reason:
        story.leave_out(f"Character-GRPO is left out: {reason}")
    else:
        with story.step("Character-GRPO: drawing, scoring, learning from what scored better"):
            final = grpo.train(grpo_config(cfg, folder, final))
            story.models.append((str(final), "+ Character-GRPO"))
    with story.step("evaluation on what training never saw"):
        results = evaluate(cfg, folder, story, progress)
    with story.step("a conversation"):
        talk = converse(cfg, folder, final)
    page = write_report(report(cfg, folder, final, story, results, talk), cfg.folder / "report.html")
    _print_results(cfg, folder, final, page, talk, story)
    return page


# -- the stages ---------------------------------------------------------------------------------------------


def character_folder(cfg: Quickstart) -> Path:
    """The training folder of the character: the user's, or a copy of one that ships.

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
    parts = character_parts(cfg.character)
    for part in parts:
        target = cfg.folder / "data" / part
        if not target.is_dir():
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(CAST / part, partial, copy_function=shutil.copyfile)
            partial.replace(target)
    return cfg.folder / "data" / parts[0]


def character_parts(name: str) -> tuple[Path, ...]:
    """The folders of a character that ships, below the root of the cast: training data first.

    Raises:
      UserError: no character of that name ships.
    """
    train = Path("personalized_data") / "train"
    names = sorted(p.name for p in (CAST / train).iterdir() if p.is_dir())
    if name not in names:
        raise UserError(
            f"--character {name}: no such character ships{did_you_mean(name, names)}; expected one of"
            f" {', '.join(names)}."
        )
    return train / name, Path("personalized_data") / "test" / name, Path("personalized_t2i") / name


def sft_config(cfg: Quickstart, folder: Path) -> SFTConfig:
    """The laptop preset of Unified-SFT on this character."""
    base = presets.load(SFTConfig, "sft-debug" if cfg.base == "debug" else "sft-mini")
    data: DataConfig = dataclasses.replace(
        base.data, path=str(folder.parent.parent), characters=(folder.name,), seed=cfg.seed
    )
    return dataclasses.replace(
        base,
        base=cfg.base,
        run_dir=str(cfg.folder / "sft"),
        data=data,
        steps=cfg.steps or base.steps,
        seed=cfg.seed,
    )


def prompts_folder(folder: Path) -> Path:
    """Where RoleScape-20 keeps the drawing prompts of a character."""
    return folder.parent.parent.parent / "personalized_t2i" / folder.name


def why_no_grpo(cfg: Quickstart, folder: Path, base: Path) -> str:
    """Why stage 2 cannot run here; empty if it can."""
    if cfg.rounds == 0:
        return "--rounds 0."
    if not any(prompts_folder(folder).glob("*_pure_t2i_with_vqa.jsonl")):
        return f"{prompts_folder(folder)} holds no drawing prompts (*_pure_t2i_with_vqa.jsonl)."
    absent = [kind for kind in ("clip", "dinov2") if EncoderFolder(base).place(kind) is None]
    return f"{base} holds no scorers ({', '.join(absent)})." if absent else ""


def grpo_config(cfg: Quickstart, folder: Path, sft: Path) -> GRPOConfig:
    """The laptop preset of Character-GRPO on this character, from the run of stage 1."""
    preset = presets.load(GRPOConfig, "grpo-mini")
    return dataclasses.replace(
        preset,
        base=str(sft),
        run_dir=str(cfg.folder / "grpo"),
        prompts=str(prompts_folder(folder)),
        rounds=preset.rounds if cfg.rounds is None else cfg.rounds,
        seed=cfg.seed,
    )


def evaluate(
    cfg: Quickstart, folder: Path, story: Story, progress: Callable[[str], Progress] | None
) -> tuple[Results, ...]:
    """Every model on the same held-out items and seeds, under the names that the report uses."""
    *others, last = (path for path, _ in story.models)
    found = run_evaluation(
        Evaluation(
            last,
            data=folder.parent.parent,
            characters=(folder.name,),
            tasks=TASKS,
            seeds=cfg.seeds,
            compare=tuple(others),
            out=cfg.folder / "evaluation",
        ),
        progress,
    ).results
    count = len(story.models)
    labels = [label for _, label in story.models]
    measured = (dataclasses.replace(r, label=label) for r, label in zip(found[-count:], labels, strict=True))
    return (*found[:-count], *measured)


def converse(cfg: Quickstart, folder: Path, final: Path) -> Conversation:
    """A short role play with the finished character, saved as a transcript."""
    from unichar_jax.sampling.session import Persona, RolePlay
    from unichar_jax.sampling.text import TextSettings

    with engines.load_engine(final) as engine:
        play = RolePlay(engine, Persona.from_folder(folder))
        for line in LINES:
            turn = play.reply(line, TextSettings(max_tokens=80, temperature=0.7, seed=cfg.seed))
            say(f"you: {line}\n{play.persona.name}: {turn.reply}")
        play.picture(engines.flow_settings(30, 4.0, final))
        play.save(cfg.folder / "transcript")
        return conversation(play)


# -- the report ---------------------------------------------------------------------------------------------


def report(
    cfg: Quickstart,
    folder: Path,
    final: Path,
    story: Story,
    results: tuple[Results, ...],
    talk: Conversation,
) -> Report:
    """Everything that was made, as one page."""
    character = rolescape.read_character(folder)
    models = results[-len(story.models) :]
    drawn: Comparison = compare(models, prompts=6)
    facts = [
        ("character", str(folder)),
        ("base", cfg.base),
        ("seeds", f"{cfg.seed} for training, {cfg.seeds} pictures of every prompt"),
        *((title, f"{minutes:.1f} minutes") for title, minutes in story.minutes),
        ("machine", f"{platform.machine()}, {_devices()}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions().items())),
        *(("left out", text) for text in story.left_out),
    ]
    configs = [("Unified-SFT", presets.to_json(sft_config(cfg, folder)))]
    if final.name == "grpo":
        configs.append(("Character-GRPO", presets.to_json(grpo_config(cfg, folder, cfg.folder / "sft"))))
    stages = " and ".join(label.removeprefix("+ ") for _, label in story.models if "base" not in label)
    return Report(
        title=character.name,
        summary=f"{stages} taught a small model to answer and to draw as {character.name},"
        f" from {len(character.images)} pictures and some dialogue. Below: what it learned from, what it draws and"
        " says now, and how that compares with the model before, on prompts and questions that it never saw.",
        kicker="UniChar-JAX quickstart",
        references=tuple(Picture(image.path) for image in character.images),
        comparison=drawn,
        conversation=talk,
        measurements=(Measurements(results, "Held-out questions, replies and pictures"),),
        charts=(
            *curves(
                cfg.folder / "sft" / "metrics.jsonl",
                ["ce", "mse"],
                {"ce": "Unified-SFT: loss of the text", "mse": "Unified-SFT: loss of the pictures"},
            ),
            *curves(
                cfg.folder / "grpo" / "held_out.jsonl",
                ["reward"],
                {"reward": "Character-GRPO: reward on held-out prompts"},
            ),
        ),
        making=tuple(facts),
        configs=tuple(configs),
        commands=_next(cfg, folder, final),
    )


def _devices() -> str:
    import jax

    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def _next(cfg: Quickstart, folder: Path, final: Path) -> tuple[Command, ...]:
    name = folder.name
    return (
        Command(called("chat", final), f"Talk to {name}:"),
        Command(called("draw", final, f"{name} is waving in the snow.", "-n", 8), f"Draw {name}:"),
        Command(called("serve", final), f"Meet {name} in a browser:"),
        Command(
            called("data", "new", "NAME", "--images", "FOLDER_OF_PICTURES", "--out", "data")
            + "\n"
            + called("quickstart", "--data", "data/personalized_data/train/NAME"),
            "The same with about ten pictures of your own (the mini model only knows its picture-book world; "
            "'unichar sft sft-bagel-7b' is for the real one):",
        ),
    )


def _print_results(
    cfg: Quickstart, folder: Path, final: Path, page: Path, talk: Conversation, story: Story
) -> None:
    minutes = sum(m for _, m in story.minutes)
    print(f"\n{talk.name} is ready ({minutes:.1f} minutes).\n\n  the report:  {page}")
    for command in _next(cfg, folder, final):
        lines = command.command.replace("\n", "\n    ")
        print(f"\n{command.purpose}\n    {lines}")
