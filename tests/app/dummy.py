"""A report with everything in it, from invented numbers and pictures that the mini world draws."""

from __future__ import annotations

import numpy as np
from PIL import Image

from unichar_jax.app.charts import Chart, Series
from unichar_jax.app.report import (
    Column,
    Command,
    Comparison,
    Conversation,
    Exchange,
    Measurements,
    Picture,
    Report,
)
from unichar_jax.evaluation.results import Record, Results
from workshop.miniworld.cast import CAST, sample_look
from workshop.miniworld.draw import draw
from workshop.miniworld.texts import named_caption
from workshop.miniworld.world import Look, Scene, sample_scene

PIP = CAST["Pip"].look


def picture(look: Look, scene: Scene, size: int = 96, caption: str = "") -> Picture:
    return Picture(Image.fromarray(draw(look, scene, size)), caption)


def results(label: str, level: float, seed: int, rewarded: tuple[str, ...] = ()) -> Results:
    """Invented measurements around ``level``."""
    rng = np.random.default_rng(seed)
    shares = {
        "knowledge_mcq": ("accuracy", "probability"),
        "unseen_image_mcq": ("accuracy",),
        "dialogue": ("voice", "catchphrase"),
        "t2i": ("clip_t", "dino", "copied", "identity", "prompt_following"),
        "t2t2i": ("identity", "consistency"),
    }
    records = []
    for task, names in shares.items():
        for item in range(12):
            for repetition in range(3 if task in ("dialogue", "t2i", "t2t2i") else 1):
                values = {n: float(np.clip(rng.normal(level, 0.2), 0, 1)) for n in names}
                if "copied" in values:
                    values["copied"] = 0.0
                records.append(Record(task, "Pip", f"{task}/{item}", repetition, values))
    for item in range(12):
        nats = float(1.4 - level + rng.normal(0, 0.05))
        records.append(Record("reply_likelihood", "Pip", f"r/{item}", 0, {"nats_per_char": nats}))
    left_out = {"judged": "no judge was named; give --judge-url and --judge-model"}
    return Results(label, label, tuple(records), rewarded, left_out)


def report(prompts: int = 3, seeds: int = 3, side: int = 96) -> Report:
    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng) for _ in range(prompts)]
    other = [sample_look(rng) for _ in range(prompts * seeds)]
    mixed = Look(PIP.species, PIP.colour, PIP.belly, "striped", "hat", "red")

    def column(label: str, note: str, look) -> Column:
        rows = tuple(
            tuple(
                picture(
                    look(p * seeds + s),
                    Scene(c.expression, c.pose, c.place, c.time, 100 * p + s),
                    side,
                )
                for s in range(seeds)
            )
            for p, c in enumerate(scenes)
        )
        return Column(label, rows, note)

    x = np.arange(1, 301)
    noise = np.random.default_rng(0).normal(0, 0.06, (4, 300))
    falling = 0.35 + 1.4 * np.exp(-x / 60)
    line = lambda name, y: Series(name, tuple(map(float, x)), tuple(map(float, y)))  # noqa: E731
    measured = (
        results("base, name only", 0.3, 1),
        results("base, described", 0.6, 2),
        results("SFT", 0.85, 3),
        results("GRPO", 0.88, 4, rewarded=("clip_t", "dino")),
    )
    return Report(
        title="Pip, learnt from ten pictures",
        summary="From ten pictures and a page of dialogue the model learnt to draw Pip in places it never saw him"
        " in, and to speak like him. Invented numbers: this page is a test of the layout.",
        kicker="UniChar-JAX quickstart",
        references=tuple(picture(PIP, sample_scene(rng), side) for _ in range(10)),
        comparison=Comparison(
            tuple(named_caption("Pip", s, rng) for s in scenes),
            (
                column("base", "name only", lambda i: other[i]),
                column("base", "looks described", lambda i: mixed),
                column("SFT", "name only", lambda i: PIP),
                column("GRPO", "name only", lambda i: PIP),
            ),
        ),
        conversation=Conversation(
            "Pip",
            (
                Exchange(
                    "How about a trip? We meet at the castle.",
                    "Arr! I feel happy and I be waving at the castle at sunset. Zip zap ahoy!",
                    picture(PIP, Scene("happy", "waving", "castle", "sunset", 1), side),
                ),
                Exchange(
                    "Which food is <b>best</b>?", "Yo ho ho! Me favourite food is pancakes. Zip zap ahoy!"
                ),
            ),
            opening="Ahoy, matey! Pip is here. Zip zap ahoy!",
        ),
        measurements=(Measurements(measured),),
        charts=(
            Chart("flow error", (line("flow error", falling + noise[0]),)),
            Chart(
                "cross-entropy",
                (line("dialogue", falling + noise[1]), line("knowledge", 0.7 * falling + noise[2])),
            ),
            Chart("reward", (line("reward", 0.8 - 0.4 * falling + noise[3]),), "round"),
        ),
        making=(
            ("base", "checkpoints/mini, 10,107,904 parameters"),
            ("seeds", "training 0; evaluation 0, 1, 2"),
            ("time", "SFT 1 min 17 s, GRPO 2 min 0 s, evaluation 1 min 2 s"),
            ("versions", "unichar-jax 0.1.0, jax 0.10.2, flax 0.12.8"),
        ),
        configs=(("SFT configuration", 'base = "mini"\nsteps = 150\n'),),
        commands=(
            Command("unichar chat runs/pip", "Talk to Pip:"),
            Command(
                "unichar data new NAME --images my-pictures/", "Do the same with ten pictures of your own:"
            ),
        ),
    )


if __name__ == "__main__":
    import sys

    from unichar_jax.app.report import write_report

    print(write_report(report(prompts=6), sys.argv[1]))
