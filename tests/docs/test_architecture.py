"""The floors are as the document draws them: imports point down, and every package is on one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.docs import checker

PACKAGE = checker.REPOSITORY / "unichar_jax"


def floors() -> list[str]:
    """The floors of the document, from the top."""
    text = (checker.REPOSITORY / "docs" / "architecture.md").read_text("utf-8")
    (drawn,) = (b.text for b in checker.blocks(text) if b.text.startswith("cli "))
    return [line.split()[0] for line in drawn.splitlines()]


def imports(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file imports from this package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "unichar_jax":
            yield from ((f"unichar_jax.{alias.name}", "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unichar_jax."):
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name.startswith("unichar_jax."))


def upward(floor: str, source: str, order: list[str]) -> list[str]:
    """What a file of a floor imports from floors above it."""
    found = []
    for module, name in imports(source):
        other = module.split(".")[1]
        if other in order and order.index(other) < order.index(floor):
            found.append(f"{module} {name}".strip())
    return found


BACK = {
    "evaluation/pictures.py",
    "evaluation/texts.py",
    "scoring/mini.py",
}
"""Files that still use the workshop's code."""


def of_workshop(source: str) -> list[str]:
    """What a file imports from the workshop, at its head or inside functions."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.split(".")[0] == "workshop"]


def test_the_package_does_not_import_the_workshop():
    paths = sorted(PACKAGE.rglob("*.py"))
    found = {p.relative_to(PACKAGE).as_posix() for p in paths if of_workshop(p.read_text("utf-8"))}
    assert found == BACK


def test_an_import_of_the_workshop_is_noticed():
    assert of_workshop("from workshop.miniworld import draw")
    assert of_workshop("def f():\n    import workshop.study.claims as claims")
    assert of_workshop("from workshop import miniworld")
    assert not of_workshop("from unichar_jax.data import workshop")


def test_every_package_is_on_a_floor():
    assert set(floors()) == {p.parent.name for p in PACKAGE.glob("*/__init__.py")}


def test_imports_point_down():
    order = floors()
    wrong: dict[Path, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        floor = path.relative_to(PACKAGE).parts[0]
        if floor in order and (found := upward(floor, path.read_text("utf-8"), order)):
            wrong[path.relative_to(PACKAGE)] = found
    assert not wrong


def test_an_import_that_points_up_is_noticed():
    order = floors()
    assert upward("models", "from unichar_jax.training.step import make_sft_step", order)
    assert upward("data", "def f():\n    import unichar_jax.sampling.engine", order)
    assert upward("config", "from unichar_jax.models.decoder import Decoder", order)
    assert not upward("training", "from unichar_jax.models.decoder import Decoder", order)
