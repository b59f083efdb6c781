"""UniChar-JAX: customised multimodal role-play with BAGEL-7B-MoT in JAX."""

__version__ = "0.1.0"
