"""``unichar data``: check a folder, start a new character, annotate it, build the TFDS dataset."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
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
    user: str = "User",
) -> int:
    """Starts a character from about ten pictures, a profile and some dialogue.

    Args:
      name: of the character.
      images: folder of pictures; a .txt or .caption of the same name is a picture's caption, or metadata.jsonl.
      profile: a text file whose lines 'Key: value' become facts, or a character card (JSON).
      dialogues: a text file 'User: ...' / 'NAME: ...', or JSON: ours, ShareGPT's or OpenAI's.
      out: where the dataset is written.
      user: what {{user}} stands for.
    """
    from unichar_jax.data.new_character import new_character, summary

    print(summary(new_character(name, images, profile, dialogues, out=out, user=user)))
    return 0


def annotate(
    folder: Annotated[Path, tyro.conf.Positional],
    endpoint: str = "",
    model: str = "",
    run: Path | None = None,
    out: Path | None = None,
    decisions: Path | None = None,
    held_out: int = 2,
    knowledge: int = 100,
    dialogues: int = 180,
    prompts: int = 30,
    workers: int = 4,
    timeout: float = 120.0,
    key_variable: str = "UNICHAR_ENDPOINT_KEY",
) -> int:
    """Makes from a new character what RoleScape-20 has of one: captions, thinking, questions, dialogue, tests.

    The folder is only read. An interrupted annotation goes on with the same command and asks nothing twice.

    Args:
      folder: a character's train folder, as 'unichar data new' makes it.
      endpoint: an OpenAI-compatible address such as http://localhost:8000/v1, of a model that sees pictures.
      model: its name there.
      run: a run or a model directory that annotates, in place of an endpoint.
      out: data root of the result; by default the folder's own with '-annotated' at its end.
      decisions: the file saved from the review page.
      held_out: pictures that training does not see.
      knowledge: questions about the profile.
      dialogues: exchanges without pictures.
      prompts: drawing prompts for stage 2.
      workers: questions at a time.
      timeout: seconds for one answer of an endpoint.
      key_variable: environment variable that holds the endpoint's key, if it needs one.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

    from unichar_jax.app.annotate.annotation import Wanted
    from unichar_jax.app.annotate.run import AnnotateConfig
    from unichar_jax.app.annotate.run import run as run_annotation

    wanted = Wanted(held_out=held_out, knowledge=knowledge, dialogue=dialogues, rl_prompts=prompts)
    cfg = AnnotateConfig(folder, endpoint, model, key_variable, run, out, wanted, decisions, workers, timeout)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        lines: dict[str, TaskID] = {}
        counts: dict[str, tuple[int, int]] = {}
        lock = Lock()  # parts are told of from several threads

        def tell(what: str, done: int, total: int) -> None:
            kind = what.split()[0]
            with lock:
                counts[what] = (done, total)
                line = lines.get(kind)
                lines[kind] = bars.add_task(kind) if line is None else line
                mine = [count for name, count in counts.items() if name.split()[0] == kind]
                bars.update(lines[kind], completed=sum(d for d, _ in mine), total=sum(t for _, t in mine))

        made = run_annotation(cfg, tell)
    print(made.summary)
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
        {"check": check, "new": new, "annotate": annotate, "build": build}, args=args, prog="unichar data"
    )
