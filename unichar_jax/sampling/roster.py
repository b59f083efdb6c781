"""Who an engine can be: one base, and any number of characters that are small additions to it.

The base's arrays are held once. All models of a roster have adapters in the same places and of the same rank,
padded with zeros, so that they are arguments of the same compiled programs: another character costs its
adapters, and changing between characters costs nothing. Thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from unichar_jax.errors import UserError, require_known
from unichar_jax.models import lora, params
from unichar_jax.models.unified import UnifiedModel

BASE = "base"
"""The name of the model that a roster is made with."""


class Roster:
    """Models by name, ready to compute: weights in the dtype that they compute in.

    Attributes:
      models: what each name stands for; never changed in place.
    """

    def __init__(self, base: UnifiedModel):
        self.models: Mapping[str, UnifiedModel] = {BASE: ready(base)}
        self._plain = dict(self.models)  # without adapters
        self._adapters: dict[str, Mapping[str, jax.Array]] = {BASE: {}}
        self._places: lora.Places = {}
        self._identities = {BASE: BASE}
        self._added = 0
        self._lock = threading.Lock()

    def add_model(self, name: str, model: UnifiedModel) -> None:
        """Adds another whole model of the base's sizes."""
        if model.cfg != self._plain[BASE].cfg:
            raise UserError(f"model '{name}': its sizes are not those of the engine's base model.")
        self._add(name, ready(model), {})

    def add_character(self, name: str, adapters: str | Path | Mapping[str, jax.Array]) -> None:
        """Adds the base with adapters around it; see ``Engine.add_character``."""
        base = self._plain[BASE]
        if isinstance(adapters, (str, Path)):
            from unichar_jax.checkpoint import lora as lora_file  # reading checkpoints takes long to import

            home = base.embed.embedding[...].sharding
            mesh = home.mesh if isinstance(home, NamedSharding) else None
            source = (
                lora_file.open_lora(adapters, base.cfg) if isinstance(adapters, (str, Path)) else adapters
            )
            lora_file.require_base(source, params.flat(base))
            adapters = lora_file.load(source, mesh=mesh)
        self._add(name, base, {n: _cast(x, base.compute.jax_dtype) for n, x in adapters.items()})

    def remove(self, name: str) -> None:
        with self._lock:
            if self.known(name) == BASE:
                raise UserError("the base model cannot be removed; close the engine.")
            del self._plain[name], self._adapters[name]
            self.models = {n: m for n, m in self.models.items() if n != name}

    def known(self, name: str) -> str:
        """``name`` itself; a ``UserError`` if nobody has it."""
        require_known("character", name, self.models)
        return name

    def get(self, name: str) -> tuple[UnifiedModel, str]:
        """A model, and a string that will never stand for another (what is remembered of it goes by this)."""
        with self._lock:
            return self.models[self.known(name)], self._identities[name]

    def _add(self, name: str, model: UnifiedModel, adapters: Mapping[str, jax.Array]) -> None:
        with self._lock:
            if name in self.models:
                raise UserError(f"'{name}' is served already; remove it first, or choose another name.")
            places = lora.union([self._places, lora.places_in({n: x.shape for n, x in adapters.items()})])
            plain, all_adapters = self._plain | {name: model}, self._adapters | {name: adapters}
            changed = [name] if places == self._places else list(plain)
            made = {n: lora.adapted(plain[n], all_adapters[n], places) for n in changed}
            self._plain, self._adapters, self._places = plain, all_adapters, places
            self._added += 1
            self._identities[name] = f"{name}/{self._added}"
            self.models = {**self.models, **made}


def ready(model: UnifiedModel) -> UnifiedModel:
    """The model with its weights in the dtype it computes in: nothing is cast at each use."""
    return jax.tree.map(lambda x: _cast(x, model.compute.jax_dtype), model)


def _cast(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
