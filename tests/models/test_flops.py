"""What a batch asks for, counted from its metadata."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from tests.training.batches import random_batch
from unichar_jax.config.model import model_preset
from unichar_jax.models import flops
from unichar_jax.models.streams import TokenMeta, visible


def _work(batch) -> flops.Work:
    return flops.Work(*jax.jit(lambda b: dataclasses.astuple(flops.work_of(b)))(batch))


def test_useful_work_is_what_the_mask_shows():
    batch = random_batch(model_preset("debug"), rows=3)
    work = _work(batch)
    metas = (batch.text.meta, batch.vit.meta, batch.latent.meta)
    whole = TokenMeta.concatenate(*metas)
    assert [work.text, work.vit, work.latent] == [int((m.segment != 0).sum()) for m in metas]
    assert work.pairs == int(visible(whole, whole).sum())
    vit = jax.tree.map(np.asarray, batch.vit.meta)
    images = np.stack([vit.segment, vit.block], -1)[vit.segment != 0]
    rows = np.nonzero(vit.segment)[0]
    _, sizes = np.unique(np.c_[rows, images], axis=0, return_counts=True)
    assert work.vit_pairs == (sizes**2).sum()
    assert work.labelled == int((np.asarray(batch.text.weight) > 0).sum())


def test_work_in_chunks_is_work_at_once(monkeypatch):
    batch = random_batch(model_preset("debug"), rows=2)
    whole = _work(batch)
    monkeypatch.setattr(flops, "_CHUNK", 7)
    assert _work(batch) == whole
