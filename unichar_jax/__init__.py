"""UniChar-JAX: customised multimodal role-play with BAGEL-7B-MoT in JAX.

What a program needs to talk to a character is here by name (docs/python.md); it is imported when first asked
for, so that ``import unichar_jax`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unichar_jax.app.engines import flow_settings as flow_settings
    from unichar_jax.app.engines import load_engine as load_engine
    from unichar_jax.app.engines import run_persona as run_persona
    from unichar_jax.errors import UserError as UserError
    from unichar_jax.sampling.engine import Engine as Engine
    from unichar_jax.sampling.flow import FlowSettings as FlowSettings
    from unichar_jax.sampling.session import Persona as Persona
    from unichar_jax.sampling.session import RolePlay as RolePlay
    from unichar_jax.sampling.session import Turn as Turn
    from unichar_jax.sampling.text import TextSettings as TextSettings

PUBLIC = {  # no __all__: it would hide the submodules from the reference
    "load_engine": "app.engines",
    "run_persona": "app.engines",
    "flow_settings": "app.engines",
    "Engine": "sampling.engine",
    "RolePlay": "sampling.session",
    "Persona": "sampling.session",
    "Turn": "sampling.session",
    "TextSettings": "sampling.text",
    "FlowSettings": "sampling.flow",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'unichar_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(f"unichar_jax.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
