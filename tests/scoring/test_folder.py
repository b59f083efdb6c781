"""A folder of encoders: each is known by its config.json, whatever its folder is called, and a judge is no reward."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from unichar_jax.checkpoint.encoders import read_config
from unichar_jax.config.model import model_preset
from unichar_jax.data.transforms import Transforms
from unichar_jax.errors import UserError
from unichar_jax.evaluation.judge import load_judge
from unichar_jax.models.encoders.clip import ClipConfig
from unichar_jax.scoring import preprocess
from unichar_jax.scoring.clip_score import ClipScorer, hashed_words
from unichar_jax.scoring.diversity import FeatureDiversity
from unichar_jax.scoring.folder import JUDGE, EncoderFolder, kind_of, preparation
from unichar_jax.scoring.registry import Sources, build

MINI = REPOSITORY / "checkpoints" / "mini"


def sources(folder: Path) -> Sources:
    return Sources(folder, None, Transforms.usual(model_preset("debug")).look)


def kind(folder: Path, model_type: object, **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **more}))
    return folder


# -- finding ------------------------------------------------------------------------------------------------


def test_kinds_are_found_by_what_configurations_say(tmp_path):
    for name in ("text_image", "image_encoder", "judge"):
        shutil.copytree(MINI / name, tmp_path / f"my {name}")
    kind(tmp_path / "run", None)  # a run's configuration, say
    kind(tmp_path / "other", "siglip")
    folder = EncoderFolder(tmp_path)
    assert folder.place("clip") == tmp_path / "my text_image"
    assert folder.place("dinov2") == tmp_path / "my image_encoder"
    assert folder.place(JUDGE) == tmp_path / "my judge"
    assert folder.place("lpips") is None
    assert isinstance(build("text_image_match", {"scale": 2.0}, sources(tmp_path)), ClipScorer)
    assert isinstance(build("diversity", {}, sources(tmp_path)), FeatureDiversity)


def test_the_hubs_name_counts_among_several_and_without_it_there_is_a_choice_to_make(tmp_path):
    kind(tmp_path / "a-small-one", "dinov2")
    assert EncoderFolder(tmp_path).place("dinov2") == tmp_path / "a-small-one"
    kind(tmp_path / "large", "dinov2")
    with pytest.raises(UserError, match=r"several encoders of kind 'dinov2' \(a-small-one, large\)"):
        EncoderFolder(tmp_path).place("dinov2")
    published = kind(tmp_path / "dinov2-base", "dinov2")
    assert EncoderFolder(tmp_path).place("dinov2") == published


@pytest.mark.parametrize("name", ["there", "absent"])
def test_what_is_not_there_is_said_with_where_to_get_it(tmp_path, name):
    (tmp_path / "there").mkdir()
    assert EncoderFolder(tmp_path / name).place("clip") is None
    with pytest.raises(UserError, match=r"model_type 'dinov2'. Put one there, such as dinov2-base"):
        build("identity", {}, sources(tmp_path / name))
    with pytest.raises(UserError, match=r"lpips_alex\.safetensors is absent"):
        build("diversity", {}, sources(tmp_path / name))


def test_a_configuration_that_is_no_json_is_named(tmp_path):
    folder = kind(tmp_path / "clip", "clip")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"clip/config\.json: expected JSON"):
        EncoderFolder(tmp_path).place("clip")
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        EncoderFolder(tmp_path).place("clip")


# -- how pictures and words are prepared ---------------------------------------------------------------------


def test_published_encoders_are_prepared_for_as_published(tmp_path):
    for name, default, side in (("clip", preprocess.CLIP, 224), ("dinov2", preprocess.DINOV2, 518)):
        config = read_config(kind(tmp_path / name, name), name)
        assert preparation(config, default, side) == default


def test_an_encoder_says_how_its_pictures_are_prepared(tmp_path):
    told = {"resize": 40, "crop": 32, "mean": [0.5, 0, 1], "std": [1, 2, 0.25], "filter": "bilinear"}
    config = read_config(kind(tmp_path, "clip", preprocess=told), "clip")
    expected = preprocess.Preprocess(40, 32, (0.5, 0.0, 1.0), (1.0, 2.0, 0.25), "bilinear")
    assert preparation(config, preprocess.CLIP, 32) == expected


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"crop": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}, r"preprocess: resize: expected a whole number"),
        ({"resize": 32, "crop": 32, "mean": [0, 0], "std": [1, 1, 1]}, "mean: expected a list of 3 numbers"),
        (
            {"resize": 32, "crop": 32, "mean": [0, 0, 0], "std": [1, 0, 1]},
            "std: expected a list of 3 numbers",
        ),
        ({"resize": 32, "crop": 32, "mean": [0, 0, True], "std": [1, 1, 1]}, "mean: expected a list of 3"),
        (
            {"resize": 9, "crop": 9, "mean": [0] * 3, "std": [1] * 3, "filter": "box"},
            "'bicubic' or 'bilinear'",
        ),
        (
            {"resize": 99, "crop": 99, "mean": [0] * 3, "std": [1] * 3},
            r"pictures of 32 px, got a crop of 99;",
        ),
        ("as usual", "expected an object"),
        (None, "got a crop of 224, as published"),
    ],
)
def test_a_wrong_preparation_is_refused(tmp_path, told, why):
    config = read_config(kind(tmp_path, "clip", preprocess=told), "clip")
    with pytest.raises(UserError, match=why):
        preparation(config, preprocess.CLIP, 32)


def test_without_a_published_one_it_must_be_said(tmp_path):
    with pytest.raises(UserError, match="expected resize, crop, mean and std.*got nothing"):
        preparation(read_config(kind(tmp_path, JUDGE), JUDGE), None, 96)


def test_encoders_of_before_end_in_what_is_wrong(tmp_path):
    """Until config.json said it, code knew how the small encoders were prepared for."""
    for name in ("text_image", "image_encoder"):
        shutil.copytree(MINI / name, tmp_path / name)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        for key in ("preprocess", "tokenizer", "diversity"):
            config.pop(key, None)
        path.write_text(json.dumps(config))
    for term in ("text_image_match", "identity", "feature_diversity"):
        with pytest.raises(
            UserError, match=r"preprocess: expected .* 96 px, got a crop of 224, as published; copy"
        ):
            build(term, {}, sources(tmp_path))


def test_as_shipped_is_for_the_published_encoder():
    with pytest.raises(UserError, match="as_shipped is for CLIP as published"):
        build("text_image_match", {"as_shipped": True}, sources(MINI))
    with pytest.raises(UserError, match=r"options \{'scales': 2\} do not fit"):
        build("text_image_match", {"scales": 2}, sources(MINI))


def test_a_tokenizer_of_another_kind_and_too_many_words_are_refused(tmp_path):
    folder = shutil.copytree(MINI / "text_image", tmp_path / "clip")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for told, why in (
        ({"kind": "runes", "words": ["a"]}, "expected 'hashed_words', got 'runes'"),
        ({"kind": "hashed_words"}, "words: expected a list"),
        ({"kind": "hashed_words", "words": [f"w{i}" for i in range(1023)]}, "expected fewer than 1023"),
    ):
        path.write_text(json.dumps(config | {"tokenizer": told}))
        with pytest.raises(UserError, match=why):
            build("text_image_match", {}, sources(tmp_path))


def test_hashed_words():
    cfg = ClipConfig.from_hub(read_config(MINI / "text_image", "clip"))
    tokenize = hashed_words(("cat", "dog"), cfg)
    ids = tokenize(["The DOG, the cat!", "", "x " * 200])
    the = ids[0, 0]
    assert ids[0, :5].tolist() == [the, 1, the, 0, cfg.end_of_text]
    assert 2 <= the < cfg.end_of_text
    assert (ids[1] == cfg.end_of_text).all()
    assert ids.shape == (3, cfg.max_length) and ids[2, -1] == cfg.end_of_text != ids[2, -2]


# -- the judge is no reward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["judge", str(MINI / "judge"), "other/judge"])
def test_a_judge_is_refused_as_a_reward(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MINI / "judge", tmp_path / "other" / "judge")
    assert kind_of(MINI / "judge") == JUDGE
    with pytest.raises(
        UserError, match=r"is a judge, which reports and never rewards.*expected one of text_image"
    ):
        build(name, {}, sources(MINI))


def test_other_folders_and_names_are_unknown_terms():
    for name in ("image_encoder", "logs", "judges"):
        with pytest.raises(UserError, match=f"reward term '{name}' is unknown"):
            build(name, {}, sources(MINI))


def test_a_judge_has_nothing_of_a_scorer():
    judge = load_judge(MINI / "judge")
    assert not callable(judge)
    assert not hasattr(judge, "name")


GIVEN = """
from pathlib import Path

from unichar_jax.config.grpo import RewardTerm
from unichar_jax.evaluation.judge import Judge, load_judge
from unichar_jax.scoring.base import References, Scorer
from unichar_jax.training.grpo.rewards import Rewards


def wrong(judge: Judge) -> None:
    scorers: list[Scorer] = [judge]
    Rewards([RewardTerm("x")], [load_judge(Path("judge"))], References())


def right(scorer: Scorer) -> None:
    scorers: list[Scorer] = [scorer]
    Rewards([RewardTerm("x")], [scorer], References())
"""


@pytest.mark.slow
def test_types_keep_judges_from_rewards(tmp_path):
    (tmp_path / "given.py").write_text(GIVEN)
    command = [sys.executable, "-m", "mypy", "--config-file", str(REPOSITORY / "pyproject.toml")]
    command += [
        "--enable-error-code",
        "list-item",
        "--enable-error-code",
        "arg-type",
        str(tmp_path / "given.py"),
    ]
    found = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "MYPYPATH": str(REPOSITORY)},
    )
    errors = [line.split("given.py:")[1] for line in found.stdout.splitlines() if ": error:" in line]
    assert [e.split(":")[0] for e in errors] == ["11", "12"], found.stdout + found.stderr
    assert all('expected "Scorer"' in e for e in errors)


def test_where_they_meet_types_are_checked():
    """The checks that the test above relies on are not switched off in those files."""
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    (checked,) = project["tool"]["mypy"]["overrides"]
    assert {"arg-type", "assignment", "list-item"} <= set(checked["enable_error_code"])
    assert {"unichar_jax.scoring.*", "unichar_jax.training.grpo.rewards"} <= set(checked["module"])
