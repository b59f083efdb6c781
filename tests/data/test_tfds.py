"""The TFDS builder writes and reads every record, without TensorFlow and without a network."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from unichar_jax.data.images import open_image, to_rgb
from unichar_jax.data.rolescape import read_character
from unichar_jax.data.tfds_rolescape import KINDS, Rolescape20, RoleScapeConfig
from unichar_jax.errors import UserError

TESS = RoleScapeConfig(name="tess", character="Friends-Tess", description="Tess.")


def _by_kind(source):
    found = {}
    for example in source:
        found.setdefault(KINDS[example["kind"]], []).append(example)
    return found


def test_every_record_is_read_back(tiny_root, tmp_path):
    Rolescape20(config=TESS, data_dir=tmp_path / "tfds", source=tiny_root).download_and_prepare()
    train = _by_kind(tfds.data_source("rolescape20/tess", split="train", data_dir=tmp_path / "tfds"))
    test = _by_kind(tfds.data_source("rolescape20/tess", split="test", data_dir=tmp_path / "tfds"))
    assert {kind: len(rows) for kind, rows in train.items()} == {
        "scene": 4,
        "dialogue": 7,
        "knowledge": 4,
    }
    assert {kind: len(rows) for kind, rows in test.items()} == {
        "scene": 2,
        "dialogue": 2,
        "knowledge_mcq": 3,
        "memorization": 1,
        "personality": 2,
    }
    tess = read_character(tiny_root / "train" / "Friends-Tess")
    for example in train["scene"]:
        scene = tess.scenes[int(example["key"].decode().rsplit("/", 1)[1])]
        assert example["reply"].decode() == scene.reply
        assert example["thinking"].decode() == scene.thinking
        assert example["description"].decode() == tess.description
        answers = [text.decode() for text in example["visual_questions"]["answer"]]
        assert answers == [pair.answer for pair in scene.qa_pairs]
        pixels = np.asarray(to_rgb(open_image(scene.image.path.name, tess.folder)))
        np.testing.assert_array_equal(np.asarray(example["pictures"])[0], pixels)
    choice = test["knowledge_mcq"][0]["choice_questions"]
    assert choice["options"][0].decode().splitlines()[0] == "A. one"


def test_all_takes_every_character_of_the_source(tiny_root, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(tiny_root / split / "Friends-Tess", tiny_root / split / "Tess")
    builder = Rolescape20(config="all", data_dir=tmp_path / "tfds", source=tiny_root)
    builder.download_and_prepare()
    assert builder.info.splits["train"].num_examples == 2 * 15
    assert builder.info.citation and builder.info.features["opening"].doc.desc


def test_an_absent_character_is_named(tiny_root, tmp_path):
    builder = Rolescape20(config="bo", data_dir=tmp_path / "tfds", source=tiny_root)
    with pytest.raises(UserError, match="no character 'Bo'.*Friends-Tess"):
        builder.download_and_prepare()


def test_faulty_data_leave_no_trace(tiny_root, tmp_path):
    for name in ("0.png", "1.png"):  # RGB, which would be copied as it is, and RGBA
        picture = tiny_root / "train" / "Friends-Tess" / name
        whole = picture.read_bytes()
        picture.write_bytes(whole[: len(whole) // 2])
        builder = Rolescape20(config=TESS, data_dir=tmp_path / "tfds", source=tiny_root)
        with pytest.raises(UserError, match="truncated"):
            builder.download_and_prepare()
        picture.write_bytes(whole)
    assert not list(tmp_path.glob("tfds/**/*"))


def test_the_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.delenv("UNICHAR_ROLESCAPE_DIR", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        UserError, match=r"cannot be fetched from the Hub \(no route\).*unichar data build FOLDER"
    ):
        Rolescape20(config=TESS, data_dir=tmp_path / "tfds").download_and_prepare()


def test_the_hub_is_asked_for_real_files_of_one_character(tiny_root, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(repo_id, *, repo_type, local_dir, allow_patterns, ignore_patterns):
        asked.update(repo_id=repo_id, repo_type=repo_type, allow=allow_patterns)
        shutil.copytree(tiny_root, local_dir)

    monkeypatch.delenv("UNICHAR_ROLESCAPE_DIR", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    builder = Rolescape20(config=TESS, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    assert asked == {
        "repo_id": "Tangc03/RoleScape20",
        "repo_type": "dataset",
        "allow": [
            "train/Friends-Tess/*",
            "test/Friends-Tess/*",
            "*/train/Friends-Tess/*",
            "*/test/Friends-Tess/*",
        ],
    }
    assert builder.info.splits["test"].num_examples == 10


def test_building_needs_no_tensorflow(tiny_root, tmp_path):
    program = (
        "import sys; from unichar_jax.data.tfds_rolescape import Rolescape20 as B, RoleScapeConfig as C;"
        "c = C(name='tess', character='Friends-Tess');"
        f"b = B(config=c, data_dir={str(tmp_path / 'tfds')!r}, source={str(tiny_root)!r});"
        "b.download_and_prepare(); len(b.as_data_source(split='train')[0]);"
        "bad = {'tensorflow', 'torch', 'huggingface_hub'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_published_character(rolescape_dir, tmp_path):
    builder = Rolescape20(config="pokemon_pikachu", data_dir=tmp_path, source=rolescape_dir)
    builder.download_and_prepare()
    assert builder.info.splits["train"].num_examples == 7 + 187 + 100
    assert builder.info.splits["test"].num_examples == 3 + 20 + 10 + 18 + 16
