"""The GPU kernel compiled for a described H100, without one: registers, spills, memory, and which kernels run."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unichar_jax.config.compute import MeshConfig
from unichar_jax.models.kernels.flash import Flash
from unichar_jax.models.streams import TokenMeta
from unichar_jax.parallel.mesh import make_mesh
from unichar_jax.plan.topology import Topology


def assembler() -> Path | None:
    """``ptxas`` of the wheel nvidia-cuda-nvcc."""
    cuda = importlib.util.find_spec("nvidia")
    places = (
        [Path(p) / "cu13" / "bin" / "ptxas" for p in (cuda.submodule_search_locations or [])] if cuda else []
    )
    return next((p for p in places if p.is_file()), None)


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or assembler() is None,
    reason="needs the CUDA compiler, which runs on a CPU host: pip install 'unichar-jax[gpu-compiler]'",
)

ROW, TOWER = (12_288, 28, 4, 128), (5_120, 16, 16, 72)


@functools.cache
def mesh():
    return make_mesh(MeshConfig(), Topology.parse("h100:1x1x1").devices())


def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh(), PartitionSpec()))


def attention(length: int, heads: int, groups: int, d: int, dtype=jnp.bfloat16, cached: int = 0):
    """Forward and backward of the kernel, and its arguments; ``cached`` keys come before those of the queries."""
    meta = TokenMeta(*[shape(1, length, dtype=jnp.int32)] * 5)
    keys = TokenMeta(*[shape(1, length + cached, dtype=jnp.int32)] * 5)
    q, k = shape(1, length, heads, d, dtype=dtype), shape(1, length + cached, groups, d, dtype=dtype)

    def both(meta, keys, q, k, v, g):
        flash = Flash()
        out, backward = jax.vjp(
            functools.partial(flash.run, flash.prepare(meta, keys if cached else meta)), q, k, v
        )
        return out, backward(g)

    return both, (meta, keys, q, k, k, q)


def compiled(f, arguments, folder: Path | None = None):
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True} if folder else None
    with jax.set_mesh(mesh()):
        return jax.jit(f).lower(*arguments).compile(compiler_options=options)


def registers(folder: Path) -> dict[str, tuple[int, int]]:
    """Of each kernel: registers of a thread, and bytes that it spills (stores and loads)."""
    found = {}
    for ptx in folder.glob("*.ptx"):
        if ".entry flash_" not in ptx.read_text():
            continue
        command = [assembler(), "-v", "-arch=sm_90a", ptx, "-o", folder / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        pattern = (
            r"'(flash_\w+)' for .*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
        )
        for name, stores, loads, used in re.findall(pattern, said, re.DOTALL):
            found[name] = int(used), int(stores) + int(loads)
    return found


@pytest.mark.parametrize(
    ("name", "sizes", "kinds"),
    [
        ("packed row", dict(zip(("length", "heads", "groups", "d"), ROW, strict=True)), {}),
        ("tower", dict(zip(("length", "heads", "groups", "d"), TOWER, strict=True)), {}),
        pytest.param(
            "drawing", dict(length=4_098, heads=28, groups=4, d=128, cached=640), {}, marks=pytest.mark.slow
        ),
        pytest.param(
            "float32",
            dict(length=1_024, heads=4, groups=2, d=64),
            {"dtype": jnp.float32},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_nothing_spills(name, sizes, kinds, tmp_path):
    compiled(*attention(**sizes, **kinds), folder=tmp_path)
    found = registers(tmp_path)
    print(f"{name}: (registers, bytes spilled) {found}")
    assert set(found) == {"flash_forward", "flash_dq", "flash_dkv"}
    assert {spilled for _, spilled in found.values()} == {0}


def test_memory_grows_with_length_not_its_square():
    def temporary(length: int) -> int:
        return compiled(*attention(length, 2, 1, 128)).memory_analysis().temp_size_in_bytes

    assert temporary(32_768) < 2.2 * temporary(16_384) < 0.4 * 16_384**2


def test_layers_share_what_was_prepared_and_keep_what_the_backward_pass_wants():
    """In a scan over layers with rematerialisation: each kernel once, and what finds the walks outside the loops."""
    length, width = 2_048, 256
    meta = TokenMeta(*[shape(1, length, dtype=jnp.int32)] * 5)

    def loss(x, weights, meta):
        flash = Flash()
        data = flash.prepare(meta, meta)

        def layer(x, w):
            q = (x @ w).reshape(1, length, 2, 128)
            return x + flash.run(data, q, q, q).reshape(x.shape), None

        policy = jax.checkpoint_policies.save_only_these_names("attention_out")
        return jnp.square(
            jax.lax.scan(jax.checkpoint(layer, policy=policy), x, weights)[0].astype(jnp.float32)
        ).sum()

    arguments = shape(1, length, width), shape(4, width, width), meta
    text = compiled(jax.grad(loss, argnums=(0, 1)), arguments).as_text()
    calls = re.findall(r'custom-call\(.*?custom_call_target="__gpu\$xla\.gpu\.triton".*?(flash_\w+)', text)
    assert sorted(calls) == ["flash_dkv", "flash_dq", "flash_forward"]
    computation, sorts = "", []
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = start[0]
        if (
            re.search(r" fusion\(.*kind=kCustom.*sort|= .*\bsort\(", line)
            and "fused_computation" not in computation
        ):
            sorts.append(computation)
    assert sorts and all(s.startswith("ENTRY") for s in sorts), sorts
