"""The workshop: where the mini world, the mini model and the study of both are made. It is not part of the package.

Imports run from here into ``unichar_jax`` and never back; what ships are the files that this writes.
"""
