"""The quickstart from end to end, with random weights of the smallest size."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console

from unichar_jax.app import quickstart
from unichar_jax.app.quickstart import Quickstart
from unichar_jax.cli.main import main
from unichar_jax.config.train import SFTConfig
from unichar_jax.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    cfg = Quickstart(base="debug", out=out, steps=2, seeds=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "TASKS", ("knowledge_mcq", "t2i"))
        patch.setattr(quickstart, "LINES", ("Hello!",))
        page = quickstart.run(cfg)
    return cfg, page


def test_the_report_holds_everything_it_shows(made):
    _, page = made
    html = page.read_text(encoding="utf-8")
    training = html.split('id="pictures"')[1].split("</section>")[0]
    assert training.count("data:image/png;base64,") == 10
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    for part in ("Unified-SFT", "Hello!", "right answer", "unichar chat"):
        assert part in html


def test_what_could_not_be_had_is_said(made):
    _, page = made
    html = page.read_text(encoding="utf-8")
    assert "random ones" in html
    assert "Character-GRPO is left out" in html


def test_results_are_kept_under_the_names_of_the_models(made):
    cfg, _ = made
    assert [p.name for p in (cfg.out / "evaluation").glob("results-*.json")] == ["results-sft.json"]
    assert (cfg.out / "transcript" / "transcript.json").is_file()


def test_a_second_start_trains_nothing(made, monkeypatch):
    cfg, _ = made
    before = (cfg.out / "sft" / "metrics.jsonl").read_bytes()
    story = quickstart.Story(models=[(str(cfg.out / "sft"), "Unified-SFT")])
    folder = quickstart.character_folder(cfg)
    monkeypatch.setattr(quickstart, "TASKS", ("knowledge_mcq", "t2i"))
    results = quickstart.evaluate(cfg, folder, story, None)
    assert results[-1].label == "Unified-SFT"
    assert (cfg.out / "sft" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_every_printed_command_runs_as_printed(made, tmp_path, monkeypatch, capsys):
    """In a folder of the user's, with the words that are placeholders filled in."""
    cfg, _ = made
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNICHAR_COMMAND", str(Path(sys.executable).with_name("unichar")))
    folder, final = quickstart.character_folder(cfg), cfg.folder / "sft"
    pictures = next((cfg.folder / "data" / "personalized_data" / "train").iterdir())
    printed = [c.command for c in quickstart._next(cfg, folder, final)]
    commands = [shlex.split(line) for text in printed for line in text.splitlines()]
    assert [words[1] for words in commands] == ["chat", "draw", "serve", "data", "quickstart"]
    assert {words[0] for words in commands} == {str(Path(sys.executable).with_name("unichar"))}
    monkeypatch.setattr(quickstart, "TASKS", ("knowledge_mcq",))
    monkeypatch.setattr(Console, "input", lambda *_, **__: "")
    shutil.copytree(
        pictures, tmp_path / "pictures", ignore=lambda _, names: [n for n in names if ".png" not in n]
    )
    for _, command, *words in commands:
        words = [w.replace("NAME", "Nova").replace("FOLDER_OF_PICTURES", "pictures") for w in words]
        if command == "serve":
            _serves([command, *words])
        elif command == "quickstart":
            quick = ["--base", "debug", "--steps", "1", "--rounds", "0", "--seeds", "1"]
            assert main([command, *words, *quick]) == 0, capsys.readouterr().err
            assert (tmp_path / "runs" / "quickstart-Nova" / "report.html").is_file()
        else:
            assert main([command, *words]) == 0, capsys.readouterr().err
    assert "is waving" in printed[1] and (final / "drawing.png").is_file()


def _serves(words: list[str]) -> None:
    """Starts the server on a free port, fetches its page, and stops it as Ctrl-C does."""
    command = [sys.executable, "-m", "unichar_jax.cli.main", *words, "--port", "0", "--no-warm"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = re.search(r"http://\S+", server.stdout.readline())
        try:
            with urllib.request.urlopen(address[0]) as page:
                assert "<html" in page.read().decode().lower()
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(60) in (0, 130, -signal.SIGINT)


def test_another_character_gets_another_folder():
    """So the two commands of the README do not meet."""
    folders = [
        Quickstart().folder,
        Quickstart(character="Luna").folder,
        Quickstart(data=Path("x/train/Nova")).folder,
        Quickstart(out=Path("mine"), character="Luna").folder,
    ]
    names = ("runs/quickstart", "runs/quickstart-Luna", "runs/quickstart-Nova", "mine")
    assert folders == [Path(name) for name in names]


def test_stages_take_the_users_numbers(tmp_path):
    cfg = Quickstart(out=tmp_path, steps=7, rounds=3, seed=5)
    folder = tmp_path / "train" / "Pip"
    sft = quickstart.sft_config(cfg, folder)
    assert (sft.steps, sft.seed, sft.data.seed) == (7, 5, 5)
    assert quickstart.grpo_config(cfg, folder, tmp_path / "sft").rounds == 3
    assert dataclasses.asdict(sft).keys() == dataclasses.asdict(SFTConfig()).keys()


def test_a_folder_that_is_no_character_is_named(tmp_path):
    with pytest.raises(UserError, match=r"expected an existing character folder"):
        quickstart.run(Quickstart(data=tmp_path))


def test_no_stage_two_without_prompts_or_scorers(tmp_path):
    cfg = Quickstart(out=tmp_path)
    folder = quickstart.character_folder(cfg)
    assert "scorers" in quickstart.why_no_grpo(cfg, folder, tmp_path)
    assert "--rounds 0" in quickstart.why_no_grpo(dataclasses.replace(cfg, rounds=0), folder, tmp_path)
    for path in quickstart.prompts_folder(folder).glob("*with_vqa.jsonl"):
        path.unlink()
    assert "prompts" in quickstart.why_no_grpo(cfg, folder, tmp_path)
