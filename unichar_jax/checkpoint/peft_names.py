"""PEFT's side of adapters: what it calls modules and tensors, and the options of ``adapter_config.json``.

Modules are named as BAGEL's PyTorch code names them, by the same table that converts checkpoints. Options that
would change what adapters compute are refused by name, never passed over.

Source: the file layout of the ``peft`` package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unichar_jax.checkpoint import table
from unichar_jax.config.model import ModelConfig
from unichar_jax.errors import UserError
from unichar_jax.models import lora

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
LEAVES = {lora.A: "lora_A.weight", lora.B: "lora_B.weight"}
# Options of PEFT that change what is computed, with the values that leave it at W + (alpha / r) B A.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
    "layer_replication": ([], None),
    "target_parameters": ([], None),
    "exclude_modules": ([], None),
    "trainable_token_indices": ([], {}, None),
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
    try:
        config = json.loads(path.read_text("utf-8"))
        rank, kind, _, _ = (config[k] for k in ("r", "peft_type", "lora_alpha", "target_modules"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a configuration of PEFT ({type(error).__name__}: {error}).") from None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type: expected LORA, got {kind}.")
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{path}: r: expected a positive rank, got {rank}.")
    for option, plain in _PLAIN.items():
        if option in config and config[option] not in plain:
            raise UserError(
                f"{path}: {option} = {config[option]!r} is not supported; expected {plain[0]!r}. Merge these"
                " adapters in PyTorch, and make new ones: unichar convert --lora RANK MERGED BASE DST"
            )
    return config


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
    return {m for m in bare if any(m == t or m.endswith(f".{t}") for t in targets)}
