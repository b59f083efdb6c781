"""No document shows a command, an option, a setting or a link that does not work, and the checker would notice."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import unichar_jax
from tests.docs import checker

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "launch/*.md", "checkpoints/*.md", "workshop/*.md")
    for path in checker.REPOSITORY.glob(pattern)
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(checker.REPOSITORY)))
def test_document(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = checker.problems(document)
    assert not found, "\n" + "\n".join(map(str, found))


def test_the_documents_are_found():
    names = {p.name for p in DOCUMENTS}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "architecture.md", "customise.md"} <= names


GOOD = """\
```bash
unichar sft sft-mini --steps 3 --data.path data   # a comment
unichar grpo mine.toml --rounds 2
unichar chat runs/sft-mini --no-pictures && unichar draw runs/sft-mini "Pip in the snow" -n 8
unichar plan sft-bagel-7b --topology v5e:8x8
unichar bench sft-mini --steps 3 --compute.remat full
unichar convert SRC DST --verify
unichar data check data
X=1 ./launch/train.sh --smoke sft sft-mini \\
  --steps 4
./launch/quickstart.sh --rounds 0
python -m workshop.minimodel.pretrain --records 3
python -m workshop.study report docs/study
python scripts/bench_layer.py --hidden 8
pip install 'unichar-jax[serve]' > log
```

```toml mine.toml
rounds = 5
[rollout]
height = 96
```

[a heading](#there)

## There
"""


def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> list[checker.Problem]:
    monkeypatch.chdir(tmp_path)
    document = tmp_path / "document.md"
    document.write_text(text)
    return checker.problems(document)


def test_right_commands_pass(tmp_path, monkeypatch):
    assert written(tmp_path, monkeypatch, GOOD) == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("unichar sft sft-mni", "did you mean 'sft-mini'"),
        ("unichar sft sft-mini --stps 3", "stps"),
        ("unichar sft sft-mini --steps three", "three"),
        ("unichar sft sft-mini --steps 0", "expected a positive number"),
        ("unichar grpo absent.toml", "file not found"),
        ("unichar traim sft-mini", "unknown"),
        ("unichar chat", "required"),
        ("unichar draw runs/x 'a' --stpes 3", "stpes"),
        ("unichar data chek data", "chek"),
        ("unichar data check", "required"),
        ("unichar convert SRC", "expected 2 paths"),
        ("unichar plan sft-bagel-7b --topology v9:8x8", "chip 'v9' is unknown"),
        ("unichar plan sft-bagel-7b", "which hardware"),
        ("unichar bench sft-bagel-7b --topology v9:8x8", "chip 'v9' is unknown"),
        ("unichar bench sft-mini --stps 3", "stps"),
        ("unichar evaluate", "required"),
        ("unichar quickstart --rouns 1", "rouns"),
        ("cd x && unichar sft sft-mni", "did you mean"),
        ("./launch/absent.sh", "not there"),
        ("./launch/train.sh --smok sft sft-mini", "unknown"),
        ("./launch/train.sh sft sft-mini --stps 3", "stps"),
        ("./launch/quickstart.sh --dta x", "dta"),
        ("./launch/test.sh --everything", "does not take"),
        ("python -m workshop.minimodel.pretrain --recods 3", "recods"),
        ("python -m workshop.study reprt", "reprt"),
        ("python scripts/absent.py", "not there"),
        ("python scripts/bench_layer.py --hiden 8", "hiden"),
        ("pip install 'unichar-jax[sreve]'", "sreve"),
        ("unicar chat runs/x", "no program"),
    ],
)
def test_wrong_commands_are_noticed(line, why, tmp_path, monkeypatch):
    (problem,) = written(tmp_path, monkeypatch, f"# Title\n\n```bash\n{line}\n```\n")
    assert problem.line == 4
    assert why in problem.why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[text](absent.md)", "not there"),
        ("![picture](absent.png)", "not there"),
        ("[text](#nowhere)", "no such heading"),
        ("Look at /home/somebody/models.", "path of one machine"),
        ("```toml\nstesp = 3\n```", "field 'stesp' is unknown"),
        ("Try `unichar annotat` now.", "no command 'annotat'"),
        ("```\nunichar convrt  SRC DST\n```", "no command 'convrt'"),
    ],
)
def test_other_mistakes_are_noticed(text, why, tmp_path, monkeypatch):
    (problem,) = written(tmp_path, monkeypatch, text)
    assert why in problem.why


def test_every_figure_of_performance_is_marked():
    rows = re.findall(
        r"^\|(?!---| what).*\| (.*?) \|$",
        (checker.REPOSITORY / "docs/performance.md").read_text("utf-8"),
        re.MULTILINE,
    )
    assert len(rows) > 5
    assert set(rows) <= {"measured", "compiled", "forecast"}


def test_versions_agree():
    project = tomllib.loads((checker.REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    citation = (checker.REPOSITORY / "CITATION.cff").read_text("utf-8")
    newest = re.search(r"^## (\S+)", (checker.REPOSITORY / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    assert {project["version"], unichar_jax.__version__, newest[1]} == {project["version"]}
    assert f"\nversion: {project['version']}\n" in citation
