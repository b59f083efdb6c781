"""From a run's folder to what works with it: an engine, drawing settings, the character it was trained on.

A run says everything in its ``run.json`` (``checkpoint.runs``), what it started from too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from unichar_jax.checkpoint import runs
from unichar_jax.errors import UserError

if TYPE_CHECKING:
    from unichar_jax.data.portraits import Portrait
    from unichar_jax.sampling.engine import Engine
    from unichar_jax.sampling.flow import FlowSettings
    from unichar_jax.sampling.session import Persona


Weights = Literal["int8"] | None
"""How the decoder's weights are held: as stored, or in eight bits."""


def load_engine(
    path: Path,
    dtype: str | None = None,
    loras: Mapping[str, Path] | None = None,
    *,
    as_shipped: bool = False,
    weights: Weights = None,
) -> Engine:
    """The engine of a run (its latest step, averaged weights if kept) or of a model directory.

    Args:
      path: the run or the directory.
      dtype: to compute in (default: float32 for a small model, bfloat16 for one of BAGEL's size).
      loras: folders of adapters by the name of their character.
      as_shipped: as in ``EngineConfig``.
      weights: "int8" for weights of eight bits (``models/int8.py``).
    """
    from unichar_jax.checkpoint import lora, store
    from unichar_jax.config.compute import Compute
    from unichar_jax.sampling.engine import Engine, EngineConfig

    step = runs.resolve(path)
    dtype = dtype or ("float32" if is_small(path) else "bfloat16")
    cfg = store.load_config(step)
    opened = {
        name: lora.open_lora(folder, cfg) for name, folder in (loras or {}).items()
    }  # before gigabytes are
    compute = Compute(dtype=dtype, attention="auto")
    engine = Engine.load(step, EngineConfig(as_shipped=as_shipped), compute, runs.weights_item(step), weights)
    for name, source in opened.items():
        engine.add_character(name, source.folder)
    return engine


def lora_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders of adapters by name: their own, or that of the run they are the ``lora`` of; also ``NAME=FOLDER``.

    Raises:
      UserError: two have one name, or it is "base".
    """
    from unichar_jax.checkpoint.lora import FOLDER

    named: dict[str, Path] = {}
    for given in folders:
        name, sign, rest = str(given).partition("=")
        folder = Path(rest if sign else given)
        if not sign:
            at = folder.absolute()
            name = at.parent.name if at.name == FOLDER else at.name
        if name in (*named, "base"):
            raise UserError(f"{folder}: the name '{name}' is taken; choose one: --lora NAME={folder}")
        named[name] = folder
    return named


def portraits(run: Path, character: Path | None = None) -> list[Portrait]:
    """Who a run plays: the character whose folder the caller names, or those it was trained on."""
    from unichar_jax.data import portraits
    from unichar_jax.data.rolescape import read_character

    return portraits.kept(run) if character is None else [portraits.Portrait.of(read_character(character))]


def run_persona(
    run: Path, character: Path | None = None, description: str | None = None, opening: str | None = None
) -> Persona | None:
    """The same as a persona (of several characters the first); ``description`` and ``opening`` replace what is
    there, and alone make one."""
    from unichar_jax.sampling.session import Persona

    for who in portraits(run, character):
        return Persona(who.name, description or who.description, who.opening if opening is None else opening)
    return None if description is None else Persona("the character", description, opening or "")


def lora_persona(
    folder: Path, character: Path | None = None, description: str | None = None, opening: str | None = None
) -> Persona | None:
    """Who adapters play: the caller's word first, then what lies in their folder, then the run they are in."""
    from unichar_jax.checkpoint import lora
    from unichar_jax.sampling.session import Persona

    who = lora.character_of(folder)
    if character is None and who is not None:
        return Persona(
            who["name"], description or who["description"], who["opening"] if opening is None else opening
        )
    return run_persona(folder.absolute().parent, character, description, opening)


def is_small(path: Path) -> bool:
    """Whether the model draws with few latents, as those for laptops do."""
    from unichar_jax.checkpoint import store

    return store.load_config(runs.resolve(path)).max_latent_size <= 16


def flow_settings(steps: int, guidance: float, run: Path) -> FlowSettings:
    """Drawing settings; a small model's few latents want no resolution shift."""
    from unichar_jax.sampling.flow import FlowSettings, Guidance

    small = is_small(run)
    return FlowSettings(
        steps + 1, 1.0 if small else 3.0, Guidance(guidance, interval=(0.0, 1.0) if small else (0.4, 1.0))
    )


def training_data(run: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The data folder that a run was trained on, and its characters; (None, ()) if that is not known."""
    from unichar_jax.data.portraits import trained_on

    return trained_on(runs.read_info(run))
