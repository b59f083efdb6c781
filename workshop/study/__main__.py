"""The ablation study of the mini world: fill a folder with results, then report what they show.

    python -m workshop.study run --out runs/study --characters Pip Luna --seeds 0 1 2 --minutes 60
    python -m workshop.study report runs/study --to docs/study

``run`` goes on where it was; ``report`` needs saved results only, and reports what is there. What another machine or
another day adds is joined to what was reported:

    python -m workshop.study report docs/study runs/more --to docs/study
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from unichar_jax.errors import UserError
from workshop.study import report, work
from workshop.study.design import Study


@dataclass(frozen=True)
class Report:
    """Writes the page, its numbers and a sheet of pictures, from saved results."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """The study's folder, or that of an earlier report; several are joined."""
    to: Path = Path("docs/study")
    """Gets the files."""


Command = Annotated[Study, tyro.conf.subcommand("run")] | Annotated[Report, tyro.conf.subcommand("report")]


def main(args: Sequence[str] | None = None) -> int:
    chosen: Study | Report = tyro.cli(Command, args=args, description=__doc__)  # type: ignore[arg-type]
    try:
        if isinstance(chosen, Study):
            print(work.run(chosen))
        else:
            print(report.write_report(chosen.folders, chosen.to))
    except UserError as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("study: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
