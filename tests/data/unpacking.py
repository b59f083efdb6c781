"""The inverse of ``collate``: what a packed batch holds, sample by sample."""

from __future__ import annotations

import jax
import numpy as np

from unichar_jax.data.layout import Tokens
from unichar_jax.models.streams import Batch, LatentStream, TextStream, VitStream


def unpack(batch: Batch) -> list[list[Tokens]]:
    """Inverse of ``collate``: the samples of every row, in their order."""
    streams = (batch.text, batch.vit, batch.latent)
    rows = []
    for r in range(batch.text.ids.shape[0]):
        row = []
        count = max((int(s.meta.segment[r].max(initial=0)) for s in streams), default=0)
        for number in range(1, count + 1):
            taken = [_take(stream, r, number) for stream in streams]
            for stream in taken:
                stream.meta.segment[:] = 1
            row.append(Tokens(*taken))
        rows.append(row)
    return rows


def _take(stream: TextStream | VitStream | LatentStream, row: int, number: int):
    chosen = np.asarray(stream.meta.segment[row]) == number
    return jax.tree.map(lambda x: np.asarray(x[row])[chosen], stream)
