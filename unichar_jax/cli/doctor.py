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
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from unichar_jax.errors import UserError
from unichar_jax.parallel import distributed
from unichar_jax.parallel.distributed import HostsConfig

if TYPE_CHECKING:
    from unichar_jax.config.train import SFTConfig


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
    """Devices, and whether they compute."""
    import jax
    import jax.numpy as jnp

    found = jax.devices()
    kinds = sorted({d.device_kind for d in found})
    yield Finding("devices", f"{len(found)} x {', '.join(kinds)} ({jax.default_backend()})")
    yield Finding("processes", f"{jax.process_count()}, this is {jax.process_index()}")
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
    if (available := available_memory()) is not None:
        yield Finding(
            "available memory", f"{available:.0f} GiB", None if available > 3 else "close other programs"
        )
    yield Finding("cores", str(os.cpu_count()))


def available_memory() -> float | None:
    """GiB of this host's memory that programs may still take; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text()) if meminfo.is_file() else None
    return int(match[1]) / 2**20 if match else None


def shipped() -> Iterator[Finding]:
    """Presets and the mini base."""
    from unichar_jax.config import presets

    yield Finding("configurations", ", ".join(presets.available()))
    mini = presets.resource_dir("checkpoints") / "mini"
    there = (mini / "ema.safetensors").is_file()
    yield Finding(
        "mini base",
        "present" if there else "no weights",
        None if there else "python -m workshop.minimodel.pretrain makes them; without, runs start at random",
    )


def kernel() -> Iterator[Finding]:
    """The attention kernel of this machine, compared with the dense reference; on a GPU, what was chosen and why."""
    import jax

    from unichar_jax.models import kernels
    from unichar_jax.models.kernels import choice
    from unichar_jax.models.kernels.sharded import device_kind

    if jax.default_backend() == "gpu":
        choice.choose(choice.Case(28, 4, 128, 12_288, "bfloat16"))  # BAGEL's, if it was not tried before
    name, reason = kernels.choose(jax.default_backend())
    error = choice.deviation(kernels.KERNELS[name], choice.Case(4, 2, 128, 192, "float32"))
    yield Finding(
        "attention",
        f"{name}: {reason}; {1e-5 * error:.0e} from the dense reference",
        None if error <= 2 else "--compute.attention chunked, and please report it",
    )
    for known in choice.remembered().values():
        if known.device == device_kind():
            yield Finding("attention tried", str(known))


def experiment(config: str) -> Iterator[Finding]:
    """The configuration, its data's folders and first batch, and room for what it holds and writes."""
    from unichar_jax.checkpoint.remote import fetched
    from unichar_jax.config import presets
    from unichar_jax.config.train import SFTConfig
    from unichar_jax.data.check import check

    cfg = presets.load(SFTConfig, config)
    yield Finding("configuration", f"{config}: {cfg.steps} steps from {cfg.base}")
    try:
        folder = fetched(cfg.data.path)
        report = check(folder)
    except UserError as error:
        yield Finding("data", str(error), "give --data.path in the configuration a folder that is there")
        return
    yield Finding(
        "data",
        f"{cfg.data.path}: {len(report.errors)} errors, {len(report.notes)} notes",
        None if report.ok else f"unichar data check {cfg.data.path}",
    )
    yield from room(cfg)
    if report.ok:
        yield first_batch(cfg, folder)


def first_batch(cfg: SFTConfig, folder: Path) -> Finding:
    """Packs one row as training would; pictures that are to be drawn are not encoded."""
    import dataclasses

    import numpy as np

    from unichar_jax.data.loader import make_loader
    from unichar_jax.training.start import base_tokenizer, find_base

    try:
        source = find_base(cfg.base)
        model, tokenizer = source.cfg, base_tokenizer(cfg.base, source)
    except UserError as error:
        return Finding("base", str(error), "a start would end here, too")

    def blank(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, height, width, _ = pictures.shape
        tokens = height * width // model.pixels_per_latent**2
        zeros = np.zeros((n, tokens, model.latent_dim), np.float32)
        return zeros, zeros

    began = time.monotonic()
    data = dataclasses.replace(cfg.data, path=str(folder), cache_dir="", workers=0)
    try:
        loader = make_loader(data, model, tokenizer, blank)
        batch = next(loader)
    except UserError as error:
        return Finding("first batch", str(error), "mend that in the configuration or the data")
    used = [int((s.meta.segment != 0).sum()) for s in (batch.text, batch.vit, batch.latent)]
    return Finding(
        "first batch",
        f"text {used[0]}, vit {used[1]}, latent {used[2]} of {tuple(loader.capacities)} tokens in a row,"
        f" {int((batch.text.weight > 0).sum())} labelled; {time.monotonic() - began:.1f} s"
        + (f"; {len(loader.left_out)} samples are larger than a row" if loader.left_out else ""),
    )


def room(cfg: SFTConfig) -> Iterator[Finding]:
    """What the run's state and checkpoints take, against devices, disk and host memory."""
    import jax

    from unichar_jax.checkpoint.remote import is_remote
    from unichar_jax.cli.plan import sizes
    from unichar_jax.models import params
    from unichar_jax.parallel import mesh as mesh_lib
    from unichar_jax.plan.sft import abstract_run

    said: list[str] = []
    model = sizes(cfg.base, said.append)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    _, state, layout = abstract_run(cfg, model, mesh)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    here = held / mesh.size / 2**30
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0) / 2**30
    tight = bool(limit) and here > limit
    yield Finding(
        "state",
        f"{params.count(layout.module):,} parameters: {here:.1f} GiB on each of {mesh.size} devices"
        + (f" of {limit:.1f} GiB" if limit else "")
        + "".join(f" ({text})" for text in said),
        "more devices, or adapters; unichar plan tells the rest" if tight else None,
    )
    if limit == 0:
        memory = available_memory()
        if memory is not None and here * mesh.size > memory:
            yield Finding(
                "host memory", f"{memory:.0f} GiB for a state of {here * mesh.size:.0f}", "a smaller base"
            )
    if is_remote(cfg.run_dir):
        return
    place = Path(cfg.run_dir).absolute()
    while not place.exists():
        place = place.parent
    free, wanted = shutil.disk_usage(place).free / 2**30, (cfg.save.keep + 1) * held / 2**30
    yield Finding(
        "room for checkpoints",
        f"{free:.0f} GiB free at {place}; {cfg.save.keep} kept and one being written are {wanted:.1f} GiB",
        None if free > wanted else "another run_dir, or a smaller save.keep",
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
    findings = [*look_at_hosts(hosts), *versions(), *devices(), *kernel(), *host(Path(".")), *shipped()]
    if not distributed.is_leader():
        return 0  # one table is enough
    if config is not None:
        findings += [*experiment(config)]
    table = Table("", "found", "fix", box=None, header_style="dim")
    for finding in findings:
        mark = "[green]ok[/green]" if finding.fix is None else "[red]fix[/red]"
        table.add_row(f"{mark} {finding.what}", finding.found, finding.fix or "")
    console = Console()
    console.print(table)
    wrong = [f for f in findings if f.fix is not None]
    console.print("nothing to mend" if not wrong else f"{len(wrong)} to mend")
    return 1 if wrong else 0
