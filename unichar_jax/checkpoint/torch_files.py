"""The tensors of a BAGEL directory, under BAGEL's names whatever those who saved them put around the model.

A checkpoint of a wrapped model carries the wrapper in its names: ``module.`` (DDP), ``_fsdp_wrapped_module.``,
``_orig_mod.`` (torch.compile), a second ``model.``. And the language model is also published alone, with or
without ``language_model.``. ``TorchTensors`` tells by the names that the model has, takes the wrapper off and
says so in ``notes``. A text head that is tied to the embedding is the embedding. Nothing here reads a value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from unichar_jax.checkpoint import table
from unichar_jax.checkpoint.arrays import ArrayInfo
from unichar_jax.checkpoint.safetensors_io import TensorFile, open_file
from unichar_jax.config.model import LLM_FILE, ModelConfig, has_tied_head
from unichar_jax.errors import UserError
from unichar_jax.records import Findings, read_settings, shown

AE_FILE = "ae.safetensors"
SINGLE_FILES = ("ema.safetensors", "model.safetensors")  # in order of preference, as BAGEL's loaders
INDEX_FILE = "model.safetensors.index.json"
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"

UNTIED = (
    "llm_config.json does not say that the text head is tied to the embedding. If it is, say there"
    ' "tie_word_embeddings": true. If not, the head was left out when this was saved: take that of the model that this'
    " one was trained from, with unichar convert SRC DST --base MODEL"
)

# Components that wrappers put anywhere into a name, and those that stand before all of it.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "_forward_module")
_OUTER = ("module", "model")


def model_files(folder: Path) -> list[Path]:
    """The files of a BAGEL directory that hold the unified model: one, or the shards that the index names."""
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name]
    index = folder / INDEX_FILE
    if index.is_file():
        shards = _shards_of(index)
        absent = [s for s in shards if not (folder / s).is_file()]
        if absent:
            raise UserError(
                f"{index}: names {len(shards)} shards, of which {len(absent)} are missing in {folder}:"
                f" {', '.join(absent)}. Download them again."
            )
        return [folder / s for s in shards]
    raise UserError(
        f"{folder}: no weights; expected {' or '.join(SINGLE_FILES)}, or {INDEX_FILE} with its shards."
    )


def _shards_of(index: Path) -> list[str]:
    """The files that an index names, which must be beside it."""
    found = Findings()
    record = read_settings(found, index)
    names = record.inner("weight_map")
    if record.ok and (names is None or (names.ok and not names.data)):
        record.error("weight_map", "the file of every tensor", "nothing", "download the index again")
    files = {} if names is None else names.data
    for tensor, file in files.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", file):
            record.error(
                shown(tensor), "a .safetensors file in this folder", shown(file), "correct the index"
            )
            break  # one of what may be thousands
    found.refuse()
    return sorted(set(files.values()))


class TorchTensors:
    """The tensors of one or several safetensors files by BAGEL's names; doubled names are remembered.

    Args:
      paths: the files.
      known: the names of the model, by which wrappers and a missing prefix are told; without them, names are
        taken as they are.

    Attributes:
      notes: what was done to the names, for people.
    """

    def __init__(self, paths: Iterable[Path], known: Collection[str] = ()):
        self.files: list[TensorFile] = [open_file(p) for p in paths]
        self.doubled: list[str] = []
        self.notes: list[str] = []
        self._place: dict[str, tuple[TensorFile, str]] = {}
        stored = [(file, name) for file in self.files for name in file.tensors]
        names = self._names([name for _, name in stored], known)
        for (file, name), ours in zip(stored, names, strict=True):
            if ours in self._place:
                self.doubled.append(f"{ours}: {self._place[ours][0].path.name}, {file.path.name}")
            else:
                self._place[ours] = (file, name)

    def _names(self, stored: list[str], known: Collection[str]) -> list[str]:
        """BAGEL's names: those, of the few ways to read them, of which the model knows the most."""
        if not known:
            return stored
        bare = [".".join(p for p in name.split(".") if p not in _WRAPPERS) for name in stored]
        outer = re.compile(rf"(?:(?:{'|'.join(_OUTER)})\.){{0,3}}")
        starts = {""}
        for name in bare:
            run = outer.match(name)
            parts = run.group().split(".")[:-1] if run else []
            starts |= {"".join(f"{p}." for p in parts[:n]) for n in range(1, len(parts) + 1)}

        def read(start: str, before: str) -> list[str]:
            return [before + n.removeprefix(start) if n.startswith(start) else n for n in bare]

        prefixes = ("", table.LM_PREFIX, f"{table.LM_PREFIX}model.")
        ways = [(start, before) for start in sorted(starts, key=len) for before in prefixes]
        start, before = max(ways, key=lambda way: sum(n in known for n in read(*way)))
        inside = {p for name in stored for p in name.split(".") if p in _WRAPPERS}
        left_off = [f"'{p}.'" for p in (*sorted(inside), *([start.removesuffix(".")] if start else []))]
        if left_off and not (start == "model." and before == f"{table.LM_PREFIX}model."):
            self.notes.append(
                f"the names carry {' and '.join(left_off)} of a wrapper around the model: left off"
            )
        return read(start, before)

    @property
    def infos(self) -> dict[str, ArrayInfo]:
        stored = {n: f.tensors[name] for n, (f, name) in self._place.items()}
        return {n: ArrayInfo(t.shape, t.dtype, t.file.name) for n, t in stored.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def read(self, name: str) -> np.ndarray:
        file, stored = self._place[name]
        return file.read(stored)

    def tie(self, name: str, other: str) -> None:
        """Makes a tensor that no file has the same as another."""
        self._place[name] = self._place[other]
        self.notes.append(f"{name} is tied to {other}, as {LLM_FILE} says: filled from it")


def open_model(files: Iterable[Path], cfg: ModelConfig, config_home: Path) -> TorchTensors:
    """The tensors of the unified model, or of a part of it; ``config_home`` says whether its text head is tied."""
    known = {e.torch for e in table.model_table(cfg)} | table.frozen_tables(cfg).keys()
    tensors = TorchTensors(files, known)
    if HEAD not in tensors and EMBEDDING in tensors and has_tied_head(config_home):
        tensors.tie(HEAD, EMBEDDING)
    return tensors


# -- parts of a model ------------------------------------------------------------------------------------------

BESIDE_LANGUAGE_MODEL = {"vision tower", "connector", "latent input, head and time"}


def absent_parts(src: Path, tensors: TorchTensors, entries: Sequence[table.Entry]) -> dict[str, None]:
    """The parts of the model of which a source has nothing at all, in the model's order."""
    present = {table.group_of(e.ours) for e in entries if e.torch in tensors}
    if not present:
        first = next(iter(tensors.infos), "nothing")
        raise UserError(
            f"{src}: none of its tensors has a name of BAGEL's; the first is {first}. Is this another model?"
        )
    return {group: None for e in entries if (group := table.group_of(e.ours)) not in present}


def incomplete(src: Path, dst: Path, absent: Collection[str]) -> UserError:
    if list(absent) == ["text head"]:
        return UserError(f"{src}: has no text head. {UNTIED}")
    alone = set(absent) == BESIDE_LANGUAGE_MODEL
    what = "holds the language model alone" if alone else f"lacks {', '.join(absent)}"
    return UserError(
        f"{src}: {what}. Give the model it was trained from: unichar convert {src} {dst} --base BAGEL_DIRECTORY"
    )


def refuse_language_model_alone(src: Path, dst: Path, tensors: TorchTensors) -> None:
    """What can be told of a source without settings, whose sizes are not known."""
    names = tensors.infos
    if any("layers.0.self_attn" in n for n in names) and not any("vae2llm" in n for n in names):
        raise incomplete(src, dst, BESIDE_LANGUAGE_MODEL)
