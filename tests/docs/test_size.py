"""The package stays small: its lines of code are counted, and have a limit."""

from __future__ import annotations

import runpy

from tests.docs.checker import REPOSITORY

SCRIPT = runpy.run_path(str(REPOSITORY / "scripts" / "count_code.py"))
LIMIT = 21_600


def test_the_package_is_no_larger_than_its_limit():
    found = SCRIPT["count"](REPOSITORY / "unichar_jax")
    assert {"data", "models", "training", "."} <= set(found)
    assert sum(found.values()) <= LIMIT, found


def test_what_counts():
    source = '''"""Module,
two lines."""

# a comment
A = 1  # counts
"""Of a constant."""
TEXT = """goes
over

four lines"""


def f(
    x,
):
    """Docstring."""
    return """not a docstring""" + x
'''
    assert SCRIPT["code_lines"](source) == 1 + 4 + 3 + 1


def test_folders_are_told_apart(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "one.py").write_text("x = 1\n")
    (tmp_path / "a" / "two.py").write_text("x = 1\ny = 2\n")
    (tmp_path / "a" / "b" / "three.py").write_text("x = 1\n\n# no\n")
    (tmp_path / "a" / "not_code.md").write_text("x = 1\n")
    assert SCRIPT["count"](tmp_path) == {"a": 3, ".": 1}
