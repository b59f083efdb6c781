"""Judges of pictures, the same for rewards and for metrics."""
