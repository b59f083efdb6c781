"""The JSON files of a model are checked like data: each fault is one line with file, key, expected and got."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unichar_jax.checkpoint import encoders
from unichar_jax.config.model import ModelConfig, model_preset
from unichar_jax.errors import UserError

LLM, VIT, EXTRA = "llm_config.json", "vit_config.json", "extra_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in model_preset("mini").to_bagel().items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def edit(folder: Path, name: str, *absent: str, **values: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in absent}))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        ModelConfig.from_bagel(folder)
    return str(caught.value)


NOT_SIZES = ["6", 6.0, 0, -1, True, None, [6], {}, "six", 2**40, 10**400, float("nan"), float("inf")]


@pytest.mark.parametrize("value", NOT_SIZES, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize(
    ("file", "key"),
    [
        (LLM, "num_hidden_layers"),
        (LLM, "num_key_value_heads"),
        (LLM, "vocab_size"),
        (VIT, "patch_size"),
        (VIT, "num_hidden_layers"),
        (EXTRA, "max_latent_size"),
        (EXTRA, "vit_max_num_patch_per_side"),
    ],
)
def test_a_size_is_a_whole_number_in_its_range(folder: Path, file: str, key: str, value: Any) -> None:
    edit(folder, file, **{key: value})
    message = refused(folder)
    assert message.startswith(f"{folder / file}: {key}: expected a whole number from ")
    assert ", got " in message and "\n" not in message


@pytest.mark.parametrize("value", ["1e6", 0, -5.0, None, True, [1e6], float("nan"), float("inf"), 10**400])
def test_the_rotary_base_is_a_number(folder: Path, value: Any) -> None:
    edit(folder, LLM, rope_theta=value)
    assert f"{LLM}: rope_theta: expected a number from 1 to 1e+12, got " in refused(folder)
    edit(folder, LLM, "rope_theta", rope_parameters={"rope_type": "default", "rope_theta": value})
    assert f"{LLM}: rope_parameters: rope_theta: expected a number from 1 to 1e+12, got " in refused(folder)


@pytest.mark.parametrize("file", [LLM, VIT])
def test_absent_keys_are_all_named(folder: Path, file: str) -> None:
    edit(folder, file, "hidden_size", "num_attention_heads")
    lines = refused(folder).split("\n")
    assert [line.split(": ")[1] for line in lines] == ["hidden_size", "num_attention_heads"]
    assert all("got nothing" in line for line in lines)


def test_an_absent_rotary_base_is_not_guessed(folder: Path) -> None:
    """Without it transformers takes 10,000 and BAGEL has 1,000,000."""
    edit(folder, LLM, "rope_theta")
    assert "rope_theta: expected a number from 1 to 1e+12, got nothing" in refused(folder)


# -- names that change the mathematics ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "value",
    [
        {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0},
        {"type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"type": "mrope", "mrope_section": [16, 24, 24]},
        {"rope_type": "default", "mrope_section": [16, 24, 24]},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "default", "factor": 8.0},
        {"rope_type": None, "type": "llama3"},
        {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {"rope_type": "default"}},
    ],
    ids=lambda v: "-".join(v),
)
def test_scaled_rotary_positions_are_refused_under_both_names(folder: Path, name: str, value: dict) -> None:
    edit(folder, LLM, *({"rope_theta"} & value.keys() if name == "rope_parameters" else ()), **{name: value})
    message = refused(folder)
    assert f"{folder / LLM}: {name}: expected none, or the default type, got " in message
    assert message.count(name) == 1


@pytest.mark.parametrize("value", ["yarn", [], ["yarn"], 4.0, True])
def test_rotary_settings_of_another_type_are_one_error(folder: Path, value: Any) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        edit(folder, LLM, **{name: value})
        assert f"{LLM}: {name}: expected an object" in refused(folder)
        edit(folder, LLM, name)


def test_plain_rotary_positions_are_read_under_both_names(folder: Path) -> None:
    edit(folder, LLM, rope_scaling=None, rope_parameters=None)
    assert ModelConfig.from_bagel(folder).decoder.rope_theta == 1e6
    edit(folder, LLM, rope_scaling={"type": "default"})
    assert ModelConfig.from_bagel(folder).decoder.rope_theta == 1e6
    edit(folder, LLM, "rope_theta", rope_parameters={"rope_type": "default", "rope_theta": 12345})
    assert ModelConfig.from_bagel(folder).decoder.rope_theta == 12345.0
    edit(folder, LLM, rope_theta=12345.0, rope_parameters={"rope_theta": 12345, "partial_rotary_factor": 1.0})
    assert ModelConfig.from_bagel(folder).decoder.rope_theta == 12345.0
    edit(folder, LLM, rope_theta=1e6)
    assert "rope_theta: expected 12345.0, as rope_parameters says, got 1000000.0" in refused(folder)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (LLM, "hidden_act", "gelu"),
        (LLM, "hidden_act", None),
        (LLM, "model_type", "qwen3"),
        (LLM, "model_type", "llama"),
        (LLM, "model_type", 2),
        (LLM, "head_dim", 128),
        (LLM, "use_sliding_window", True),
        (LLM, "use_sliding_window", "false"),
        (LLM, "layer_types", ["full_attention", "sliding_attention"]),
        (LLM, "layer_types", 5),
        (LLM, "qk_norm", "false"),
        (LLM, "tie_word_embeddings", "false"),
        (LLM, "rms_norm_eps", "1e-6"),
        (LLM, "rms_norm_eps", -1e-6),
        (VIT, "hidden_act", "gelu"),
        (VIT, "layer_norm_eps", [1e-6]),
        (VIT, "num_channels", "3"),
        (EXTRA, "connector_act", "gelu"),
        (EXTRA, "interpolate_pos", True),
        (EXTRA, "interpolate_pos", 0),
        (EXTRA, "vae", []),
        (EXTRA, "special_tokens", [1, 2, 3, 4]),
        ("config.json", "connector_act", "relu"),
        ("config.json", "interpolate_pos", True),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(folder: Path, file: str, key: str, value: Any) -> None:
    (folder / "config.json").write_text('{"model_type": "bagel", "visual_gen": true}')
    assert ModelConfig.from_bagel(folder) == model_preset("mini")
    edit(folder, file, **{key: value})
    message = refused(folder)
    assert message.startswith(f"{folder / file}: {key}: expected ") and "\n" not in message


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vae", "ch_mult", []),
        ("vae", "ch_mult", [1, "2", 4, 8]),
        ("vae", "ch_mult", 4),
        ("vae", "ch", None),
        ("vae", "scale_factor", 0),
        ("vae", "shift_factor", "0.1159"),
        ("vae", "downsample", 16),
        ("vae", "out_ch", 4),
        ("special_tokens", "eos_token_id", "2"),
        ("special_tokens", "eos_token_id", 2.0),
        ("special_tokens", "start_of_image", -1),
    ],
)
def test_nested_keys_are_named_with_their_place(folder: Path, part: str, key: str, value: Any) -> None:
    inner = json.loads((folder / EXTRA).read_text())[part]
    edit(folder, EXTRA, **{part: inner | {key: value}})
    assert f"{folder / EXTRA}: {part}: {key}: expected " in refused(folder)
    edit(folder, EXTRA, **{part: {k: v for k, v in inner.items() if k != key}})
    if key not in ("downsample", "out_ch"):
        assert f"{part}: {key}: expected " in refused(folder)


def test_sizes_that_do_not_go_together_name_the_folder(folder: Path) -> None:
    edit(folder, LLM, num_attention_heads=5, num_key_value_heads=5)
    assert refused(folder) == (
        f"{folder}: decoder: hidden_size 192 is not a multiple of num_heads 5; change one of the two."
    )


# -- files that are no settings -----------------------------------------------------------------------------


@pytest.mark.parametrize("file", [LLM, VIT, EXTRA])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "expected an object {...}, got a list"),
        ("null", "expected an object {...}, got null"),
        ('"x"', "expected an object {...}, got a string"),
        ("", "expected JSON"),
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("9" * 5000, "expected JSON"),
        ('{"a": {"b": 1, "b": 2}}', "expected each key once"),
        ("<!doctype html><html></html>", "expected JSON, got a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
    ids=lambda v: v[:20],
)
def test_what_is_no_object_is_said(folder: Path, file: str, content: str, said: str) -> None:
    (folder / file).write_text(content)
    message = refused(folder)
    assert message.split("\n")[0].startswith(f"{folder / file}: ") and said in message.split("\n")[0]


def test_encodings_and_places(folder: Path) -> None:
    text = (folder / LLM).read_text()
    (folder / LLM).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert ModelConfig.from_bagel(folder) == model_preset("mini")
    (folder / LLM).write_bytes(text.encode("utf-16"))
    assert "expected UTF-8 text" in refused(folder)
    (folder / LLM).unlink()
    assert f"{LLM}: expected a file of settings, got file not found; copy {LLM} and {VIT}" in refused(folder)
    (folder / LLM).mkdir()
    assert f"{LLM}: expected a file that can be read" in refused(folder)


def test_a_repeated_key_is_named(folder: Path) -> None:
    (folder / LLM).write_text((folder / LLM).read_text()[:-1] + ', "hidden_size": 192}')
    assert f"{LLM}: 'hidden_size': expected each key once" in refused(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_values_end_well_or_in_a_user_error(tmp_path_factory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("settings")
    for name, content in model_preset("mini").to_bagel().items():
        keys = [*content, "rope_scaling", "rope_parameters", "head_dim", "layer_types", "model_type"]
        changes = data.draw(st.dictionaries(st.sampled_from(keys), JSON, max_size=2))
        if name == EXTRA and data.draw(st.booleans()):
            part = data.draw(st.sampled_from(["vae", "special_tokens"]))
            inner = content[part] | data.draw(
                st.dictionaries(st.sampled_from([*content[part]]), JSON, max_size=2)
            )
            changes[part] = inner
        (folder / name).write_text(json.dumps(content | changes))
    try:
        assert isinstance(ModelConfig.from_bagel(folder), ModelConfig)
    except UserError:
        pass


# -- the encoders' --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "content", "said"),
    [
        (
            encoders.load_clip,
            {"model_type": "clip", "text_config": {"hidden_size": "768"}},
            "text_config: hidden_size",
        ),
        (
            encoders.load_clip,
            {"model_type": "clip", "vision_config": []},
            "vision_config: expected an object",
        ),
        (
            encoders.load_clip,
            {"model_type": "clip", "projection_dim": None},
            "projection_dim: expected a whole",
        ),
        (
            encoders.load_clip,
            {"model_type": "clip", "text_config": {"hidden_act": "relu"}},
            "text_config: hidden_act: expected 'quick",
        ),
        (encoders.load_dinov2, {"model_type": "dinov2", "mlp_ratio": "4"}, "mlp_ratio: expected a number"),
        (encoders.load_dinov2, {"model_type": "dinov2", "patch_size": 0}, "patch_size: expected a whole"),
        (
            encoders.load_dinov2,
            {"model_type": "dinov2", "use_swiglu_ffn": True},
            "use_swiglu_ffn: expected False",
        ),
        (encoders.load_dinov2, [], "expected an object"),
        (encoders.load_dinov2, None, "expected an object"),
    ],
)
def test_settings_of_the_encoders_are_checked_too(tmp_path: Path, load, content: Any, said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {said}")
