"""Frozen picture and text encoders that score pictures; weights come from ``checkpoint/encoders.py``."""
