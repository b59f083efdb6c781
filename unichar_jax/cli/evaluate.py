"""``unichar evaluate RUN``: RoleScape-20's tasks, as a table, a sheet of pictures and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import tyro

from unichar_jax.cli.main import parses_itself
from unichar_jax.cli.train import use_compilation_cache

if TYPE_CHECKING:
    from unichar_jax.evaluation.suite import Progress


@contextmanager
def progress_bars() -> Iterator[Callable[[str], Progress]]:
    """Bars of evaluations: a line for each model in a terminal; in a log, as they stand at the end."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:

        def progress(label: str) -> Progress:
            line = bars.add_task(label, total=None)

            def tell(done: int, total: int, what: str) -> None:
                bars.update(line, completed=done, total=total, description=f"{label}: {what}")

            return tell

        yield progress


@parses_itself
def evaluate(args: list[str]) -> int:
    from rich.console import Console

    from unichar_jax.app.evaluate import Evaluation, run_evaluation
    from unichar_jax.evaluation import tables

    cfg = tyro.cli(Evaluation, args=args, prog="unichar evaluate")
    use_compilation_cache()
    console = Console()
    with progress_bars() as progress:
        found = run_evaluation(cfg, progress)
    if not found.results:
        console.print(
            f"share {cfg.shard} is kept in {found.folder}; when all are, the same command without --shard"
        )
        return 0
    tables.print_table(found.results, console)
    if len(found.results[-1].characters) > 1:
        tables.print_by_character(found.results[-1], console)
    for name, path in (("report", found.report), ("pictures", found.sheet), ("outputs", found.folder)):
        if path:
            console.print(f"{name}: {path}")
    return 0
