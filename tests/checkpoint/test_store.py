"""Models load from either kind of directory, from a training step, and onto a mesh, to the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.checkpoint import convert, store, table, writing
from unichar_jax.data.tokenizer import load_tokenizer
from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.unified import UnifiedModel

from .conftest import REPOSITORY, SPECIAL, special_ids, tensors_of, write_tokenizer


def assert_equal_trees(a, b) -> None:
    left, right = params.flat(a), params.flat(b)
    assert left.keys() == right.keys()
    for name, x in left.items():
        assert x.dtype == right[name].dtype, name
        assert np.asarray(x).tobytes() == np.asarray(right[name]).tobytes(), name


def test_bagel_directory_loads_stacked(bagel: Path) -> None:
    model = store.load_model(bagel)
    tensors = tensors_of(bagel / "ema.safetensors")
    kernel = np.asarray(model.decoder.layers.gen.q.kernel[...])
    for i in range(kernel.shape[0]):
        name = f"language_model.model.layers.{i}.self_attn.q_proj_moe_gen.weight"
        np.testing.assert_array_equal(kernel[i], tensors[name].T)
    autoencoder = store.load_autoencoder(bagel)
    conv = tensors_of(bagel / "ae.safetensors")["encoder.conv_in.weight"]
    np.testing.assert_array_equal(autoencoder.encoder.conv_in.kernel[...], conv.transpose(2, 3, 1, 0))


def test_both_kinds_hold_the_same(bagel: Path, tmp_path: Path) -> None:
    cfg = store.load_config(bagel)
    model, autoencoder = store.load_model(bagel), store.load_autoencoder(bagel)
    convert.convert(bagel, tmp_path / "orbax")
    store.write_bagel(tmp_path / "torch", model, cfg, autoencoder, tokenizer_files_from=bagel)
    for folder in (tmp_path / "orbax", tmp_path / "torch"):
        assert store.load_config(folder) == cfg
        assert_equal_trees(store.load_model(folder), model)
        assert_equal_trees(store.load_autoencoder(folder), autoencoder)
        assert load_tokenizer(folder).special == cfg.special_tokens
    for name in ("ema.safetensors", "ae.safetensors"):
        before, after = tensors_of(bagel / name), tensors_of(tmp_path / "torch" / name)
        assert before.keys() == after.keys()
        assert all(x.tobytes() == after[n].tobytes() for n, x in before.items())


def test_loaded_arrays_outlive_the_file(bagel: Path) -> None:
    model = store.load_model(bagel)
    before = np.array(model.embed.embedding[...])
    with (bagel / "ema.safetensors").open("r+b") as f:
        f.seek(-before.nbytes * 8, os.SEEK_END)
        f.write(bytes(before.nbytes * 8))
    np.testing.assert_array_equal(model.embed.embedding[...], before)


@pytest.mark.parametrize("kind", ["torch", "orbax"])
def test_dtype_casts_the_model(bagel: Path, tmp_path: Path, kind: str) -> None:
    folder, exact = bagel, store.load_model(bagel)
    if kind == "orbax":
        folder = tmp_path / "orbax"
        convert.convert(bagel, folder)
    model = store.load_model(folder, dtype=jnp.bfloat16)
    assert_equal_trees(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))


def test_training_step_is_a_model(bagel: Path, tmp_path: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    cfg, model = store.load_config(bagel), store.load_model(bagel)
    average = jax.tree.map(lambda x: x * 0.5, model)
    run = tmp_path / "run"
    run.mkdir()
    writing.write_companions(run, cfg, bagel, bagel)
    declared = UnifiedModel(cfg)
    step = run / "checkpoints" / "10"
    items = {"weights": store.unstack(declared, model), "ema": store.unstack(declared, average)}
    ocp.save_checkpointables(step, items | {"optimizer": {"count": np.zeros(3)}})
    assert store.load_config(step) == cfg
    assert_equal_trees(store.load_model(step), model)
    assert_equal_trees(store.load_model(step, item="ema"), average)
    with pytest.raises(UserError, match="other"):
        store.load_model(step, item="other")


def test_stack_and_unstack_are_inverse_under_jit(bagel: Path) -> None:
    cfg, model = store.load_config(bagel), store.load_model(bagel)
    declared = UnifiedModel(cfg)
    flat = jax.jit(lambda m: store.unstack(declared, m))(model)
    assert flat.keys() == {e.ours for e in table.model_table(cfg)}
    target = store.flat_abstract(declared)
    assert {n: s.shape for n, s in target.items()} == {n: x.shape for n, x in flat.items()}
    assert_equal_trees(jax.jit(lambda f: store.stack_flat(declared, f))(flat), model)


ON_A_MESH = """
import sys
import jax, numpy as np
from unichar_jax.checkpoint import store
from unichar_jax.models import params
from unichar_jax.config.compute import MeshConfig
from unichar_jax.parallel.mesh import make_mesh
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
torch, orbax = sys.argv[1:]
whole = params.flat(store.load_model(torch))
for folder in (torch, orbax):
    split = params.flat(store.load_model(folder, mesh=mesh))
    for name, x in split.items():
        assert np.asarray(x).tobytes() == np.asarray(whole[name]).tobytes(), name
    kernel = split["decoder.layers.und.gate.kernel"]
    assert len(kernel.sharding.device_set) == 4, kernel.sharding
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
print("ok")
"""


def test_loads_onto_a_mesh(bagel: Path, tmp_path: Path) -> None:
    convert.convert(bagel, tmp_path / "orbax")
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, bagel, tmp_path / "orbax"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "ok", done.stderr


def test_missing_config_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no llm_config\.json here"):
        store.load_config(tmp_path)


def test_tokenizer_of_another_model_is_refused(bagel: Path) -> None:
    write_tokenizer(bagel, SPECIAL[::-1])
    first, *_, last = special_ids(bagel)
    with pytest.raises(UserError, match=rf"bos={last}.*expects .*bos={first}"):
        load_tokenizer(bagel, store.load_config(bagel))


def test_tokenizer_from_vocabulary_and_merges(bagel: Path) -> None:
    """BAGEL's own download: ``vocab.json`` and ``merges.txt`` are enough."""
    vocabulary = json.loads((bagel / "tokenizer.json").read_text())["model"]["vocab"]
    (bagel / "vocab.json").write_text(json.dumps(vocabulary))
    (bagel / "merges.txt").write_text("#version: 0.2\n")
    (bagel / "tokenizer.json").unlink()
    (bagel / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(bagel)
    assert tokenizer.encode("".join(SPECIAL)) == list(special_ids(bagel))
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"


def test_save_leaves_an_existing_directory_alone(bagel: Path, tmp_path: Path) -> None:
    cfg, model = store.load_config(bagel), store.load_model(bagel)
    target = tmp_path / "taken"
    target.mkdir()
    (target / "keep").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        store.write_bagel(target, model, cfg)
    assert [p.name for p in target.iterdir()] == ["keep"]


def test_damaged_orbax_item(bagel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "orbax"
    convert.convert(bagel, folder)
    for data in (folder / "model").rglob("d"):
        shutil.rmtree(data)
    with pytest.raises(UserError, match=r"orbax/model: cannot be read"):
        store.load_model(folder)
    assert isinstance(store.load_autoencoder(folder), Autoencoder)
