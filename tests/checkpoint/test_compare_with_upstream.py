"""The script for real weights: its second half, against a reference recorded from this package itself."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sampling.decoding import decode
from unichar_jax.checkpoint import store
from unichar_jax.config.compute import Compute
from unichar_jax.data.tokenizer import load_tokenizer
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow, pixels
from unichar_jax.sampling.text import TextSettings

from .conftest import REPOSITORY

PROMPT = "moon"
SETTINGS = flow.FlowSettings(num_timesteps=4, guidance=flow.Guidance(4.0))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = REPOSITORY / "scripts" / "compare_with_upstream.py"
    spec = importlib.util.spec_from_file_location("compare_with_upstream", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_reference(folder: Path, out: Path) -> None:
    """Answers and draws ``PROMPT`` step by step, as upstream would."""
    model = store.load_model(folder, compute=Compute(dtype="float32"))
    cfg, grid = model.cfg, (2, 2)
    ids = load_tokenizer(folder).encode(PROMPT)
    turn = [cfg.special_tokens.bos, *ids, cfg.special_tokens.eos]
    context = kv.prefill_text(model, kv.empty(model, 1, 32), jnp.array([turn]), jnp.array([len(turn)]))
    token, logits = cfg.special_tokens.bos, []
    growing = context
    read_text = jax.jit(kv.read_text)
    for _ in range(4):
        states, growing = read_text(model, growing, jnp.array([[token]]), jnp.array([1]))
        logits.append(np.asarray(model.logits(states))[0, 0])
        token = int(logits[-1].argmax())
    (chosen,), _ = decode(model, context, [TextSettings(max_tokens=3, temperature=0.0)])
    assert chosen == [int(x.argmax()) for x in logits[:3]][: len(chosen)]
    noise = np.random.default_rng(0).standard_normal((4, cfg.latent_dim), np.float32)
    contexts = flow.Contexts(context)
    rows = flow.branches(model, contexts, SETTINGS.guidance)
    velocity = jax.jit(flow.guided_velocity, static_argnames="grid")
    x, xs, vs = jnp.asarray(noise)[None], [], []
    for t, after in zip(SETTINGS.times[:-1], SETTINGS.times[1:], strict=True):
        acts = bool(SETTINGS.guidance.acts(t))
        v = velocity(model, rows if acts else rows.unguided(), x, t, grid=grid, guidance=SETTINGS.guidance)
        xs.append(np.asarray(x[0]))
        vs.append(np.asarray(v[0]))
        x = x - v * (t - after)
    picture = pixels.decode_images(store.load_autoencoder(folder), x, grid, cfg.latent_patch_size)[0]
    size = [n * cfg.pixels_per_latent for n in grid]
    settings = {"prompts": [PROMPT], "size": size, "num_timesteps": 4, "text_scale": 4.0}
    arrays = {
        "0.ids": np.array(ids),
        "0.logits": np.stack(logits),
        "0.noise": noise,
        "0.x": np.stack(xs),
        "0.velocity": np.stack(vs),
        "0.picture": np.asarray(picture),
    }
    np.savez(out, settings=json.dumps(settings), **arrays)


def test_no_difference_from_itself_and_a_planted_one(
    bagel: Path, tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = tmp_path / "reference.npz"
    write_reference(bagel, reference)
    found = list(script.differences(bagel, reference, "float32"))
    assert [what for _, what, *_ in found][0] == "logits"
    assert sum(what.startswith("velocity") for _, what, *_ in found) == 3
    assert found[0][-1] == "4 of 4 greedy tokens agree"
    for _, what, mine, theirs, _ in found[:-1]:
        assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs), what
    assert np.abs(found[-1][2] - found[-1][3]).max() <= 1  # one grey level, where rounding decides

    data = dict(np.load(reference))
    data["0.velocity"][0] += 1
    np.savez(reference, **data)
    planted = list(script.differences(bagel, reference, "float32"))[1]
    np.testing.assert_allclose(planted[3] - planted[2], 1, atol=1e-4)
    script.compare(bagel, reference, "float32")
    assert "PSNR" in capsys.readouterr().out
