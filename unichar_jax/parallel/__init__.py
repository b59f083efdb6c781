"""Meshes, several hosts, and programs compiled for hardware that is not here."""
