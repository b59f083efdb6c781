"""The understanding path against ``transformers``: Qwen2 without QK-norm, Qwen3's attention with it.

Two samples of different lengths are packed in one row with padding on our side, and run one by one on
PyTorch's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.parity.golden import assert_close  # noqa: E402
from tests.torch_parity.common import (  # noqa: E402
    TOLERANCE,
    numpy_gradients,
    numpy_tensors,
    randomize,
)
from unichar_jax.checkpoint import table  # noqa: E402
from unichar_jax.config.compute import Compute  # noqa: E402
from unichar_jax.config.model import MODEL_PRESETS, DecoderConfig, ModelConfig  # noqa: E402
from unichar_jax.models import params  # noqa: E402
from unichar_jax.models.streams import TokenMeta  # noqa: E402
from unichar_jax.models.unified import UnifiedModel  # noqa: E402

pytestmark = pytest.mark.torch

GRADIENT_TOLERANCE = 1e-4
LENGTHS, PADDING = (11, 7), 3


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def _config(qk_norm: bool) -> ModelConfig:
    decoder = DecoderConfig(
        hidden_size=48,
        mlp_size=112,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        vocab_size=97,
        norm_eps=1e-5,
        qk_norm=qk_norm,
    )
    return dataclasses.replace(MODEL_PRESETS["debug"], decoder=decoder)


def _theirs(d: DecoderConfig):
    """Qwen2; or, with QK-norm, Qwen3 with Qwen2's biases (its extra output bias is set to zero)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = dict(
        hidden_size=d.hidden_size,
        intermediate_size=d.mlp_size,
        num_hidden_layers=d.num_layers,
        num_attention_heads=d.num_heads,
        num_key_value_heads=d.num_kv_heads,
        vocab_size=d.vocab_size,
        rms_norm_eps=d.norm_eps,
        rope_parameters=dict(rope_type="default", rope_theta=d.rope_theta),
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    if not d.qk_norm:
        return randomize(Qwen2ForCausalLM(Qwen2Config(**sizes)))
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=d.head_dim, attention_bias=True))
    randomize(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.detach().zero_()
    return model


def _is_extra(name: str) -> bool:
    return name.endswith("o_proj.bias")


def _ours(cfg: ModelConfig, theirs) -> UnifiedModel:
    """Our model with their understanding weights; everything else is random and must not matter."""
    declared = UnifiedModel(cfg, Compute(dtype="float32"))
    entries = table.model_table(cfg)
    tensors = table.module_to_torch(params.initialize(declared, 1), entries)
    given = {n: x for n, x in numpy_tensors(theirs, table.LM_PREFIX).items() if not _is_extra(n)}
    assert set(given) <= set(tensors)
    filled = table.module_from_torch(declared, entries, tensors | given)
    return jax.tree.map(jnp.asarray, filled)


def _packed_meta() -> TokenMeta:
    segment = np.repeat([1, 2, 0], [*LENGTHS, PADDING])[None]
    order = np.concatenate([np.arange(n) for n in (*LENGTHS, PADDING)])[None]
    zero = np.zeros_like(segment)
    return jax.tree.map(jnp.asarray, TokenMeta(segment, order, order, zero, zero))


def _cross_entropy(logits: jax.Array, targets: np.ndarray) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1).sum()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_understanding_path_and_its_gradients(qk_norm):
    cfg = _config(qk_norm)
    theirs = _theirs(cfg.decoder)
    ours, meta = _ours(cfg, theirs), _packed_meta()
    used = sum(LENGTHS)
    ids, targets = np.random.default_rng(0).integers(0, cfg.decoder.vocab_size, (2, 1, used + PADDING))

    expected_hidden, expected_logits, expected_loss, start = [], [], 0.0, 0
    for length in LENGTHS:
        here = slice(start, start + length)
        out = theirs(torch.tensor(ids[:, here]), output_hidden_states=True, use_cache=False)
        expected_hidden.append(out.hidden_states[-1][0].detach().numpy())
        expected_logits.append(out.logits[0].detach().numpy())
        expected_loss += torch.nn.functional.cross_entropy(
            out.logits[0], torch.tensor(targets[0, here]), reduction="sum"
        )
        start += length
    expected_loss.backward()

    def loss(model):
        hidden, _, _ = model.backbone(model.embed_text(jnp.asarray(ids)), None, meta)
        logits = model.logits(hidden)
        return _cross_entropy(logits[0, :used], targets[0, :used]), (hidden, logits)

    (got_loss, (hidden, logits)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours)
    assert_close(hidden[0, :used], np.concatenate(expected_hidden), TOLERANCE, "hidden")
    assert_close(logits[0, :used], np.concatenate(expected_logits), TOLERANCE, "logits")
    assert_close(got_loss, expected_loss.item(), TOLERANCE, "loss")

    got = table.module_to_torch(gradient, table.model_table(cfg))
    expected = numpy_gradients(theirs, table.LM_PREFIX)
    total = np.sqrt(sum(np.square(g).sum() for g in expected.values()))
    for name, value in expected.items():
        if _is_extra(name):
            continue
        if not qk_norm and name.endswith("k_proj.bias"):
            # Rotated by position, so not mathematically zero as in a plain softmax; small all the same.
            assert np.linalg.norm(got[name] - value) <= GRADIENT_TOLERANCE * total, name
        else:
            assert_close(got[name], value, GRADIENT_TOLERANCE, name)
    for name in set(got) - set(expected):
        assert not got[name].any(), f"{name} is no part of the understanding path and has a gradient"
