"""Objectives, optimiser, state, step and loop; both stages, and the making of the mini base."""
