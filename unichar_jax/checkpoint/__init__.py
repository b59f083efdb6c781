"""Weights on disk: Orbax checkpoints of runs, conversion from and to PyTorch, adapters."""
