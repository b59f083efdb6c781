"""What is released: a source archive, and a wheel that works outside the checkout."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def files(*folders: str) -> set[str]:
    """Files of the checkout that git does not ignore, in these folders."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()}


@pytest.fixture(scope="module")
def checkout() -> set[str]:
    """Everything to release, listed before it is."""
    return files("unichar_jax", "workshop", "configs", "checkpoints", "launch", "scripts", "tests", "docs")


@pytest.fixture(scope="module")
def released(checkout: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the archives that ``python -m build`` makes: the source, and from it the wheel."""
    for tool in ("build", "hatchling"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"needs {tool}: pip install 'unichar-jax[test]'")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(released: Path) -> Path:
    (path,) = released.glob("*.whl")
    return path


def in_wheel(names: set[str]) -> set[str]:
    """Where the wheel has the files of the checkout that belong in it."""
    beside = {f"unichar_jax/_{name}" for name in names if name.startswith(("configs/", "checkpoints/"))}
    return beside | {name for name in names if name.startswith("unichar_jax/")}


def test_the_wheel_holds_what_it_needs_and_nothing_else(wheel, checkout):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    assert in_wheel(checkout) - shipped == set()
    assert shipped - in_wheel(files("unichar_jax", "configs", "checkpoints")) == set()
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    # Parts that are no Python, one of each kind, by name: the list above would follow a mistake of git's.
    for part in ("app/html/page.html", "app/web/static/app.js", "_configs/sft-mini.toml"):
        assert f"unichar_jax/{part}" in names
    assert {
        "unichar_jax/_checkpoints/mini/ae.safetensors",
        "unichar_jax/_checkpoints/mini/tokenizer.json",
    } <= names


def test_the_source_archive_can_be_tested_and_read(released, checkout):
    (path,) = released.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert checkout - names == set()
    assert {
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "CITATION.cff",
        "LICENSE",
        "constraints.txt",
    } <= names


def test_the_metadata_is_what_pyproject_says(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        assert any(n.endswith("/licenses/LICENSE") for n in archive.namelist())
    assert (metadata["Name"], metadata["License-Expression"]) == ("unichar-jax", "Apache-2.0")
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"tpu", "cuda", "serve", "docs", "test"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata.get_payload().startswith("# UniChar-JAX")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a clean environment, outside the checkout, with the wheel and the dependencies here."""
    home = tmp_path_factory.mktemp("clean")
    environment = home / "venv"
    venv.create(environment)
    programs = environment / "bin"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(programs / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # The dependencies of this environment, without its .pth files: an editable install does not come along.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return programs


def call(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_command_works_outside_the_checkout(installed, tmp_path):
    shown = call(tmp_path, str(installed / "unichar"), "--help")
    assert shown.returncode == 0, shown.stderr
    assert "usage: unichar COMMAND" in shown.stdout
    refused = call(tmp_path, str(installed / "unichar"), "sft", "sft-mni")
    assert refused.returncode == 1
    assert "did you mean 'sft-mini'" in refused.stderr


LOOK = """
import json, pathlib
import unichar_jax
from unichar_jax.app import report
from unichar_jax.checkpoint import store
from unichar_jax.config import presets
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.train import SFTConfig
from unichar_jax.data.tokenizer import load_tokenizer

kinds = {"sft": SFTConfig, "grpo": GRPOConfig}
loaded = [presets.load(kinds[name.partition("-")[0]], name) for name in presets.available()]
mini = presets.resource_dir("checkpoints") / "mini"
model = store.load_config(mini)
print(json.dumps({
    "package": unichar_jax.__file__,
    "presets": len(loaded),
    "vocabulary": load_tokenizer(mini, model).vocab_size,
    "expected": model.decoder.vocab_size,
    "autoencoder": bool(store.load_autoencoder(mini)),
}))
"""


def test_presets_and_the_mini_model_are_found_outside_the_checkout(installed, tmp_path):
    asked = call(tmp_path, str(installed / "python"), "-c", LOOK)
    assert asked.returncode == 0, asked.stderr
    found = json.loads(asked.stdout.splitlines()[-1])
    assert Path(found["package"]).is_relative_to(installed.parent)
    assert found["presets"] == len(list((REPOSITORY / "configs").glob("*.toml")))
    assert found["vocabulary"] == found["expected"]
    assert found["autoencoder"]
