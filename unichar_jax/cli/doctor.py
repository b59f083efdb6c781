"""``unichar doctor``: what would go wrong on this machine, and the fix. Reads, computes a little, writes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from unichar_jax.errors import UserError
from unichar_jax.parallel import distributed
from unichar_jax.parallel.distributed import HostsConfig


@dataclass(frozen=True)
class Finding:
    """One thing looked at: its name, what was found, and the fix if it is not right."""

    what: str
    found: str
    fix: str | None = None


def versions() -> Iterator[Finding]:
    """Every dependency against the range that this package asks for."""
    from packaging.requirements import Requirement

    yield Finding("Python", platform.python_version())
    for text in importlib.metadata.requires("unichar-jax") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            have = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, "absent", f"pip install '{text}'")
            continue
        fits = requirement.specifier.contains(have, prereleases=True)
        yield Finding(requirement.name, have, None if fits else f"pip install '{text}'")


def look_at_hosts(cfg: HostsConfig) -> Iterator[Finding]:
    """The other hosts: whether all are here with the same versions, and reach each other's devices."""
    began = time.monotonic()
    try:
        place = distributed.start(cfg, say=lambda text: print(text, file=sys.stderr, flush=True))
    except UserError as error:
        yield Finding("hosts", str(error), "mend that on the hosts it names, and start again on all of them")
        return
    if place.count == 1:
        yield Finding("hosts", f"this one ({place.found})")
        return
    met = time.monotonic()
    distributed.barrier("doctor")
    yield Finding(
        "hosts",
        f"{place.count} by {place.found}, same versions and source; met within {met - began:.1f} s, first"
        f" collective {time.monotonic() - met:.1f} s",
    )


def devices() -> Iterator[Finding]:
    """Devices, the attention kernel they get, and whether they compute."""
    import jax
    import jax.numpy as jnp

    from unichar_jax.models import kernels

    found = jax.devices()
    kinds = sorted({d.device_kind for d in found})
    yield Finding("devices", f"{len(found)} x {', '.join(kinds)} ({jax.default_backend()})")
    yield Finding("processes", f"{jax.process_count()}, this is {jax.process_index()}")
    name, reason = kernels.choose(jax.default_backend())
    yield Finding("attention", f"{name}: {reason}")
    x = jnp.ones((128, 128), jnp.bfloat16)
    right = float((x @ x).sum()) == 128.0**3
    yield Finding(
        "bfloat16 matmul", "right" if right else "wrong", None if right else "update the driver and jax"
    )


def host(folder: Path) -> Iterator[Finding]:
    """Memory and disk of this host."""
    free = shutil.disk_usage(folder).free / 2**30
    fix = (
        None
        if free > 5
        else "free some disk, or name another run_dir; a checkpoint is several times the model"
    )
    yield Finding("free disk", f"{free:.0f} GiB at {folder.resolve()}", fix)
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())
        available = int(match.group(1)) / 2**20 if match else 0.0
        yield Finding(
            "available memory", f"{available:.0f} GiB", None if available > 3 else "close other programs"
        )
    yield Finding("cores", str(os.cpu_count()))


def shipped() -> Iterator[Finding]:
    """Presets and the mini base."""
    from unichar_jax.config import presets

    yield Finding("configurations", ", ".join(presets.available()))
    mini = presets.resource_dir("checkpoints") / "mini"
    there = (mini / "ema.safetensors").is_file()
    yield Finding(
        "mini base",
        "present" if there else "no weights",
        None
        if there
        else "python -m unichar_jax.training.pretrain makes them; without, runs start at random",
    )


def experiment(config: str) -> Iterator[Finding]:
    """The configuration, and its data's folders."""
    from unichar_jax.config import presets
    from unichar_jax.config.train import SFTConfig
    from unichar_jax.data.check import check

    cfg = presets.load(SFTConfig, config)
    yield Finding("configuration", f"{config}: {cfg.steps} steps from {cfg.base}")
    report = check(Path(cfg.data.path))
    yield Finding(
        "data",
        f"{cfg.data.path}: {len(report.errors)} errors, {len(report.notes)} notes",
        None if report.ok else f"unichar data check {cfg.data.path}",
    )


def doctor(
    config: Annotated[str | None, tyro.conf.Positional] = None,
    *,
    hosts: HostsConfig = HostsConfig(),
) -> int:
    """Says what would go wrong on this machine, and the fix; exit code 1 if anything would.

    Started on all hosts of a pod (``srun unichar doctor``), it looks at how they reach each other too.

    Args:
      config: also look at this experiment and its data.
      hosts: how to find the other hosts.
    """
    findings = [*look_at_hosts(hosts), *versions(), *devices(), *host(Path(".")), *shipped()]
    if not distributed.is_leader():
        return 0  # one table is enough
    if config is not None:
        findings += experiment(config)
    table = Table("", "found", "fix", box=None, header_style="dim")
    for finding in findings:
        mark = "[green]ok[/green]" if finding.fix is None else "[red]fix[/red]"
        table.add_row(f"{mark} {finding.what}", finding.found, finding.fix or "")
    console = Console()
    console.print(table)
    wrong = [f for f in findings if f.fix is not None]
    console.print("nothing to mend" if not wrong else f"{len(wrong)} to mend")
    return 1 if wrong else 0
