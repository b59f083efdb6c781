"""The training step: sharding, accumulation and rematerialisation change nothing."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.parity.golden import relative_l2
from tests.training.batches import random_batch
from unichar_jax.config.compute import REMAT_POLICIES, Compute, MeshConfig
from unichar_jax.config.model import model_preset
from unichar_jax.config.train import OptimizerConfig, SFTConfig
from unichar_jax.models import params
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.parallel.mesh import make_mesh, put_batch
from unichar_jax.training import objective
from unichar_jax.training import state as state_lib
from unichar_jax.training import step as step_lib
from unichar_jax.training.optimizer import make_optimizer

CFG = model_preset("debug")
ROWS = 8
SFT = SFTConfig(optimizer=OptimizerConfig(ema_decay=0.9), compute=Compute(dtype="float32"), ce_chunk=16)


def _weights(declared):
    """Random weights with no zero tensor, so that every gradient is exercised."""
    rng = np.random.default_rng(2)
    filled = params.initialize(declared, 1)
    return jax.tree.map(lambda x: np.asarray(x + 0.02 * rng.standard_normal(x.shape, np.float32)), filled)


def _one_step(cfg=SFT, mesh=None):
    declared = UnifiedModel(CFG, cfg.compute)
    weights = _weights(declared)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    if mesh is None:
        weights = jax.tree.map(jax.numpy.asarray, weights)
    else:
        weights = jax.device_put(weights, params.shardings(declared, mesh))
    layout, state = state_lib.create(weights, declared, optimizer, ema=True, mesh=mesh)
    batch = put_batch(random_batch(CFG, ROWS), mesh)

    def step(state, batch):
        # The step of make_sft_step, with its gradients handed out.
        grads, terms = step_lib.gradients_of(layout, state, batch, cfg, CFG.autoencoder, 3)
        loss = objective.combine(terms, objective.weights_of(batch), cfg.ce_weight, cfg.mse_weight)
        return grads, step_lib.apply_gradients(state, grads, optimizer, cfg.optimizer.ema_decay), loss

    with jax.default_matmul_precision("highest"):
        if mesh is None:
            return jax.jit(step)(state, batch)
        with jax.set_mesh(mesh):
            return jax.jit(step)(state, batch)


@pytest.fixture(scope="module")
def plain():
    return _one_step()


def _assert_same(got, expected, gradients=1e-5, parameters=1e-6):
    (g1, s1, loss1), (g0, s0, loss0) = got, expected
    assert abs(float(loss1) / float(loss0) - 1) <= 1e-6
    norm = np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in g0.values()))
    compared = total = 0
    for name in g0:
        a, b = np.asarray(g1[name], np.float64), np.asarray(g0[name], np.float64)
        if name == "vision.layers.k.bias":  # mathematically zero: softmax ignores a shift of all keys
            assert np.linalg.norm(a) <= 1e-6 * norm
            continue
        assert relative_l2(a, b) <= gradients, name
        # With eps 1e-15, a flipped sign of a rounding-noise gradient moves a weight by the learning rate.
        # Rows of a table that no token touches have no gradient at all and must not move.
        sure = (np.abs(b) >= 1e-3 * np.sqrt(np.mean(b**2))) | (b == 0)
        compared, total = compared + sure.sum(), total + sure.size
        p1, p0 = np.asarray(s1.params[name])[sure], np.asarray(s0.params[name])[sure]
        assert relative_l2(p1, p0) <= parameters, name
    assert compared >= 0.99 * total


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 1), (2, 2, 1), (1, 8, 1), (2, 2, 2)])
def test_sharding_is_invisible(plain, sizes):
    n = int(np.prod(sizes))
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:n])
    _assert_same(_one_step(mesh=mesh), plain)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_large_batch(plain, accumulate):
    _assert_same(_one_step(dataclasses.replace(SFT, accumulate=accumulate)), plain)


@pytest.mark.parametrize("remat", [r for r in REMAT_POLICIES if r != "none"])
def test_rematerialisation_changes_nothing(plain, remat):
    cfg = dataclasses.replace(SFT, compute=Compute(dtype="float32", remat=remat))
    _assert_same(_one_step(cfg), plain)


def test_parameters_are_sharded():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    _, state, _ = _one_step(mesh=mesh)
    kernel = "decoder.layers.und.gate.kernel"
    moments = state.opt[1][0].mu
    for tree in (state.params, state.ema, moments):
        assert tuple(tree[kernel].sharding.spec) == (None, "fsdp", "tensor")


def test_randomness_depends_on_step_and_purpose_only():
    keys = {
        (s, p): tuple(np.asarray(jax.random.key_data(step_lib.purpose_key(1, s, p))))
        for s in (0, 1)
        for p in ("noise", "posterior")
    }
    assert len(set(keys.values())) == 4
