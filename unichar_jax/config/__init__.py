"""Frozen dataclasses of experiments and models, and the files of ``configs/``."""
