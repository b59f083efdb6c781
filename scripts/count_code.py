"""Counts lines of code: without blanks, comments and docstrings, by top-level folder of a package and in all.

    python scripts/count_code.py [FOLDER]

A line counts if a token of the program stands on it, or a string goes over it. A docstring is any string that stands
by itself, those under fields and constants too.
"""

from __future__ import annotations

import argparse
import ast
import collections
import io
import tokenize
from pathlib import Path

NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def code_lines(source: str) -> int:
    """How many lines of a file's text are code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        text = node.value if isinstance(node, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            lines.difference_update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return len(lines)


def count(folder: Path) -> dict[str, int]:
    """Lines of code by what stands at the top of ``folder``, the largest first; files there are ``.``."""
    found: collections.Counter[str] = collections.Counter()
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder).parts
        found[inside[0] if len(inside) > 1 else "."] += code_lines(path.read_text("utf-8"))
    return dict(found.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1] / "unichar_jax")
    found = count(parser.parse_args().folder)
    for name, lines in found.items():
        print(f"{name:12} {lines:7,}")
    print(f"{'in all':12} {sum(found.values()):7,}")


if __name__ == "__main__":
    main()
