"""Random PyTorch weights for comparisons, and their way into this package's modules.

These tests need the ``torch`` extra. They use no reference numbers of the project: both sides get the
same random weights, and whatever PyTorch computes is right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from unichar_jax.checkpoint.table import Entry

TOLERANCE = 1e-5

torch.set_num_threads(1)  # tiny models: a second thread only waits for the first


def randomize(module: Any, seed: int = 0) -> Any:
    """Draws every parameter (norm scales around 1, all else around 0), so that none escapes comparison."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
            centre = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
            p.copy_(centre + scale * noise)
    return module.eval()


def numpy_tensors(module: Any, prefix: str = "") -> dict[str, np.ndarray]:
    return {prefix + n: p.detach().numpy() for n, p in module.named_parameters()}


def numpy_gradients(module: Any, prefix: str = "") -> dict[str, np.ndarray]:
    return {prefix + n: p.grad.numpy() for n, p in module.named_parameters() if p.grad is not None}


def names(entries: tuple[Entry, ...]) -> set[str]:
    return {e.torch for e in entries}
