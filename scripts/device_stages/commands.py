"""Stage ``commands``: the mini model by the commands that a user types, each a process of its own.

A character is made from a few drawn pictures by ``unichar data new``; stage 1 trains 20 steps, is killed without
warning and started again; stage 2 makes one round; the result is drawn with, exported and verified. This process
leaves the device to the commands.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from device_stages.measure import part, say, say_device
from PIL import Image, ImageDraw

STEPS = 20
NEEDED = (
    "tyro",
    "rich",
    "grain",
    "transformers",
    "tokenizers",
    "safetensors",
    "tensorflow_datasets",
    "array_record",
)
DIALOGUE = """Opening: The shop bell rings.

Image: 0.png
User: Good morning!
Tess: Morning. Mind the wet paint.

User: Do you sell maps?
Tess: Only of places that hold still.
"""


def device() -> None:
    """Names the device; asked in a process of its own, which lets go of it."""
    ask = "import jax, json; print(json.dumps([jax.devices()[0].device_kind, jax.__version__]))"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout
    say_device(*json.loads(answer.splitlines()[-1]))


def unichar(what: str, *args: object, until: Callable[[], bool] | None = None) -> str | None:
    """Runs a command and says how long it took; its standard error, or None if it failed.

    With ``until`` the command is killed as soon as that holds; then it has not failed, unless it ended before.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        words = [sys.executable, "-m", "unichar_jax.cli.main", *map(str, args)]
        process = subprocess.Popen(words, stdout=log, stderr=log)
        while until is not None and process.poll() is None and not until():
            time.sleep(0.005)
        killed = until is not None and process.poll() is None
        if killed:
            process.kill()
        code = process.wait()
        log.seek(0)
        told = log.read()
    if until is not None and not killed:
        say(what, error=f"ended with {code} before it could be killed: {told[-600:]}")
        return None
    if code and not killed:
        say(what, error=f"ended with {code}: {told[-600:]}")
        return None
    say(what, time.monotonic() - began, "s")
    return told


def make_character(folder: Path) -> tuple[Path, Path] | None:
    """The data root of stage 1 and the prompt folder of stage 2, of a new character."""
    pictures, prompts = folder / "pictures", folder / "prompts"
    pictures.mkdir()
    prompts.mkdir()
    for i in range(6):
        image = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(image).ellipse((10 + 4 * i, 20, 60 + 4 * i, 80), fill=(40 * i, 90, 160))
        image.save(pictures / f"{i}.png")
        image.save(prompts / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"Tess is waving, number {i}.")
    (folder / "dialogue.txt").write_text(DIALOGUE)
    (folder / "profile.txt").write_text("Tess keeps a shop.\nName: Tess\nTrade: maps\n")
    question = {
        "question": "Is Tess blue?",
        "type": "yes_no",
        "category": "looks",
        "answer": "yes",
        "weight": 1.0,
    }
    lines = [
        {
            "text": f"Tess is waving, number {i}.",
            "character": "Tess",
            "scene_id": str(i),
            "vqa_questions": [question],
        }
        for i in range(4)
    ]
    (prompts / "Tess_pure_t2i_with_vqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = ("--images", pictures, "--profile", folder / "profile.txt", "--dialogues", folder / "dialogue.txt")
    if unichar("data new", "data", "new", "Tess", *made, "--out", folder / "data") is None:
        return None
    return folder / "data", prompts


def losses(run: Path) -> dict[int, float]:
    """The loss of every step that was logged."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows}


def train(data: Path, run: Path, small: bool) -> bool:
    """Stage 1: killed after half of its steps, and resumed; whether it came to its end."""
    preset = "sft-debug" if small else "sft-mini"
    words = ["sft", preset, "--data.path", data, "--run-dir", run, "--steps", STEPS, "--log-every", 1]
    words += ["--save.every", STEPS // 4]

    def halfway() -> bool:
        return max(losses(run), default=0) >= STEPS // 2

    if unichar(f"sft, killed after {STEPS // 2} of {STEPS} steps", *words, until=halfway) is None:
        return False
    before = losses(run)
    told = unichar("sft, resumed to its end", *words)
    if told is None:
        return False
    after = losses(run)
    resumed = [line for line in told.splitlines() if line.startswith("resuming at step")]
    if not resumed or max(after) != STEPS:
        say(
            "sft, resumed", error=f"expected to resume and reach step {STEPS}, got {resumed} and {max(after)}"
        )
        return False
    apart = max(abs(after[n] - before[n]) for n in before.keys() & after.keys())
    say("loss of steps before and after the kill: largest difference", apart, "nats", resumed=resumed[0])
    return True


def drawn(run: Path, out: Path) -> None:
    if unichar("draw", "draw", run, "Tess is waving.", "-n", 2, "--steps", 8, "--out", out) is not None:
        pixels = np.asarray(Image.open(out))
        say(
            "draw: what the sheet holds",
            float(pixels.std()),
            "deviation of pixels",
            size=list(pixels.shape[:2]),
        )


def walk(small: bool) -> None:
    with part("device"):
        device()
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    say("packages that are absent", len(absent), "packages", names=absent)
    with tempfile.TemporaryDirectory(prefix="unichar-device-") as name:
        folder = Path(name)
        made, run, second = None, folder / "sft", folder / "grpo"
        with part("data new"):
            made = make_character(folder)
        if made is None:
            return say("sft", skipped="there is no character to train")
        data, prompts = made
        done = False
        with part("sft"):
            done = train(data, run, small)
        if not done:
            return say("grpo, draw, convert", skipped="stage 1 did not come to its end")
        with part("grpo"):
            words = [
                "grpo",
                "grpo-mini",
                "--base",
                run,
                "--run-dir",
                second,
                "--prompts",
                prompts,
                "--rounds",
                1,
            ]
            words += [
                "--prompts-per-round",
                2,
                "--group",
                4,
                "--updates",
                1,
                "--held-out",
                1,
                "--eval.every",
                0,
            ]
            unichar("grpo, one round", *words)
        with part("draw"):
            drawn(second if (second / "checkpoints").is_dir() else run, folder / "sheet.png")
        with part("convert"):
            unichar("convert --verify", "convert", run, folder / "export", "--verify")
    return None
