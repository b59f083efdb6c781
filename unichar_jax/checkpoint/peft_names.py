"""PEFT's side of adapters: what it calls modules and tensors, and the options of ``adapter_config.json``.

Modules are named as BAGEL's PyTorch code names them, by the same table that converts checkpoints. Options that
would change what adapters compute are refused by name, never passed over.

Source: the file layout of the ``peft`` package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unichar_jax.checkpoint import table
from unichar_jax.config.model import ModelConfig
from unichar_jax.errors import UserError
from unichar_jax.models import lora
from unichar_jax.records import Findings, Record, read_settings, shown

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
LEAVES = {lora.A: "lora_A.weight", lora.B: "lora_B.weight"}
# Options that say nothing of what finished adapters compute. Every other one, known or not, must be off, or what is
# computed would not be W + (alpha / r) B A on the base as it is.
_WITHOUT_EFFECT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "layers_pattern", "lora_dropout"),
        *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
    )
)
_READ = frozenset(("peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern"))
_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # The others subtract from the base's weights what they start from, or leave the base another one.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}


def projections(cfg: ModelConfig) -> dict[str, table.Entry]:
    """PyTorch name of every projection that can carry an adapter -> the entry of its kernel."""
    pattern = re.compile(r"decoder\.layers\.\d+\.\w+\.\w+\.kernel")
    return {e.torch.removesuffix(".weight"): e for e in table.model_table(cfg) if pattern.fullmatch(e.ours)}


def place_of(kernel: str) -> str:
    """``decoder.layers.3.und.q.kernel`` -> ``und.q``."""
    return ".".join(kernel.split(".")[3:5])


def target_modules(modules: Iterable[str]) -> str:
    """A regular expression for exactly these modules of every layer (the vision tower has a q_proj, too)."""
    stem = f"{table.LM_PREFIX}model.layers."
    kinds = sorted({m.removeprefix(stem).split(".", 1)[1] for m in modules})
    return rf"{re.escape(stem)}\d+\.(?:{'|'.join(map(re.escape, kinds))})"


def config_of(rank: int, modules: Iterable[str], base: str) -> dict[str, Any]:
    """The content of ``adapter_config.json`` for adapters with their factor folded in."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # the factor alpha / r is in the arrays
        "lora_dropout": 0.0,
        "target_modules": target_modules(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The options of a folder; a ``UserError`` for what is absent, broken or not supported."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: no {CONFIG_FILE} here. Expected a folder of adapters: 'lora' in a run with trainable ="
            " 'lora', or one that 'unichar convert --lora' or PEFT wrote."
        )
    found = Findings()
    config = read_settings(found, path)
    if config.ok:
        _check(config)
    found.refuse()
    return config.data


def _check(config: Record) -> None:
    if config.data.get("peft_type") != "LORA":
        _wrong(config, "peft_type", "LORA")
    rank, targets = config.data.get("r"), config.data.get("target_modules")
    if type(rank) is not int or rank < 1:
        _wrong(config, "r", "a positive rank")
    config.number("lora_alpha", None, 1e-9, 1e9)
    config.flag("use_rslora")
    if not isinstance(config.data.get("rank_pattern") or {}, dict):
        _wrong(config, "rank_pattern", "ranks by name")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except (re.error, OverflowError, RecursionError):
            _wrong(config, "target_modules", "a regular expression")
    elif not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        _wrong(config, "target_modules", "names, or a regular expression")
    for option in config.data.keys() - _WITHOUT_EFFECT - _READ:
        value, off = config.data[option], _OFF.get(option, (None, False, [], {}))
        if not any(type(value) is type(o) and value == o for o in off):
            remedy = "merge these adapters in PyTorch, and make new ones: unichar convert --lora RANK MERGED BASE DST"
            is_not = f"{option} = {shown(value)} is not supported"
            config.error(option, shown(off[0]), shown(value), f"{is_not}; {remedy}")


def _wrong(config: Record, option: str, expected: str) -> None:
    if option in config.data:
        config.error(option, expected, str(config.data[option])[:60], "use what PEFT wrote")
    else:
        config.error(option, expected, "nothing", "this is not a configuration of PEFT")


def parse(name: str, modules: Mapping[str, Any]) -> tuple[str | None, str]:
    """Module and leaf of a tensor; PEFT around BAGEL's language model alone leaves out its prefix."""
    for leaf, ending in LEAVES.items():
        if name.startswith(PREFIX) and name.endswith(f".{ending}"):
            module = name[len(PREFIX) : -len(ending) - 1]
            for candidate in (module, table.LM_PREFIX + module):
                if candidate in modules:
                    return candidate, leaf
    return None, ""


def wanted(targets: str | Sequence[str], modules: Iterable[str]) -> set[str]:
    """The modules that ``target_modules`` names, by PEFT's rules: a full match, or the ends of names."""
    if targets == "all-linear":
        return set(modules)
    bare = {m: m.removeprefix(table.LM_PREFIX) for m in modules}
    if isinstance(targets, str):
        return {m for m, short in bare.items() if re.fullmatch(targets, m) or re.fullmatch(targets, short)}
    return {m for m, short in bare.items() if any(t in (m, short) or m.endswith(f".{t}") for t in targets)}
