"""Inference: caches, text decoding, drawing along the flow, the batching engine, role play."""
