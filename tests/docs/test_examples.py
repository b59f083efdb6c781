"""What documents show as code does what they say: the reward, the kernel, the messages of troubleshooting."""

from __future__ import annotations

import ast
import functools
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.docs import checker
from tests.models.test_kernels import arrays, assert_same, metadata
from tests.models.test_kernels import run as run_kernel
from unichar_jax.models import kernels
from unichar_jax.scoring.base import ScoreContext
from unichar_jax.scoring.custom import CustomScorer

DOCS = checker.REPOSITORY / "docs"


def file_in(document: str, name: str, folder: Path) -> Path:
    """A file that a document shows, written into a folder."""
    (block,) = (b for b in checker.blocks((DOCS / document).read_text("utf-8")) if b.name == name)
    path = folder / name
    path.write_text(block.text, "utf-8")
    return path


def test_the_reward(tmp_path):
    path = file_in("rewards.md", "colourful.py", tmp_path)
    grey, white, bright = np.full((8, 8, 3), 0.4), np.ones((8, 8, 3)), np.zeros((8, 8, 3))
    bright[:4, :, 0] = bright[4:, :, 2] = 1.0
    pictures = jax.numpy.asarray(np.stack([grey, white, bright]), "float32")
    context = ScoreContext(["a street", "Snow at night", "snow"], np.array([0, 1, 1]))
    grey_score, white_score, bright_score = CustomScorer(f"{path}:colourful")(pictures, context)
    assert grey_score == pytest.approx(0, abs=1e-6) and white_score == pytest.approx(0, abs=1e-6)
    assert bright_score > 0.5
    assert CustomScorer(f"{path}:white_where_it_snows")(pictures, context).tolist() == [0.5, 1.0, 0.0]


def test_the_kernel(tmp_path):
    kernel = runpy.run_path(str(file_in("attention_kernels.md", "one_at_a_time.py", tmp_path)))[
        "OneAtATime"
    ]()
    samples = [[("text", 20), ("clean", 30), ("text", 5), ("noised", 30)], [("text", 10)]]
    meta, x = metadata([(samples, 1), (samples[:1], 2)]), arrays(3)
    got, expected = (
        jax.jit(functools.partial(run_kernel, k))(meta, *x) for k in (kernel, kernels.KERNELS["reference"])
    )
    assert_same(got, expected)


def strings_of_the_code() -> list[str]:
    """Every string of the package and the launchers; what a format fills in is a line of its own."""
    found = []
    for path in sorted((checker.REPOSITORY / "unichar_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "\n" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found + [p.read_text("utf-8") for p in sorted((checker.REPOSITORY / "launch").glob("*.sh"))]


def symptoms() -> list[str]:
    """The messages in the first column of the tables."""
    rows = re.findall(r"^\| (.*?) \| ", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


OTHERS = {
    "RESOURCE_EXHAUSTED",
    "Failed to find host bounds for accelerator type",
    "unexpected worker hostname",
}
"""Messages that are not this package's, and no words of its code."""


@functools.cache
def all_strings() -> str:
    return "\0".join(strings_of_the_code())


@pytest.mark.parametrize("message", symptoms())
def test_messages_are_those_of_the_code(message):
    if message not in OTHERS:
        for part in filter(None, map(str.strip, message.split("…"))):
            assert part in all_strings() or len(part) < 3, f"no message says '{part}'"


def test_there_are_messages_and_an_invented_one_is_noticed():
    assert len(symptoms()) > 30
    assert "this message was never written" not in all_strings()
