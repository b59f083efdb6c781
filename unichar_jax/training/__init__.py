"""Objectives, optimiser, state, step and loop of both stages."""
