"""``import unichar_jax`` is light, and the names that docs/python.md uses are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import unichar_jax

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, unichar_jax; print({'jax', 'numpy', 'transformers', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_name_is_there_and_listed():
    for name in unichar_jax.PUBLIC:
        assert getattr(unichar_jax, name) is not None
        assert name in dir(unichar_jax)
    with pytest.raises(AttributeError, match="no attribute 'roleplay'"):
        _ = unichar_jax.roleplay


def test_the_page_uses_public_names_only():
    example = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert example
    compile(example.group(1), str(PAGE), "exec")
    used = set(re.findall(r"\bunichar\.(\w+)", example.group(1)))
    assert used and used <= set(unichar_jax.PUBLIC)
