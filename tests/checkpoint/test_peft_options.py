"""Options of PEFT: what changes the base or the sum is refused by name, what is mistyped is one error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unichar_jax.checkpoint import lora, store
from unichar_jax.errors import UserError

from .conftest import tensors_of, write_tensors
from .test_lora import RANK, edit, random_adapters

FILE = "adapter_config.json"


@pytest.fixture
def cfg(bagel: Path):
    return store.load_config(bagel)


@pytest.fixture
def folder(cfg, tmp_path: Path) -> Path:
    lora.save(tmp_path / "lora", random_adapters(cfg), cfg, base="somewhere/BAGEL")
    return tmp_path / "lora"


def refused(folder: Path, cfg, **options: Any) -> str:
    edit(folder, **options)
    with pytest.raises(UserError) as caught:
        lora.open_lora(folder, cfg)
    return str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("init_lora_weights", kind) for kind in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda")),
        *(("init_lora_weights", kind) for kind in ("loftq", "eva", "lora_ga", "mica", "something", None, 1)),
        ("alora_invocation_tokens", [3, 4]),
        ("use_dora", True),
        ("use_dora", "true"),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("bias", None),
        ("fan_in_fan_out", True),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("layers_to_transform", 0),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("target_parameters", ["mlp.experts"]),
        ("exclude_modules", ["k_proj"]),
        ("exclude_modules", ".*k_proj"),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("loftq_config", {"loftq_bits": 4}),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"corda_method": "ipm"}),
        ("lora_ga_config", {"direction": "ArB2r"}),
        ("velora_config", {"num_groups": 2}),
        ("monteclora_config", {"sample": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("arrow_config", {"arrow_top_k": 3}),
        ("ensure_weight_tying", True),
        ("use_an_option_of_tomorrow", True),
    ],
)
def test_what_changes_the_sum_is_refused_by_name(folder: Path, cfg, option: str, value: Any) -> None:
    message = refused(folder, cfg, **{option: value})
    assert message.startswith(f"{folder / FILE}: {option}: expected ") and "\n" not in message
    assert f"{option} = {value!r} is not supported" in message and "unichar convert --lora RANK" in message


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", "revision": "main"},
        {
            "loftq_config": {},
            "megatron_core": "megatron.core",
            "layers_pattern": "layers",
            "eva_config": None,
        },
        {"peft_version": "0.21.2", "auto_mapping": {"base_model_class": "Bagel"}, "qalora_group_size": 16},
        {"trainable_token_indices": None, "exclude_modules": [], "use_an_option_of_tomorrow": None},
    ],
)
def test_what_leaves_the_sum_as_it_is_is_read(folder: Path, cfg, options: dict[str, Any]) -> None:
    edit(folder, **options)
    adapters = random_adapters(cfg)
    opened = lora.open_lora(folder, cfg)
    assert all(np.array_equal(opened.read(n), x) for n, x in adapters.items())


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("lora_alpha", "16", "lora_alpha: expected a number from 1e-09 to 1e+09, got '16'"),
        ("lora_alpha", None, "lora_alpha: expected a number from 1e-09 to 1e+09, got None"),
        ("lora_alpha", True, "lora_alpha: expected a number"),
        ("lora_alpha", 0, "lora_alpha: expected a number"),
        ("lora_alpha", float("nan"), "lora_alpha: expected a number"),
        ("lora_alpha", [16], "lora_alpha: expected a number"),
        ("target_modules", None, "target_modules: expected names, or a regular expression, got None"),
        ("target_modules", {"q_proj": 1}, "target_modules: expected names"),
        ("target_modules", ["q_proj", 3], "target_modules: expected names"),
        ("target_modules", 3, "target_modules: expected names"),
        ("target_modules", "(q_proj", "target_modules: expected a regular expression, got (q_proj"),
        ("r", "3", "r: expected a positive rank, got 3"),
        ("r", 3.0, "r: expected a positive rank"),
        ("r", True, "r: expected a positive rank"),
        ("r", None, "r: expected a positive rank, got None"),
        ("peft_type", None, "peft_type: expected LORA, got None"),
        ("peft_type", ["LORA"], "peft_type: expected LORA"),
        ("use_rslora", "true", "use_rslora: expected true or false, got a string"),
        ("rank_pattern", [1], "rank_pattern: expected ranks by name"),
    ],
)
def test_a_mistyped_option_is_one_error(folder: Path, cfg, option: str, value: Any, said: str) -> None:
    message = refused(folder, cfg, **{option: value})
    assert message.startswith(f"{folder / FILE}: {said}") and "\n" not in message


@pytest.mark.parametrize("text", ["[]", "null", "{", "", '{"r": 1, "r": 2}', "<html></html>"])
def test_a_file_that_is_no_configuration(folder: Path, cfg, text: str) -> None:
    (folder / FILE).write_text(text)
    with pytest.raises(UserError, match=f"{FILE}: "):
        lora.open_lora(folder, cfg)


def test_a_byte_order_mark_is_read(folder: Path, cfg) -> None:
    (folder / FILE).write_text("\ufeff" + (folder / FILE).read_text(), "utf-8")
    assert lora.open_lora(folder, cfg).places


def test_tensors_that_peft_would_pass_over_are_told(folder: Path, cfg) -> None:
    message = refused(folder, cfg, target_modules=["q_proj", "q_proj_moe_gen"])
    assert "mlp_moe_gen.down_proj: has tensors, but is not among target_modules" in message


def test_a_pattern_of_ranks_keeps_each_pairs_own_factor(folder: Path, cfg) -> None:
    name = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_"
    tensors = tensors_of(folder / "adapter_model.safetensors")
    tensors[f"{name}A.weight"], tensors[f"{name}B.weight"] = (
        tensors[f"{name}A.weight"][:1],
        tensors[f"{name}B.weight"][:, :1],
    )
    write_tensors(folder / "adapter_model.safetensors", tensors)
    edit(folder, rank_pattern={"layers.0.self_attn.q_proj": 1}, lora_alpha=6)
    opened, adapters = lora.open_lora(folder, cfg), random_adapters(cfg)
    short, whole = "decoder.layers.0.und.q.lora_b", "decoder.layers.1.und.q.lora_b"
    np.testing.assert_allclose(opened.read(short), adapters[short][:1] * 6, rtol=1e-6)
    np.testing.assert_allclose(opened.read(whole), adapters[whole] * (6 / RANK), rtol=1e-6)
    assert math.isclose(6 / RANK, 2)


@settings(max_examples=100, deadline=None)
@given(
    options=st.dictionaries(
        st.sampled_from(
            ["r", "lora_alpha", "target_modules", "bias", "use_rslora", "rank_pattern", "init_lora_weights"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
            ),
            max_leaves=3,
        ),
        max_size=2,
    )
)
def test_any_options_end_well_or_in_a_user_error(tmp_path_factory, options: dict[str, Any]) -> None:
    from unichar_jax.config.model import model_preset

    cfg, folder = model_preset("debug"), tmp_path_factory.getbasetemp() / "fuzzed-lora"
    if not folder.exists():
        lora.save(folder, random_adapters(cfg), cfg, base="b")
    path, good = folder / FILE, folder / "good.json"
    if not good.exists():
        good.write_text(path.read_text())
    path.write_text(json.dumps(json.loads(good.read_text()) | options))
    try:
        lora.open_lora(folder, cfg)
    except UserError:
        pass


def test_the_character_of_a_folder_is_checked(folder: Path, cfg) -> None:
    assert lora.open_lora(folder, cfg).character is None
    (folder / lora.CHARACTER_FILE).write_text('{"name": "Nova", "description": "a fox", "opening": ""}')
    assert lora.character_of(folder) == {"name": "Nova", "description": "a fox", "opening": ""}
    for text, said in (
        ("[]", "expected an object"),
        ("{}", "name: expected a string, got nothing"),
        ("{", "JSON"),
    ):
        (folder / lora.CHARACTER_FILE).write_text(text)
        with pytest.raises(UserError, match=f"{lora.CHARACTER_FILE}: .*{said}"):
            lora.character_of(folder)
