"""``unichar quickstart``."""

from __future__ import annotations

import tyro

from unichar_jax.cli.evaluate import progress_bars
from unichar_jax.cli.main import parses_itself
from unichar_jax.cli.train import use_compilation_cache


@parses_itself
def main(args: list[str]) -> int:
    from unichar_jax.app.quickstart import Quickstart, run

    cfg = tyro.cli(Quickstart, args=args, prog="unichar quickstart")
    use_compilation_cache()
    with progress_bars() as progress:
        run(cfg, progress)
    return 0
