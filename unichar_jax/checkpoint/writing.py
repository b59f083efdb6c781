"""Writing models to disk, array by array, into a place that appears only when it is whole.

``staging`` gives a temporary folder beside the destination and renames it at the end, so that a failure
of any kind leaves the destination as it was. ``write_item`` writes a flat Orbax tree in groups of
bounded size; ``write_torch`` writes BAGEL's safetensors, one file or shards with an index. Both take
arrays one at a time, as views in any layout. What the arrays are is decided by the callers
(``convert.py``, ``store.py``).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unichar_jax import __version__
from unichar_jax.checkpoint import runs, weights
from unichar_jax.checkpoint.arrays import grouped, materialize
from unichar_jax.checkpoint.safetensors_io import write_file
from unichar_jax.checkpoint.torch_files import INDEX_FILE, SINGLE_FILES
from unichar_jax.checkpoint.weights import ArrayInfo, array_bytes
from unichar_jax.config.model import ModelConfig
from unichar_jax.errors import UserError

FORMAT_VERSION = 1
FORMAT_FILE = "unichar.json"
CONFIG_FILES = ("llm_config.json", "vit_config.json", "extra_config.json")
OTHER_CONFIG_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_CHUNK_BYTES = 32 << 20  # a host that needs a slice of an array reads no more than the chunks it touches

OnBytes = Callable[[int], None]


# -- destinations -------------------------------------------------------------------------------------------


def check_destination(dst: Path, nbytes: int) -> None:
    """Refuses a destination that holds something, and one whose disk cannot hold ``nbytes``."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: exists already. Name a new directory, or remove that one first.")
    parent = dst.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise UserError(
            f"{dst}: {nbytes / 2**30:.1f} GiB are to be written, but the disk has {free / 2**30:.1f} GiB"
            " free. Free some, or name a directory on another disk."
        )


@contextlib.contextmanager
def staging(dst: str | Path, nbytes: int = 0) -> Iterator[Path]:
    """A folder beside ``dst`` that becomes ``dst`` when the block ends well, and is removed otherwise."""
    dst = Path(dst).absolute()
    check_destination(dst, nbytes)
    dst.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dst.name}.unfinished-", dir=dst.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(dst)  # over an empty directory too
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- Orbax --------------------------------------------------------------------------------------------------


def write_item(
    folder: Path,
    arrays: Iterable[tuple[str, np.ndarray]],
    dtype: Any = None,
    on_bytes: OnBytes | None = None,
    group_bytes: int | None = None,
) -> None:
    """Writes ``(name, array)`` pairs as one Orbax checkpoint, holding at most twice one group in memory.

    Orbax keeps a copy of all that a save call is given until the call ends, so each group, of at most
    ``group_bytes`` (by default ``weights.GROUP_BYTES``) or one array, is a partial save of its own.
    """
    from orbax.checkpoint import v1 as ocp

    def written_bytes(pair: tuple[str, np.ndarray]) -> int:
        return pair[1].size * np.dtype(dtype or pair[1].dtype).itemsize

    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.use_compression = False  # bfloat16 weights hardly compress
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    with context:
        for views in grouped(arrays, written_bytes, group_bytes or weights.GROUP_BYTES):
            group: dict[str, np.ndarray] = {}
            while views:  # popping frees each source once it is copied
                name, view = views.pop(0)
                group[name] = materialize(view, dtype)
            del view
            ocp.partial.save(folder, group)
            if on_bytes is not None:
                on_bytes(sum(x.nbytes for x in group.values()))
        ocp.partial.finalize(folder)


# -- safetensors --------------------------------------------------------------------------------------------


def shard(specs: Mapping[str, ArrayInfo], max_bytes: int | None) -> list[list[str]]:
    """Names in files of at most ``max_bytes`` (or one tensor); one file without a limit."""
    return list(grouped(specs, lambda n: array_bytes(specs[n]), max_bytes or math.inf)) or [[]]


def write_torch(
    folder: Path,
    specs: Mapping[str, ArrayInfo],
    read: Callable[[Sequence[str]], Iterable[tuple[str, np.ndarray]]],
    max_shard_bytes: int | None = None,
    on_bytes: OnBytes | None = None,
) -> list[str]:
    """Writes BAGEL's model: ``ema.safetensors`` or shards, and the index that names the file of every tensor.

    Args:
      folder: where.
      specs: the tensors in order, with shapes and dtypes.
      read: gives the tensors of a list of names, one at a time, as views in any layout.
      max_shard_bytes: the size above which the model is split.
      on_bytes: called with the bytes of each tensor written.

    Returns:
      The file names.
    """
    shards = shard(specs, max_shard_bytes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [SINGLE_FILES[0]]
    for file, names in zip(files, shards, strict=True):
        write_file(
            folder / file,
            {n: (specs[n].shape, specs[n].dtype) for n in names},
            read(names),
            on_write=on_bytes,
        )
    index = {
        "metadata": {"total_size": sum(map(array_bytes, specs.values()))},
        "weight_map": {n: f for f, names in zip(files, shards, strict=True) for n in names},
    }
    write_json(folder / INDEX_FILE, index)
    return files


# -- what goes beside the weights ---------------------------------------------------------------------------


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_companions(
    folder: Path,
    cfg: ModelConfig,
    config_from: Path | None,
    tokenizer_from: Path | None,
    base: Path | None = None,
) -> None:
    """Configs, copied from one folder or written from ``cfg``, and tokenizer files, copied from another.

    What is BAGEL's own beside them comes from the first of ``config_from`` and ``base`` that has it; a run of
    version 0.1.0 has its settings under one of these names, and they are not BAGEL's.
    """
    wanted = [(name, (config_from,)) for name in CONFIG_FILES]
    wanted += [(name, (config_from, base)) for name in OTHER_CONFIG_FILES]
    wanted += [(name, (tokenizer_from,)) for name in TOKENIZER_FILES]
    for name, homes in wanted:
        given = (home / name for home in homes if home is not None)
        found = next((p for p in given if p.is_file() and not runs.is_settings(p)), None)
        if found is not None:
            shutil.copyfile(found, folder / name)
    for name, content in cfg.to_bagel().items():
        if not (folder / name).exists():
            write_json(folder / name, content)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def write_format(folder: Path, **content: Any) -> None:
    """``unichar.json``: what wrote the directory, from what, in which dtypes."""
    head = {"format_version": FORMAT_VERSION, "written_by": f"unichar_jax {__version__}"}
    write_json(folder / FORMAT_FILE, head | content)


def read_format(folder: Path) -> dict[str, Any]:
    """The content of ``unichar.json`` ({} where there is none); a newer format version is a ``UserError``."""
    path = folder / FORMAT_FILE
    if not path.is_file():
        return {}
    content = json.loads(path.read_text("utf-8"))
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version}, this is unichar_jax {__version__}, which reads version"
            f" {FORMAT_VERSION}. Install the version that wrote it ({content.get('written_by')})."
        )
    return content
