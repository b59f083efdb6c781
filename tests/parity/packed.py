"""The reference's packed training sequence as a three-stream batch.

The reference interleaves all tokens in one sequence and finds them by index lists. Here each stream takes its
tokens in the sequence's order; ``sequence_index`` remembers where they were.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from tests.parity import golden
from unichar_jax.models.autoencoder import patchify
from unichar_jax.models.streams import Batch, LatentStream, TextStream, TokenMeta, VitStream


@dataclass(frozen=True)
class Packed:
    batch: Batch
    x0: jnp.ndarray
    noise: jnp.ndarray
    shift: float
    sequence_index: np.ndarray  # place in the reference's sequence of [text | vit | latent]

    def meta_in_sequence_order(self) -> TokenMeta:
        b = self.batch
        joined = TokenMeta.concatenate(b.text.meta, b.vit.meta, b.latent.meta)
        back = np.argsort(self.sequence_index)
        return TokenMeta(**{f: getattr(joined, f)[:, back] for f in joined.__dataclass_fields__})


def _fields(layout: list[dict], position: np.ndarray) -> dict[str, np.ndarray]:
    """Segment, order, block and noisy of every token of the sequence, from the samples' splits."""
    out: dict[str, list[np.ndarray]] = dict(segment=[], order=[], block=[], noisy=[])
    for s, sample in enumerate(layout):
        length = sum(sample["split_lens"])
        out["segment"].append(np.full(length, s + 1))
        out["order"].append(np.arange(length))
        for i, (n, mode) in enumerate(zip(sample["split_lens"], sample["attn_modes"], strict=True)):
            out["block"].append(np.full(n, 0 if mode == "causal" else i + 1))
            out["noisy"].append(np.full(n, int(mode == "noise")))
    fields = {k: np.concatenate(v) for k, v in out.items()}
    return dict(fields, position=position)


@functools.cache
def train_batch() -> Packed:
    g, cfg = golden.tensors(), golden.config()
    fields = _fields(golden.read_json("train_layout.json"), g["train.position_ids"])

    def meta(index: np.ndarray) -> TokenMeta:
        return TokenMeta(**{k: jnp.asarray(v[index][None], jnp.int32) for k, v in fields.items()})

    text_at, vit_at = g["train.text_indexes"], g["train.vit_token_indexes"]
    latent_at = g["train.vae_token_indexes"]
    length = len(fields["segment"])
    targets, weight = np.zeros(length, np.int32), np.zeros(length, np.float32)
    targets[g["train.ce_loss_indexes"]] = g["train.label_ids"]
    weight[g["train.ce_loss_indexes"]] = 1
    drawn = np.zeros(length, np.float32)
    drawn[g["train.mse_loss_indexes"]] = 1

    p = cfg.latent_patch_size
    x0 = []
    for padded, (h, w) in zip(g["train.padded_latent"], g["train.latent_shapes"], strict=True):
        cropped = padded.transpose(1, 2, 0)[: h * p, : w * p]
        x0.append(np.asarray(patchify(cropped, p)))
    x0 = np.concatenate(x0)[None]

    text = TextStream(
        jnp.asarray(g["train.text_ids"][None], jnp.int32),
        meta(text_at),
        jnp.asarray(targets[text_at][None]),
        jnp.asarray(weight[text_at][None]),
        jnp.zeros((1, len(text_at)), jnp.int32),
    )
    vit = VitStream(
        jnp.asarray(g["train.vit_tokens"][None]),
        jnp.asarray(g["train.vit_position_ids"][None], jnp.int32),
        meta(vit_at),
    )
    latent = LatentStream(
        jnp.asarray(x0),
        jnp.full(x0.shape, -jnp.inf),
        jnp.asarray(g["train.latent_position_ids"][None], jnp.int32),
        jnp.asarray(g["train.timesteps_normal"][None]),
        meta(latent_at),
        jnp.asarray(drawn[latent_at][None]),
        jnp.zeros((1, len(latent_at)), jnp.int32),
    )
    shift = golden.read_json("extra_config.json")["timestep_shift"]
    index = np.concatenate([text_at, vit_at, latent_at])
    noise = jnp.asarray(g["train.noise"][None])
    return Packed(Batch(text, vit, latent), jnp.asarray(x0), noise, shift, index)
