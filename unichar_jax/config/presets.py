"""Experiments by name: TOML files in ``configs/``, overridden field by field.

A file holds only what differs from the dataclass's defaults; tables are sub-configurations. ``load`` refuses
unknown fields with the closest name. The files ship in the package too, so the command works outside a
checkout.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from unichar_jax.errors import UserError, did_you_mean

C = TypeVar("C")


def resource_dir(name: str) -> Path:
    """A directory that ships with the project (``configs``, ``checkpoints``): in the wheel, or in the
    checkout."""
    package = Path(__file__).parents[1]
    for candidate in (package / f"_{name}", package.parent / name):
        if candidate.is_dir():
            return candidate
    raise UserError(f"'{name}' was not found beside the package; reinstall unichar-jax.")


def available() -> dict[str, Path]:
    return {p.stem: p for p in sorted(resource_dir("configs").glob("*.toml"))}


def find(name_or_path: str) -> Path:
    """The file of a preset name, or a path to a TOML file."""
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UserError(f"configuration {path}: file not found.")
        return path
    presets = available()
    if name_or_path not in presets:
        raise UserError(
            f"configuration '{name_or_path}' is unknown{did_you_mean(name_or_path, presets)}; expected a"
            f" path to a .toml file or one of {', '.join(presets)}."
        )
    return presets[name_or_path]


def load(cls: type[C], name_or_path: str) -> C:
    """Reads an experiment file into a frozen dataclass."""
    return from_dict(cls, _tree(name_or_path), where=str(find(name_or_path)))


def is_of(cls: type, name_or_path: str) -> bool:
    """Whether all fields of an experiment file are this dataclass's: which stage a file is of."""
    return _tree(name_or_path).keys() <= {f.name for f in dataclasses.fields(cls)}


def runs() -> dict[str, str]:
    """The run's directory of each preset -> the base that it starts from, where the preset names both."""
    trees = map(_tree, available())
    return {t["run_dir"]: t["base"] for t in trees if "run_dir" in t and "base" in t}


def _tree(name_or_path: str) -> dict[str, Any]:
    path = find(name_or_path)
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"configuration {path}: not valid TOML ({error}).") from None


def from_dict(cls: type[C], tree: dict[str, Any], where: str = "configuration") -> C:
    """Builds a (nested) dataclass from plain values; unknown fields are errors."""
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in names:
            raise UserError(
                f"{where}: field '{key}' is unknown{did_you_mean(key, names)}; {cls.__name__} has"
                f" {', '.join(sorted(names))}."
            )
        values[key] = _coerce(hints[key], value, f"{where}: {key}")
    return cls(**values)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        return None if value is None else _coerce(options[0], value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a table of fields, got {value!r}.")
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise UserError(
                f"{where}: expected one of {', '.join(map(repr, options))}, got {value!r}"
                f"{did_you_mean(str(value), map(str, options))}."
            )
        return value
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(_coerce(inner, v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}.")
    return value


def folder_or_shipped(name: str | Path) -> Path:
    """A model's folder as given, or the one of that name that ships (which may not exist)."""
    given = Path(name)
    return given if given.is_dir() else resource_dir("checkpoints") / given


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
