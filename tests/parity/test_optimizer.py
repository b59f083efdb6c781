"""One AdamW step against the reference numbers: fed the reference's gradients, and end to end."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from tests.parity import golden
from tests.parity.golden import assert_close, relative_l2
from tests.parity.packed import train_batch
from unichar_jax.checkpoint import table
from unichar_jax.config.train import OptimizerConfig
from unichar_jax.models import params
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.training import objective
from unichar_jax.training.optimizer import make_optimizer

TOLERANCE = 1e-6
PREFIX = "adamw."


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def _declared():
    return UnifiedModel(golden.config(), golden.FLOAT32)


def _step(gradients: dict) -> dict[str, np.ndarray]:
    """Parameters after one step of the reference's optimiser, by PyTorch name."""
    cfg = OptimizerConfig(
        learning_rate=2e-5, beta1=0.9, beta2=0.95, eps=1e-15, weight_decay=0.0, max_grad_norm=1.0
    )
    optimizer = make_optimizer(cfg, steps=1)
    weights = params.flat(golden.model())

    @jax.jit
    def one(weights, gradients):
        updates, _ = optimizer.update(gradients, optimizer.init(weights), weights)
        return optax.apply_updates(weights, updates)

    new = one(weights, gradients)
    module = params.map_named(lambda name, _: new[name], _declared())
    return table.module_to_torch(module, table.model_table(golden.config()))


def _expected() -> dict[str, np.ndarray]:
    return {k[len(PREFIX) :]: v for k, v in golden.tensors().items() if k.startswith(PREFIX)}


def test_fed_the_reference_gradients():
    filled = table.module_from_torch(
        _declared(),
        table.model_table(golden.config()),
        golden.weights("train_grads.safetensors"),
    )
    got = _step(params.flat(filled))
    assert _expected()
    for name, expected in _expected().items():
        assert_close(got[name], expected, TOLERANCE, name)
        start = golden.weights()[name]
        assert relative_l2(start, expected) > 0  # the step did something


def test_end_to_end():
    packed = train_batch()

    def loss(model):
        terms = objective.unified_terms(model, packed.batch, packed.x0, packed.noise, shift=packed.shift)
        return objective.combine(terms, objective.weights_of(packed.batch), 0.25, 1.0)

    got = _step(params.flat(jax.jit(jax.grad(loss))(golden.model())))
    compared = total = 0
    for name, expected in _expected().items():
        gradient = golden.weights("train_grads.safetensors")[name]
        # With eps 1e-15, one flipped sign of a rounding-noise gradient moves a weight by the learning rate.
        sure = np.abs(gradient) >= 1e-3 * np.sqrt(np.mean(np.square(gradient, dtype=np.float64)))
        absent = gradient == 0  # rows of the embedding that the batch does not touch: must not move
        keep = sure | absent
        assert_close(got[name][keep], expected[keep], TOLERANCE, name)
        compared, total = compared + keep.sum(), total + keep.size
    assert compared >= 0.99 * total
