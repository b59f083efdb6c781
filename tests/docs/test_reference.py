"""The reference made from docstrings: every public module imports, says what it is for, and gets a page."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import subprocess
import sys

import pytest

import unichar_jax
import workshop


def public_modules() -> list[str]:
    """Every module of the package and of the workshop that no underscore hides."""
    roots = (unichar_jax, workshop)
    names = [m.name for r in roots for m in pkgutil.walk_packages(r.__path__, f"{r.__name__}.")]
    return [
        *(r.__name__ for r in roots),
        *(n for n in names if not any(part.startswith("_") for part in n.split("."))),
    ]


@pytest.mark.parametrize("name", public_modules())
def test_module_imports_and_says_what_it_is_for(name):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"


def test_the_modules_are_found():
    assert {"unichar_jax.models.kernels.chunked", "unichar_jax.cli.main"} <= set(public_modules())


@pytest.mark.slow
def test_the_reference_builds(tmp_path):
    if importlib.util.find_spec("pdoc") is None:
        pytest.skip("needs pdoc: pip install 'unichar-jax[docs]'")
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "--output-directory", str(tmp_path)]
    made = subprocess.run(
        [*command, "unichar_jax", "workshop"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert made.returncode == 0, made.stderr
    absent = [
        n for n in public_modules() if not tmp_path.joinpath(*n.split(".")).with_suffix(".html").is_file()
    ]
    assert not absent, made.stderr
