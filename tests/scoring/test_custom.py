"""A user's own reward: what it is given, and what happens when it misbehaves."""

from __future__ import annotations

import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.errors import UserError
from unichar_jax.scoring.base import ScoreContext, checked_scores
from unichar_jax.scoring.custom import CustomScorer

IMAGES = jnp.linspace(0, 1, 3 * 4 * 4 * 3).reshape(3, 4, 4, 3)
CONTEXT = ScoreContext(["a", "bb", "ccc"], np.zeros(3, int))


@pytest.fixture
def write(tmp_path):
    def write(code: str) -> str:
        (tmp_path / "mine.py").write_text(textwrap.dedent(code))
        return f"{tmp_path}/mine.py:reward"

    return write


def test_gets_pictures_and_context_and_may_import_its_neighbours(write, tmp_path):
    (tmp_path / "neighbour.py").write_text("FACTOR = 2\n")
    spec = write(
        """
        from neighbour import FACTOR
        def reward(images, context):
            return [FACTOR * image.mean() + len(prompt) for image, prompt in zip(images, context.prompts)]
        """
    )
    scorer = CustomScorer(spec)
    assert scorer.name == "reward"
    got = checked_scores(scorer.name, scorer(IMAGES, CONTEXT), CONTEXT)
    expected = 2 * np.asarray(IMAGES).mean(axis=(1, 2, 3)) + [1, 2, 3]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0, 2.0]", r"expected one number for each picture, shape \(3,\), got shape \(2,\)"),
        ("return images", r"got shape \(3, 4, 4, 3\)"),
        ("return None", r"got shape \(\)"),
        ("return 'good'", r"expected 3 numbers, got str"),
        ("return [0, float('nan'), 1]", r"1 of 3 scores .* nan for picture 1, prompt 'bb'"),
        ("return [0, 1, float('inf')]", r"inf for picture 2"),
        ("return images[7]", r"line 2: 'reward' raised IndexError"),
        ("raise SystemExit(3)", r"raised SystemExit: 3"),
    ],
)
def test_bad_returns_and_exceptions(write, body, message):
    scorer = CustomScorer(write(f"def reward(images, context):\n    {body}\n"))
    with pytest.raises(UserError, match=message) as caught:
        scorer(IMAGES, CONTEXT)
    assert "mine.py" in str(caught.value)


def test_slow(write):
    spec = write("import time\ndef reward(images, context):\n    time.sleep(30)\n")
    with pytest.raises(UserError, match=r"took longer than 0.1 s for 3 pictures"):
        CustomScorer(spec, timeout=0.1)(IMAGES, CONTEXT)


def test_bad_files(write, tmp_path):
    for spec in ("mine.py", "mine:reward", "mine.py:", ":reward"):
        with pytest.raises(UserError, match=r"expected path/to/file\.py:function"):
            CustomScorer(spec)
    with pytest.raises(UserError, match="file not found"):
        CustomScorer(f"{tmp_path}/absent.py:reward")
    with pytest.raises(UserError, match=r"no function 'reward' \(did you mean 'rewards'\?\)"):
        CustomScorer(write("def rewards(images, context):\n    return 0\n"))
    with pytest.raises(UserError, match=r"line 2 cannot be imported \(ZeroDivisionError"):
        CustomScorer(write("x = 0\ny = 1 / x\n"))
    with pytest.raises(UserError, match=r"cannot be imported \(SyntaxError"):
        CustomScorer(write("def reward(:\n"))
