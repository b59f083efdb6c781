"""Adapters on disk: what is written is read, PEFT reads it too, and what does not fit is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from unichar_jax.checkpoint import convert, lora, low_rank, peft_names, store
from unichar_jax.cli.main import main
from unichar_jax.config.compute import MeshConfig
from unichar_jax.errors import UserError
from unichar_jax.models import lora as model_lora
from unichar_jax.models import params
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel.mesh import make_mesh

from .conftest import tensors_of, write_tensors

RANK = 3


def random_adapters(cfg, rank: int = RANK, places: tuple[str, ...] = ("und.q", "gen.q", "gen.down")) -> dict:
    """Adapters by on-disk name with no zero in them."""
    declared = model_lora.declare(UnifiedModel(cfg), dict.fromkeys(places, rank))
    shapes = {n: s.shape for n, s in store.flat_abstract(declared).items() if "lora_" in n}
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s, scale=0.3).astype(np.float32) for n, s in shapes.items()}


@pytest.fixture
def cfg(bagel: Path):
    return store.load_config(bagel)


@pytest.fixture
def folder(cfg, tmp_path: Path) -> Path:
    lora.save(tmp_path / "lora", random_adapters(cfg), cfg, base="somewhere/BAGEL")
    return tmp_path / "lora"


def edit(folder: Path, tensors=None, **options) -> None:
    """Spoils a folder: ``tensors`` maps its tensors to others, ``options`` replace those of its config."""
    path = folder / lora.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    if tensors is not None:
        write_tensors(folder / lora.WEIGHTS_FILE, tensors(tensors_of(folder / lora.WEIGHTS_FILE)))


def expected_kernels(bagel: Path, adapters: dict) -> dict[str, np.ndarray]:
    """Kernels of the merged model by on-disk name, in float64 and by hand."""
    model = store.unstack(UnifiedModel(store.load_config(bagel)), store.load_model(bagel))
    out = {}
    for name in (n for n in adapters if n.endswith("lora_a")):
        stem = name.removesuffix(".lora_a")
        a, b = (adapters[f"{stem}.lora_{ab}"].astype(np.float64) for ab in "ab")
        out[f"{stem}.kernel"] = np.asarray(model[f"{stem}.kernel"], np.float64) + a @ b
    return out


# -- writing and reading ----------------------------------------------------------------------------


def test_what_is_written_is_read(cfg, folder: Path) -> None:
    adapters = random_adapters(cfg)
    opened = lora.open_lora(folder, cfg)
    assert opened.places == {"gen.down": RANK, "gen.q": RANK, "und.q": RANK}
    assert opened.shapes.keys() == adapters.keys()
    assert all(np.array_equal(opened.read(n), x) for n, x in adapters.items())
    loaded = lora.load(folder, cfg)
    kernel = loaded["decoder.layers.gen.down.lora_b"]
    assert kernel.shape == (cfg.decoder.num_layers, RANK, cfg.decoder.hidden_size)
    assert np.array_equal(kernel[1], adapters["decoder.layers.1.gen.down.lora_b"])


def test_names_are_those_of_peft_around_bagel(folder: Path) -> None:
    tensors = tensors_of(folder / lora.WEIGHTS_FILE)
    stem = "base_model.model.language_model.model.layers.0"
    assert tensors[f"{stem}.self_attn.q_proj.lora_A.weight"].shape[0] == RANK
    assert tensors[f"{stem}.mlp_moe_gen.down_proj.lora_B.weight"].shape[1] == RANK
    config = json.loads((folder / lora.CONFIG_FILE).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, RANK)
    assert config["base_model_name_or_path"] == "somewhere/BAGEL"


def test_loads_onto_any_mesh(cfg, folder: Path) -> None:
    whole = lora.load(folder, cfg)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    split = lora.load(folder, cfg, mesh=mesh)
    assert split.keys() == whole.keys()
    for name, x in split.items():
        assert np.array_equal(np.asarray(x), np.asarray(whole[name])), name
    assert tuple(split["decoder.layers.gen.q.lora_a"].sharding.spec) == (None, "fsdp", None)
    assert tuple(split["decoder.layers.gen.q.lora_b"].sharding.spec) == (None, None, "tensor")


def test_merged_is_the_sum(bagel: Path, cfg, folder: Path, tmp_path: Path) -> None:
    adapters = random_adapters(cfg)
    expected = expected_kernels(bagel, adapters)
    base = store.load_model(bagel)
    merged = model_lora.merge(model_lora.adapted(base, lora.load(folder, cfg)), UnifiedModel(cfg))
    flat = store.unstack(UnifiedModel(cfg), merged)
    for name, x in expected.items():
        np.testing.assert_allclose(np.asarray(flat[name]), x, rtol=1e-5, atol=1e-6)
    untouched = "decoder.layers.und.k.kernel"
    assert params.flat(merged)[untouched] is params.flat(base)[untouched]
    # The same, streamed from directory to directory, both ways.
    convert.execute(convert.plan(bagel, tmp_path / "merged", adapters=folder), verify=True)
    streamed = store.unstack(UnifiedModel(cfg), store.load_model(tmp_path / "merged"))
    for name, x in expected.items():
        np.testing.assert_allclose(np.asarray(streamed[name]), x, rtol=1e-5, atol=1e-6)


def test_factors_and_names_of_others_are_understood(cfg, folder: Path) -> None:
    """PEFT around the language model alone, with a factor of its own."""
    adapters = random_adapters(cfg)
    name = "decoder.layers.0.und.q.lora_b"
    shorten = lambda ts: {n.replace("language_model.", ""): x for n, x in ts.items()}  # noqa: E731
    targets = r"model\.layers\.\d+\.(self_attn\.q_proj|self_attn\.q_proj_moe_gen|mlp_moe_gen\.down_proj)"
    edit(folder, shorten, target_modules=targets, lora_alpha=6)
    np.testing.assert_allclose(lora.open_lora(folder, cfg).read(name), adapters[name] * 2, rtol=1e-6)
    edit(folder, target_modules=["q_proj", "q_proj_moe_gen", "mlp_moe_gen.down_proj"], use_rslora=True)
    factor = 6 / np.sqrt(RANK)
    np.testing.assert_allclose(lora.open_lora(folder, cfg).read(name), adapters[name] * factor, rtol=1e-6)


# -- what does not fit ------------------------------------------------------------------------------


def test_mistakes_are_listed_with_the_remedy(cfg, folder: Path, tmp_path: Path) -> None:
    def broken(message: str, tensors=None, **options) -> None:
        copy = shutil.copytree(folder, tmp_path / "broken")
        edit(copy, tensors, **options)
        with pytest.raises(UserError, match=message):
            lora.open_lora(copy, cfg)
        shutil.rmtree(copy)

    first = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_"
    without = lambda *ends: lambda ts: {n: x for n, x in ts.items() if not n.endswith(ends)}  # noqa: E731
    broken("lora_B.weight is missing", without("layers.0.self_attn.q_proj.lora_B.weight"))
    broken(
        r"(?s)does not fit|do not fit.*layers\.0\.self_attn\.q_proj: is among target_modules",
        without("layers.0.self_attn.q_proj.lora_A.weight", "layers.0.self_attn.q_proj.lora_B.weight"),
    )
    broken(
        "no projection of this model", lambda ts: ts | {"base_model.model.other.lora_A.weight": np.ones(2)}
    )
    wide = np.ones((RANK, 7), np.float32)
    broken(r"(?s)made for a projection \[7, .*somewhere/BAGEL", lambda ts: ts | {first + "A.weight": wide})
    broken("its two ranks differ", lambda ts: ts | {first + "A.weight": ts[first + "A.weight"][:2]})
    broken(f"has rank {RANK}, .* says r = 4", r=4)
    broken("r: expected a positive rank, got 0", r=0)
    broken("peft_type: expected LORA, got IA3", peft_type="IA3")
    broken("use_dora = True is not supported", use_dora=True)
    with pytest.raises(UserError, match=r"no adapter_config\.json here"):
        lora.open_lora(tmp_path, cfg)
    (folder / lora.CONFIG_FILE).write_text("{}")
    with pytest.raises(UserError, match="not a configuration of PEFT"):
        lora.open_lora(folder, cfg)


def test_nothing_is_overwritten_or_half_written(cfg, folder: Path, tmp_path: Path) -> None:
    before = (folder / lora.WEIGHTS_FILE).read_bytes()
    with pytest.raises(UserError, match="exists already"):
        lora.save(folder, random_adapters(cfg), cfg, base="b")
    assert (folder / lora.WEIGHTS_FILE).read_bytes() == before
    with pytest.raises(UserError, match="no adapter"):
        lora.save(tmp_path / "empty", {}, cfg, base="b")
    assert not (tmp_path / "empty").exists()


# -- from two checkpoints ---------------------------------------------------------------------------


def fine_tuned(bagel: Path, dst: Path, change) -> Path:
    """A copy of a BAGEL directory with some tensors changed."""
    shutil.copytree(bagel, dst)
    tensors = tensors_of(bagel / "ema.safetensors")
    write_tensors(dst / "ema.safetensors", {n: change(n, x) for n, x in tensors.items()})
    return dst


def low_rank_change(name: str, x: np.ndarray) -> np.ndarray:
    """Rank 2 on the generation expert's queries, anything on norms and the head."""
    rng = np.random.default_rng(len(name))
    if name.endswith("q_proj_moe_gen.weight"):
        a, b = rng.normal(size=(x.shape[0], 2)), rng.normal(size=(2, x.shape[1]))
        return (x + 0.1 * a @ b).astype(np.float32)
    changed = "input_layernorm_moe_gen" in name or "lm_head" in name
    return (x + rng.normal(size=x.shape)).astype(np.float32) if changed else x


@pytest.mark.parametrize("kind", ["torch", "orbax"])
def test_a_low_rank_difference_is_found_exactly(bagel: Path, cfg, tmp_path: Path, kind: str) -> None:
    tuned = fine_tuned(bagel, tmp_path / "tuned", low_rank_change)
    if kind == "orbax":
        convert.convert(tuned, tmp_path / "orbax")
        tuned = tmp_path / "orbax"
    report = low_rank.difference(tuned, bagel, tmp_path / "lora", 2)
    kept = {r.name: r.kept for r in report.rows}
    assert kept.pop("lm_head.kernel") == "left out"
    layers = range(cfg.decoder.num_layers)
    assert kept == {f"decoder.layers.{i}.gen.q.kernel": "low-rank" for i in layers} | {
        f"decoder.layers.{i}.gen.attn_norm.scale": "whole" for i in layers
    }
    assert all(r.relative_loss < 1e-5 for r in report.rows if r.kept == "low-rank")
    head = next(r for r in report.rows if r.kept == "left out")
    assert report.relative_loss == pytest.approx(head.change / np.sqrt(sum(r.change**2 for r in report.rows)))
    # The base with the adapters is the fine-tune, but for the head.
    opened = lora.open_lora(tmp_path / "lora", cfg)
    assert opened.places == {"gen.q": 2}
    base, wanted = store.load_model(bagel), params.flat(store.load_model(tuned))
    merged = model_lora.merge(model_lora.adapted(base, lora.load(opened)), UnifiedModel(cfg))
    for name, x in params.flat(merged).items():
        expected = params.flat(base)[name] if name == "lm_head.kernel" else wanted[name]
        np.testing.assert_allclose(np.asarray(x), np.asarray(expected), rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_is_lost_is_what_is_reported(bagel: Path, cfg, tmp_path: Path) -> None:
    """A change of full rank: the report equals the distance of the merged model from the fine-tune."""

    def change(name: str, x: np.ndarray) -> np.ndarray:
        if not name.endswith("v_proj.weight") or "language_model" not in name:
            return x
        return x + np.random.default_rng(1).normal(size=x.shape, scale=0.1).astype(np.float32)

    tuned = fine_tuned(bagel, tmp_path / "tuned", change)
    report = low_rank.difference(tuned, bagel, tmp_path / "lora", 4, keep="none", dtype=ml_dtypes.bfloat16)
    convert.execute(convert.plan(bagel, tmp_path / "merged", adapters=tmp_path / "lora"))
    base, got, want = (
        store.unstack(UnifiedModel(cfg), store.load_model(p)) for p in (bagel, tmp_path / "merged", tuned)
    )
    for row in report.rows:
        x0, x1, x2 = (np.asarray(side[row.name], np.float64) for side in (base, got, want))
        assert row.lost == pytest.approx(np.linalg.norm(x2 - x1), rel=1e-4)
        assert row.change == pytest.approx(np.linalg.norm(x2 - x0), rel=1e-4)
        best = np.linalg.svd(x2 - x0, compute_uv=False)[4:]
        assert np.linalg.norm(best) <= row.lost <= 1.02 * np.linalg.norm(best)  # bfloat16 adapters


def test_randomised_factors_are_nearly_the_best() -> None:
    """A falling spectrum on top of noise, 1300 x 1200, as in a fine-tune's change."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(1300, 60)) * 0.9 ** np.arange(60), rng.normal(size=(60, 1200))
    x = (left @ right + 0.05 * rng.normal(size=(1300, 1200))).astype(np.float32)
    a, b = low_rank.truncated_svd(x, 16)
    best = np.linalg.svd(x, compute_uv=False)[16:]
    assert (a.shape, b.shape) == ((1300, 16), (16, 1200))
    assert np.linalg.norm(x - a @ b) <= 1.002 * np.linalg.norm(best)


def test_differences_that_make_no_adapters_are_refused(bagel: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no projection of the experts differs"):
        low_rank.difference(bagel, bagel, tmp_path / "lora", 2)
    with pytest.raises(UserError, match="rank: expected 1 to"):
        low_rank.difference(bagel, bagel, tmp_path / "lora", 0)
    bad = fine_tuned(bagel, tmp_path / "bad", lambda n, x: x * np.nan if "q_proj.weight" in n else x)
    with pytest.raises(UserError, match=r"q\.kernel: .*not finite"):
        low_rank.difference(bad, bagel, tmp_path / "lora", 2)
    assert not (tmp_path / "lora").exists()


# -- the command ------------------------------------------------------------------------------------


def test_the_command_makes_merges_and_explains(bagel: Path, cfg, tmp_path: Path, capsys) -> None:
    tuned = fine_tuned(bagel, tmp_path / "tuned", low_rank_change)
    made = tmp_path / "made"
    arguments = ["convert", "--lora", "2", "--dtype", "float32", tuned, bagel, made]
    assert main([str(a) for a in arguments]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "decoder.layers.0.gen.q.kernel" in printed
    assert "1 arrays are left out (--keep all keeps them whole)" in printed
    assert lora.open_lora(made, cfg).places == {"gen.q": 2}

    assert main(["convert", "--lora", "2", "--keep", "all", *map(str, (tuned, bagel, tmp_path / "all"))]) == 0
    assert "left out" not in capsys.readouterr().out
    assert "lm_head.kernel" in lora.open_lora(tmp_path / "all", cfg).whole

    assert main(["convert", "--merge", str(made), str(bagel), str(tmp_path / "merged")]) == 0
    got = store.load_model(tmp_path / "merged").decoder.layers.gen.q.kernel[...]
    want = store.load_model(tuned).decoder.layers.gen.q.kernel[...]
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-4, atol=1e-5)

    capsys.readouterr()
    assert main(["convert", "--lora", "2", str(tuned), str(bagel)]) == 1
    assert "expected 3 paths, got 2. Usage: unichar convert [OPTIONS] --lora" in capsys.readouterr().err
    assert main(["convert", "--lora-export", str(bagel), str(tmp_path / "none")]) == 1
    assert "holds no adapters" in capsys.readouterr().err


# -- PEFT -------------------------------------------------------------------------------------------


def torch_modules(bagel: Path):
    """BAGEL's modules as PyTorch has them, filled."""
    import torch

    root, leaves = torch.nn.Module(), {}
    for name, x in tensors_of(bagel / "ema.safetensors").items():
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, {})[leaf] = torch.from_numpy(x.copy())
    for name, arrays in leaves.items():
        above, *steps = root, *name.split(".")
        for step in steps[:-1]:
            if not hasattr(above, step):
                above.add_module(step, torch.nn.Module())
            above = getattr(above, step)
        weight = arrays.get("weight")
        linear = weight is not None and weight.ndim == 2
        made = torch.nn.Linear(*weight.shape[::-1], bias="bias" in arrays) if linear else torch.nn.Module()
        for leaf, x in arrays.items():
            made.register_parameter(leaf, torch.nn.Parameter(x))
        above.add_module(steps[-1], made)
    return root


@pytest.mark.torch
def test_peft_reads_the_folder_and_merges_to_the_same(bagel: Path, cfg, tmp_path: Path) -> None:
    """BAGEL's modules as PyTorch has them, around which PEFT itself builds and loads the adapters."""
    pytest.importorskip("torch", reason="needs the torch extra")
    peft = pytest.importorskip("peft", reason="needs the torch extra")
    root = torch_modules(bagel)
    every = tuple(f"{e}.{t}" for e in model_lora.EXPERTS for t in model_lora.TARGETS)
    adapters = random_adapters(cfg, places=every)
    lora.save(tmp_path / "lora", adapters, cfg, base=str(bagel))

    model = peft.PeftModel.from_pretrained(root, tmp_path / "lora")
    ours = {n for n, _ in model.named_parameters() if ".lora_" in n}
    stored = peft.utils.load_peft_weights(str(tmp_path / "lora"), device="cpu")
    assert {n.replace(".default.", ".") for n in ours} == stored.keys()
    assert len(stored) == 2 * 7 * 2 * cfg.decoder.num_layers  # and none on the vision tower
    result = peft.set_peft_model_state_dict(model, stored)
    assert not result.unexpected_keys
    assert not [n for n in result.missing_keys if ".lora_" in n]
    merged = model.merge_and_unload().state_dict()
    names = {n.removesuffix(".weight"): e for n, e in peft_names.projections(cfg).items()}
    expected = expected_kernels(bagel, adapters)
    for module, entry in names.items():
        got = merged[f"{module}.weight"].detach().numpy().T
        np.testing.assert_allclose(got, expected[entry.ours], rtol=1e-5, atol=1e-6)
    # And back: what PEFT saves, this package reads.
    again = peft.PeftModel.from_pretrained(root, tmp_path / "lora")
    again.save_pretrained(tmp_path / "saved")
    read = lora.open_lora(tmp_path / "saved", cfg)
    assert all(np.array_equal(read.read(n), x) for n, x in adapters.items())
