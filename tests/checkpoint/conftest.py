"""A small BAGEL directory to convert: the reference weights, with a tokenizer that fits them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from pathlib import Path

import pytest

from unichar_jax.checkpoint.safetensors_io import open_file, write_file
from unichar_jax.config.model import ModelConfig

REPOSITORY = Path(__file__).resolve().parents[2]
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The reference weights that the parity tests read (UNICHAR_GOLDEN_DIR)."""
    return Path(os.environ.get("UNICHAR_GOLDEN_DIR", REPOSITORY / "tests" / "golden" / "tiny"))


def special_ids(folder: Path) -> tuple[int, ...]:
    """The ids that the model of ``folder`` gives ``SPECIAL``."""
    return dataclasses.astuple(ModelConfig.from_bagel(folder).special_tokens)


def write_tokenizer(folder: Path, special: tuple[str, ...] = SPECIAL) -> None:
    """A byte-level BPE tokenizer of single bytes around the model's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = dict(zip(special, special_ids(folder), strict=True))
    free = (i for i in itertools.count() if i not in vocabulary.values())
    plain = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary |= dict(zip(plain, list(itertools.islice(free, len(plain))), strict=True))
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", additional_special_tokens=list(special)
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def _bagel_template(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bagel") / "base"
    folder.mkdir()
    for name in ("llm_config.json", "vit_config.json", "extra_config.json"):
        shutil.copyfile(golden_dir / name, folder / name)
    for name in ("ema.safetensors", "ae.safetensors"):
        shutil.copyfile(golden_dir / name, folder / name)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def bagel(_bagel_template: Path, tmp_path: Path) -> Path:
    """A complete small BAGEL directory, to read or spoil."""
    return shutil.copytree(_bagel_template, tmp_path / "bagel")


def tensors_of(path: Path) -> dict:
    file = open_file(path)
    return {name: file.read(name).copy() for name in file.tensors}


def write_tensors(path: Path, tensors: dict) -> None:
    """Replaces a safetensors file."""
    write_file(path, {n: (x.shape, x.dtype) for n, x in tensors.items()}, tensors.items())
