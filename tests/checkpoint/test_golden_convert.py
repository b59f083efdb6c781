"""The table against the published model: names, shapes and counts of BAGEL-7B-MoT, without weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from unichar_jax.checkpoint import store, table
from unichar_jax.checkpoint.safetensors_io import open_file
from unichar_jax.config.model import model_preset

CFG = model_preset("bagel-7b")


def test_counts_of_the_real_model() -> None:
    shapes = {e.torch: e.torch_shape for e in table.model_table(CFG)}
    shapes |= {n: (side * side, width) for n, (side, width) in table.frozen_tables(CFG).items()}
    assert len(shapes) == 1223
    assert sum(map(math.prod, shapes.values())) == 14_607_260_128
    gen = {n: s for n, s in shapes.items() if "_moe_gen" in n}
    assert (len(gen), sum(map(math.prod, gen.values()))) == (393, 6_525_628_928)
    autoencoder = table.autoencoder_table(CFG.autoencoder)
    assert (len(autoencoder), sum(math.prod(e.shape) for e in autoencoder)) == (244, 83_819_683)


def test_language_model_alone_has_788_tensors() -> None:
    assert sum(e.torch.startswith(table.LM_PREFIX) for e in table.model_table(CFG)) == 788


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("language_model.model.embed_tokens.weight", (152064, 3584)),
        ("language_model.lm_head.weight", (152064, 3584)),
        ("language_model.model.norm_moe_gen.weight", (3584,)),
        ("language_model.model.layers.27.self_attn.q_proj_moe_gen.weight", (3584, 3584)),
        ("language_model.model.layers.0.self_attn.k_proj.weight", (512, 3584)),
        ("language_model.model.layers.0.self_attn.v_proj.bias", (512,)),
        ("language_model.model.layers.0.self_attn.k_norm_moe_gen.weight", (128,)),
        ("language_model.model.layers.5.mlp_moe_gen.down_proj.weight", (3584, 18944)),
        ("language_model.model.layers.5.post_attention_layernorm_moe_gen.weight", (3584,)),
        ("time_embedder.mlp.0.weight", (3584, 256)),
        ("vae2llm.weight", (3584, 64)),
        ("llm2vae.weight", (64, 3584)),
        ("vit_model.vision_model.embeddings.patch_embedding.weight", (1152, 588)),
        ("vit_model.vision_model.embeddings.position_embedding.weight", (4900, 1152)),
        ("vit_model.vision_model.encoder.layers.25.mlp.fc1.weight", (4304, 1152)),
        ("vit_model.vision_model.encoder.layers.25.layer_norm2.bias", (1152,)),
        ("vit_model.vision_model.post_layernorm.weight", (1152,)),
        ("connector.fc1.weight", (3584, 1152)),
    ],
)
def test_published_names_and_shapes(name: str, shape: tuple[int, ...]) -> None:
    assert {e.torch: e.torch_shape for e in table.model_table(CFG)}[name] == shape


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.conv_in.weight", (128, 3, 3, 3)),
        ("encoder.down.1.block.0.nin_shortcut.weight", (256, 128, 1, 1)),
        ("encoder.down.2.downsample.conv.weight", (512, 512, 3, 3)),
        ("decoder.up.0.block.0.nin_shortcut.weight", (128, 256, 1, 1)),
        ("decoder.up.3.upsample.conv.bias", (512,)),
        ("decoder.mid.attn_1.proj_out.weight", (512, 512, 1, 1)),
        ("encoder.norm_out.weight", (512,)),
        ("decoder.conv_out.weight", (3, 128, 3, 3)),
    ],
)
def test_published_autoencoder_names_and_shapes(name: str, shape: tuple[int, ...]) -> None:
    assert {e.torch: e.torch_shape for e in table.autoencoder_table(CFG.autoencoder)}[name] == shape


def test_table_covers_the_reference_files_exactly(golden_dir: Path) -> None:
    cfg = store.load_config(golden_dir)
    for file, entries in (
        ("ema.safetensors", table.model_table(cfg)),
        ("ae.safetensors", table.autoencoder_table(cfg.autoencoder)),
    ):
        stored = {n: t.shape for n, t in open_file(golden_dir / file).tensors.items()}
        for name in table.frozen_tables(cfg):
            stored.pop(name, None)
        assert stored == {e.torch: e.torch_shape for e in entries}


def test_layouts_are_inverse_of_each_other() -> None:
    import numpy as np

    for entry in (*table.model_table(CFG), *table.autoencoder_table(CFG.autoencoder)):
        x = np.broadcast_to(np.float32(0), entry.torch_shape)
        assert entry.from_torch(x).shape == entry.shape
        assert entry.to_torch(entry.from_torch(x)).strides == x.strides
