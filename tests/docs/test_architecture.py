"""The floors are as the document draws them: imports point down, every package is on one, and no files go in circles.

Imports inside functions count as those at a file's head do.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator, Mapping
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
        if other in order and (floor not in order or order.index(other) < order.index(floor)):
            found.append(f"{module} {name}".strip())
    return found


def modules(*packages: Path) -> dict[str, str]:
    """Source of every module, by its name."""
    found = {}
    for package in packages:
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text("utf-8")
    return found


class _Imports(ast.NodeVisitor):
    """Modules among ``known`` that a file imports when it runs: not what only a type checker reads."""

    def __init__(self, known: Mapping[str, str]):
        self.known, self.found = known, set[str]()

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names} & self.known.keys()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute here"
        for alias in node.names:
            name = f"{node.module}.{alias.name}"  # a module, or something in one
            self.found |= {name if name in self.known else str(node.module)} & self.known.keys()


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules each of which is imported by the next, with the first again at the end; empty if there are none."""
    graph = {}
    for name, source in sources.items():
        reader = _Imports(sources)
        reader.visit(ast.parse(source))
        graph[name] = reader.found
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


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
    found = {p: names for p in paths if (names := of_workshop(p.read_text("utf-8")))}
    assert not found


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
        floor = path.relative_to(PACKAGE).parts[0]  # a file beside the floors is below them all
        if path != PACKAGE / "__init__.py" and (found := upward(floor, path.read_text("utf-8"), order)):
            wrong[path.relative_to(PACKAGE)] = found
    assert not wrong


def test_an_import_that_points_up_is_noticed():
    order = floors()
    assert upward("models", "from unichar_jax.training.step import make_sft_step", order)
    assert upward("data", "def f():\n    import unichar_jax.sampling.engine", order)
    assert upward("config", "from unichar_jax.models.decoder import Decoder", order)
    assert upward("errors.py", "def f():\n    from unichar_jax.config import presets", order)
    assert not upward("training", "from unichar_jax.models.decoder import Decoder", order)


def test_files_do_not_import_each_other_in_circles():
    found = circle(modules(PACKAGE, checker.REPOSITORY / "workshop"))
    assert not found, " is imported by ".join(found)


def test_a_circle_is_noticed_and_named():
    attention = "def prepare():\n    from p.models import kernels"
    files = {"p.models.attention": attention, "p.models.kernels": "from p.models.kernels.dense import Dense"}
    dense = {"p.models.kernels.dense": "from p.models.attention import Prepared\nimport jax"}
    found = circle(files | dense)
    assert len(found) == 4 and set(found) == {*files, *dense}
    assert circle({"p": "import p.a", "p.a": "from p import b", "p.b": "import p"})[0]
    only_types = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.models.attention import Prepared"
    )
    assert not circle(files | {"p.models.kernels.dense": only_types})


def test_nothing_below_app_knows_of_the_mini_world():
    below = floors()[floors().index("app") + 1 :]
    assert "evaluation" in below and "config" in below
    texts = {
        p: p.read_text("utf-8").lower()
        for name in below
        for p in (PACKAGE / name).rglob("*")
        if p.suffix in TEXTS
    }
    assert len(texts) > 100
    assert not [p for p, text in texts.items() if re.search(r"mini[ _-]?world|workshop", text)]


TEXTS = (".py", ".md", ".html")
