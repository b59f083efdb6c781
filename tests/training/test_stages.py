"""Adapters of a second stage stand on the first's: another base is an error, and one folder of both is exact."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from tests.checkpoint.conftest import tensors_of
from unichar_jax.app.engines import load_engine
from unichar_jax.checkpoint import convert, footing, lora, low_rank, peft_names, runs, stages, store
from unichar_jax.checkpoint.weights import OrbaxWeights, orbax_item
from unichar_jax.cli.main import main
from unichar_jax.config.train import LoraConfig
from unichar_jax.errors import UserError
from unichar_jax.models import params
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel.mesh import MeshConfig, make_mesh

from .test_lora import CFG, _experiment, _train, _write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_base(tmp_path_factory.mktemp("stages-base"))


@pytest.fixture(scope="module")
def two(base: Path, _tiny_template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs, one on the other, with adapters of other ranks in other places."""
    folder = tmp_path_factory.mktemp("two-stages")
    root = shutil.copytree(_tiny_template, folder / "data")
    first = _train(_experiment(base, root, folder / "first"))
    second = _experiment(first, root, folder / "second")
    rank = LoraConfig(rank=3, alpha=6.0, experts=("gen",), targets=("q", "gate"))
    return first, _train(dataclasses.replace(second, lora=rank))


def merged(model: Path, dst: Path, *adapters: Path) -> dict[str, np.ndarray]:
    """Kernels of a model with adapters merged in one after the other."""
    for i, folder in enumerate(adapters):
        convert.execute(convert.plan(model, dst.with_name(f"{dst.name}-{i}"), adapters=folder))
        model = dst.with_name(f"{dst.name}-{i}")
    flat = store.unstack(UnifiedModel(CFG), store.load_model(model, item=runs.weights_item(model)))
    return {n: np.asarray(x, np.float64) for n, x in flat.items()}


def test_the_second_stage_on_the_plain_base_is_an_error(two, base: Path, tmp_path: Path) -> None:
    first, second = two
    message = r"these adapters stand on '.*first.*', and the weights given are others.*--adapters-of RUN OUT"
    with pytest.raises(UserError, match=message):
        convert.plan(base, tmp_path / "x", adapters=second / lora.FOLDER)
    with pytest.raises(UserError, match=message):
        load_engine(base, loras={"nova": second / lora.FOLDER})
    assert main(["convert", "--merge", str(second / lora.FOLDER), str(base), str(tmp_path / "x")]) == 1
    with load_engine(base, loras={"nova": first / lora.FOLDER}) as engine:  # the first stage is at home there
        assert "nova" in engine.models
        with pytest.raises(UserError, match=message):
            engine.add_character("other", second / lora.FOLDER)
        assert "other" not in engine.models


def test_the_first_stage_is_known_in_every_form(two, base: Path, tmp_path: Path) -> None:
    """As a run, merged and exported in any dtype, sharded over a mesh; and it is not the plain base in any."""
    first, second = two
    ours = lora.open_lora(second / lora.FOLDER, CFG)
    for dtype in ("float32", "bfloat16", "float16"):
        for source, same in ((first, True), (base, False)):
            folder = tmp_path / f"{source.name}-{dtype}"
            step = runs.resolve(source)
            convert.convert(step, folder, dtype=dtype, item=runs.weights_item(step))
            plan = convert.plan(folder, tmp_path / "x")
            for found in (
                footing.of_weights(plan.parts[0].weights, CFG),
                footing.of_arrays(params.flat(store.load_model(folder)), CFG),
            ):
                assert (ours.footing.differences(found) == 0) == same, (dtype, source.name)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    whole = params.flat(store.load_model(runs.resolve(first), item="ema"))
    split = params.flat(store.load_model(runs.resolve(first), item="ema", mesh=mesh))
    a, b = (footing.of_arrays(x, CFG) for x in (whole, split))
    np.testing.assert_allclose(a.values, b.values, rtol=0, atol=1e-8)  # merged in another order
    assert ours.footing.differences(b) == 0


def test_both_stages_in_one_folder_are_exact(two, base: Path, tmp_path: Path) -> None:
    first, second = two
    assert main(["convert", "--adapters-of", str(second), str(tmp_path / "both")]) == 0
    opened = lora.open_lora(tmp_path / "both", CFG)
    assert opened.base == base.name
    assert opened.places == {
        **{f"{e}.{t}": 5 for e in ("und", "gen") for t in ("q", "o", "down")},
        "gen.gate": 5,
    }
    at_once = merged(base, tmp_path / "once", tmp_path / "both")
    in_turn = merged(base, tmp_path / "turn", first / lora.FOLDER, second / lora.FOLDER)
    plain, trained = merged(base, tmp_path / "x"), merged(runs.resolve(second), tmp_path / "x")
    for name, x in at_once.items():
        np.testing.assert_allclose(x, in_turn[name], rtol=0, atol=1e-7)
        np.testing.assert_allclose(x, trained[name], rtol=0, atol=1e-7)
    for place in ("und.q", "gen.q", "gen.gate"):
        assert (
            np.abs(
                at_once[f"decoder.layers.0.{place}.kernel"] - plain[f"decoder.layers.0.{place}.kernel"]
            ).max()
            > 1e-6
        )
    with pytest.raises(UserError, match="these adapters stand on"):  # and not on the first stage
        convert.plan(runs.resolve(first), tmp_path / "y", adapters=tmp_path / "both")


def test_one_stage_is_its_own_folder(two, tmp_path: Path) -> None:
    first, _ = two
    assert stages.export(first, tmp_path / "one") == 1
    a, b = (tensors_of(folder / lora.WEIGHTS_FILE) for folder in (tmp_path / "one", first / lora.FOLDER))
    assert a.keys() == b.keys() and all(np.array_equal(x, b[n]) for n, x in a.items())


def test_a_chain_that_does_not_hold_is_refused(two, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapters"):
        stages.export(base, tmp_path / "x")
    first, second = two
    step = runs.resolve(first)
    moved = shutil.copytree(step, tmp_path / "kept")
    shutil.rmtree(step)
    try:  # another model in the place of the first stage's
        weights = OrbaxWeights(orbax_item(moved, "model", "ema"))
        arrays = {n: (x * 1.5 if n.endswith("lora_b") else x) for n, x in weights.read(list(weights.infos))}
        ocp.save_checkpointables(step, {"weights": arrays, "ema": arrays})
        with pytest.raises(
            UserError, match=r"first, on which it was trained, and the weights given are others"
        ):
            stages.export(second, tmp_path / "x")
    finally:
        shutil.rmtree(step, ignore_errors=True)
        shutil.copytree(moved, step)


def test_adapters_from_a_difference_know_their_base(two, base: Path, tmp_path: Path) -> None:
    first, second = two
    low_rank.difference(second, first, tmp_path / "made", 3, dtype=ml_dtypes.bfloat16)
    with pytest.raises(UserError, match="these adapters stand on"):
        convert.plan(base, tmp_path / "x", adapters=tmp_path / "made")
    step = runs.resolve(first)
    convert.plan(step, tmp_path / "x", item="ema", adapters=tmp_path / "made")


def test_what_is_damaged_in_it_is_said() -> None:
    good = footing.Footing(np.zeros((4, 64), np.float32), np.dtype(np.float32)).to_metadata()
    assert footing.Footing.from_metadata(good, "x").values.shape == (4, 64)
    assert footing.Footing.from_metadata({"format": "pt"}, "x") is None
    for text in (
        "",
        "[]",
        "{}",
        '{"values": "AAAA", "dtype": "float32"}',
        '{"values": "?", "dtype": "float32"}',
    ):
        with pytest.raises(UserError, match="what it says of its base is damaged"):
            footing.Footing.from_metadata({footing.KEY: text}, "x")


@pytest.mark.torch
def test_peft_reads_both_stages(two, base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the torch extra")
    from tests.checkpoint.test_lora import torch_modules

    _, second = two
    stages.export(second, tmp_path / "both")
    model = peft.PeftModel.from_pretrained(torch_modules(base), tmp_path / "both")
    state = model.merge_and_unload().state_dict()
    expected = merged(runs.resolve(second), tmp_path / "x")
    for module, entry in peft_names.projections(CFG).items():
        got = state[f"{module}.weight"].detach().numpy().T
        np.testing.assert_allclose(got, expected[entry.ours], rtol=0, atol=1e-6)
