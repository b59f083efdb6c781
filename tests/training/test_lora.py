"""Training adapters: nothing else moves, no execution choice matters, and the run ends with a file of its own."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.golden import relative_l2
from tests.training.batches import CAPACITIES, random_batch
from unichar_jax.checkpoint import convert, lora, runs, store
from unichar_jax.checkpoint.weights import OrbaxWeights, orbax_item
from unichar_jax.config import presets
from unichar_jax.config.compute import REMAT_POLICIES, Compute, MeshConfig
from unichar_jax.config.model import model_preset
from unichar_jax.config.train import LoraConfig, SaveConfig, SFTConfig
from unichar_jax.data.tokenizer import write_debug_tokenizer
from unichar_jax.models import lora as model_lora
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel.mesh import make_mesh, put_batch
from unichar_jax.training import sft, start
from unichar_jax.training import state as state_lib
from unichar_jax.training import step as step_lib
from unichar_jax.training.optimizer import make_optimizer

CFG = model_preset("debug")
SFT = SFTConfig(
    trainable="lora",
    lora=LoraConfig(rank=2, alpha=4.0),
    compute=Compute(dtype="float32"),
    ce_chunk=16,
)


# -- the step ---------------------------------------------------------------------------------------


def _gradients(
    cfg: SFTConfig = SFT, mesh=None, remat: str = "none", dtype: str = "float32", frozen: str = "float32"
):
    """Loss and gradients of one step, from weights and adapters without a zero among them.

    Weights are numbers that ``dtype`` has; those that do not learn are kept in ``frozen``.
    """
    compute = Compute(dtype=dtype, remat=remat)
    declared = model_lora.add_lora(UnifiedModel(CFG, compute), cfg.lora.rank, cfg.lora.alpha)
    rng = np.random.default_rng(2)
    weights = jax.tree.map(
        lambda x: np.asarray((x + 0.02 * rng.standard_normal(x.shape, np.float32)).astype(dtype), np.float32),
        params.initialize(declared, 1),
    )
    declared = state_lib.frozen_in(frozen, declared, cfg.trainable)
    weights = jax.tree.map(lambda x, spec: x.astype(spec.dtype), weights, declared)
    weights = jax.device_put(weights, None if mesh is None else params.shardings(declared, mesh))
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    layout, state = state_lib.create(weights, declared, optimizer, trainable="lora", mesh=mesh)
    batch = put_batch(random_batch(CFG, 4), mesh)

    def step(state, batch):
        grads, terms = step_lib.gradients_of(layout, state, batch, cfg, CFG.autoencoder, 3)
        return grads, terms.ce + terms.mse

    with jax.default_matmul_precision("highest"):
        if mesh is None:
            return jax.jit(step)(state, batch)
        with jax.set_mesh(mesh):
            return jax.jit(step)(state, batch)


@pytest.fixture(scope="module")
def plain():
    return _gradients()


def _assert_same(got, expected) -> None:
    (g1, loss1), (g0, loss0) = got, expected
    assert float(loss1) == pytest.approx(float(loss0), rel=1e-6)
    assert g1.keys() == g0.keys()
    for name in g0:
        assert relative_l2(np.asarray(g1[name]), np.asarray(g0[name])) <= 1e-5, name


def test_only_adapters_have_gradients(plain) -> None:
    grads, _ = plain
    assert len(grads) == 2 * 2 * 7
    assert all(name.endswith(("lora_a", "lora_b")) for name in grads)
    assert all(np.abs(np.asarray(g)).max() > 0 for g in grads.values())


@pytest.mark.parametrize("remat", [r for r in REMAT_POLICIES if r != "none"])
def test_rematerialisation_changes_nothing(plain, remat: str) -> None:
    kinds = {m.kind for m in jax.devices()[0].addressable_memories()}
    if remat == "offload_inputs" and "pinned_host" not in kinds:
        pytest.skip(f"this device has no pinned host memory to offload to, only {sorted(kinds)}")
    _assert_same(_gradients(remat=remat), plain)


def test_offloading_keeps_layer_inputs_in_host_memory() -> None:
    """As traced; compilers of devices whose memory is the host's, such as CPUs, drop the transfers."""
    batch = random_batch(CFG, 1)

    def residuals(remat: str) -> set[str]:
        model = params.initialize(UnifiedModel(CFG, Compute(dtype="float32", remat=remat)), 0)

        def loss(model):
            latent, t = batch.latent, jnp.zeros(batch.latent.grid.shape)
            hidden, _ = model.forward(batch.text, batch.vit, latent.mean, t, latent.grid, latent.meta)
            return hidden.sum()

        return set(re.findall(r"f32<host>\[[\d,]+\]", str(jax.make_jaxpr(jax.grad(loss))(model))))

    layers, width, sizes = CFG.decoder.num_layers, CFG.decoder.hidden_size, CAPACITIES
    inputs = {f"f32<host>[{layers},1,{n},{width}]" for n in (sizes.text + sizes.vit, sizes.latent)}
    assert inputs <= residuals("offload_inputs")
    assert not residuals("full")


@pytest.mark.parametrize("sizes", [(1, 2, 1), (1, 2, 2)], ids=["fsdp", "fsdp-tensor"])
def test_sharding_is_invisible(plain, sizes) -> None:
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    _assert_same(_gradients(mesh=mesh), plain)


def test_both_sides_of_every_adapter_are_split() -> None:
    """At the preset's size, whole copies of one side alone would be gigabytes on every device."""
    mesh = make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])
    declared = model_lora.add_lora(UnifiedModel(CFG, Compute()), 4, 4.0)
    shapes = params.flat(params.abstract(declared, mesh))
    adapters = {n: s for n, s in shapes.items() if n.endswith(("lora_a", "lora_b"))}
    assert len(adapters) == 2 * 2 * 7
    assert all("fsdp" in tuple(s.sharding.spec) for s in adapters.values())


def test_frozen_weights_lose_nothing_in_the_dtype_of_their_use() -> None:
    wide, narrow = (_gradients(dtype="bfloat16", frozen=kept) for kept in ("float32", "bfloat16"))
    _assert_same(narrow, wide)


@pytest.mark.parametrize(
    ("trainable", "learns"),
    [
        ("lora", r".*\.lora_[ab]"),
        ("gen", r"decoder\.\w+\.gen\..*|time_embedder\..*|latent_.*"),
        ("all", ".*"),
    ],
)
def test_what_learns_is_float32_and_the_rest_is_not(trainable: str, learns: str) -> None:
    lora_config = LoraConfig(rank=2) if trainable == "lora" else LoraConfig()
    cfg = SFTConfig(trainable=trainable, lora=lora_config, compute=Compute(dtype="bfloat16"))
    dtypes = {name: spec.dtype for name, spec in params.named_leaves(start.declare(cfg, CFG))}
    learning = {name for name, dtype in dtypes.items() if dtype == np.float32}
    assert learning == {name for name in dtypes if re.fullmatch(learns, name)} != set()
    assert {dtypes[name] for name in dtypes.keys() - learning} <= {jnp.dtype(jnp.bfloat16)}


def test_accumulation_equals_the_large_batch(plain) -> None:
    _assert_same(_gradients(dataclasses.replace(SFT, accumulate=2)), plain)


# -- the run ----------------------------------------------------------------------------------------


def _write_base(folder: Path) -> Path:
    """A small model directory whose velocity is alive: a head of zeros would teach its expert nothing."""
    write_debug_tokenizer(folder / "tokenizer")
    model = params.initialize(UnifiedModel(CFG), 5)
    head = model.latent_out.kernel
    head[...] = jnp.asarray(np.random.default_rng(0).normal(size=head.shape, scale=0.3), jnp.float32)
    autoencoder = params.initialize(Autoencoder(CFG.autoencoder), 5)
    store.write_bagel(folder / "base", model, CFG, autoencoder, tokenizer_files_from=folder / "tokenizer")
    return folder / "base"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_base(tmp_path_factory.mktemp("lora-base"))


def _experiment(base: Path, root: Path, folder: Path, **fields) -> SFTConfig:
    """Three steps with adapters in some places of both experts, and an average of them."""
    cfg = presets.load(SFTConfig, "sft-debug")
    cfg = dataclasses.replace(
        cfg,
        base=str(base),
        data=dataclasses.replace(cfg.data, path=str(root), rows_per_device=1),
        run_dir=str(folder),
        steps=3,
        save=SaveConfig(every=3),
        trainable="lora",
        lora=LoraConfig(rank=2, alpha=4.0, targets=("q", "o", "down")),
    )
    return dataclasses.replace(cfg, **fields)


def _train(cfg: SFTConfig, devices: int = 1, **options) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        whole = sft.mesh_lib.make_mesh
        patch.setattr(sft.mesh_lib, "make_mesh", lambda cfg: whole(MeshConfig(), jax.devices()[:devices]))
        return sft.train(cfg, quiet=True, **options)


@pytest.fixture(scope="module")
def run(base: Path, _tiny_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora-run")
    root = shutil.copytree(_tiny_template, folder / "data")
    return _train(_experiment(base, root, folder / "run"))


def test_training_moves_adapters_and_nothing_else(run: Path, base: Path) -> None:
    """Stored weights are the initial ones, bit for bit; every adapter has left its start."""
    stored = _stored(runs.resolve(run))
    initial = store.unstack(UnifiedModel(CFG), store.load_model(base))
    for name, x in initial.items():
        assert np.array_equal(stored[name], np.asarray(x)), name
    adapters = lora.adapters_of(runs.resolve(run))
    assert len(adapters) == CFG.decoder.num_layers * 2 * 3 * 2
    moved = {n.split(".", 3)[3] for n, x in adapters.items() if n.endswith("lora_b") and np.any(x)}
    assert moved == {f"{e}.{t}.lora_b" for e in ("und", "gen") for t in ("q", "o", "down")}


def _stored(step: Path) -> dict[str, np.ndarray]:
    weights = OrbaxWeights(orbax_item(step, "model", "weights"))
    return dict(weights.read(list(weights.infos)))


def test_a_frozen_base_is_kept_and_saved_as_it_is_used(
    base: Path, _tiny_template: Path, tmp_path: Path
) -> None:
    """In bfloat16, read back bit by bit after two steps, and after a third on another mesh still the base."""
    root = shutil.copytree(_tiny_template, tmp_path / "data")
    cfg = _experiment(base, root, tmp_path / "run", steps=2, save=SaveConfig(every=1))
    cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, dtype="bfloat16"))
    before = _stored(runs.resolve(_train(cfg, verify=True)))
    after = _stored(runs.resolve(_train(dataclasses.replace(cfg, steps=3), devices=2)))
    initial = store.unstack(UnifiedModel(CFG), store.load_model(base, dtype=jnp.bfloat16))
    assert before.keys() == after.keys()
    for name, x in after.items():
        learned = name.endswith((".lora_a", ".lora_b"))
        assert x.dtype == (np.float32 if learned else jnp.bfloat16), name
        assert np.array_equal(x, before[name] if learned else initial[name]) != learned, name


def test_the_run_ends_with_a_file_of_its_own(run: Path, tmp_path: Path) -> None:
    """The averaged adapters, as inference takes them."""
    opened = lora.open_lora(run / lora.FOLDER, CFG)
    expected = lora.adapters_of(runs.resolve(run), "ema")
    assert opened.shapes.keys() == expected.keys()
    assert all(np.array_equal(opened.read(n), x) for n, x in expected.items())
    size = sum(f.stat().st_size for f in (run / lora.FOLDER).iterdir())
    whole = params.count(UnifiedModel(CFG)) * 4
    assert size < 0.25 * whole
    lora.export(run, tmp_path / "again")  # the same from the checkpoint
    for name in (lora.WEIGHTS_FILE, lora.CONFIG_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (run / lora.FOLDER / name).read_bytes()


def test_adapted_merged_and_exported_are_one_model(run: Path, base: Path, tmp_path: Path) -> None:
    start = store.load_model(base)
    adapted = model_lora.adapted(start, lora.load(run / lora.FOLDER, CFG))
    merged = store.load_model(runs.resolve(run), item="ema")
    step = runs.resolve(run)
    convert.execute(convert.plan(step, tmp_path / "bagel", item="ema"), verify=True)
    exported = store.load_model(tmp_path / "bagel")
    batch = random_batch(CFG, 1)

    @jax.jit
    def outputs(model):
        t = jnp.full(batch.latent.grid.shape, 0.5, jnp.float32)
        latent = batch.latent
        u, g = model.forward(batch.text, batch.vit, latent.mean, t, latent.grid, latent.meta)
        return model.logits(u), model.velocity(g)

    def compute32(model):
        model.compute = Compute(dtype="float32")
        return model

    with jax.default_matmul_precision("highest"):
        results = [outputs(compute32(m)) for m in (adapted, merged, exported, start)]
    for got in results[1:3]:
        for x, y in zip(got, results[0], strict=True):
            assert relative_l2(np.asarray(x), np.asarray(y)) <= 1e-5
    # And it is another model than the one that it started from.
    for x, y in zip(results[3], results[0], strict=True):
        assert relative_l2(np.asarray(x), np.asarray(y)) > 1e-4


def test_the_file_loads_around_a_base_on_another_mesh(run: Path, base: Path) -> None:
    start = store.load_model(base)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    split = jax.device_put(start, params.shardings(UnifiedModel(CFG), mesh))
    here = model_lora.adapted(start, lora.load(run / lora.FOLDER, CFG))
    there = model_lora.adapted(split, lora.load(run / lora.FOLDER, CFG, mesh=mesh))
    for (name, x), (_, y) in zip(params.named_leaves(here), params.named_leaves(there), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y)), name
        assert y.sharding.mesh.shape == mesh.shape, name
    sharding = params.flat(there)["decoder.layers.und.down.lora_a"].sharding
    assert tuple(sharding.spec) == (None, "tensor", "fsdp")
