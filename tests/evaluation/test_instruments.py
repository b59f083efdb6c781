"""What a folder of encoders offers, and what is said of the rest."""

import dataclasses

import jax
import numpy as np
import pytest

from unichar_jax.evaluation.instruments import find_instruments, rewarded_metrics
from unichar_jax.evaluation.judge import Network, load_judge
from unichar_jax.models import params
from workshop.minimodel import files
from workshop.miniworld.world import ATTRIBUTES


def test_a_judge_alone_reads_attributes(tmp_path):
    files.save_judge(tmp_path / "anything", params.initialize(Network(files.JUDGE), 0))
    found = find_instruments(tmp_path)
    assert not found.scorers
    assert sorted(found.missing) == ["clip_t, clip_i", "dino, diversity"]
    pictures = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), np.uint8)
    read = found.judge.read(pictures)
    assert {name: p.shape for name, p in read.items()} == {n: (3, len(v)) for n, v in ATTRIBUTES.items()}
    for shares in read.values():
        np.testing.assert_allclose(shares.sum(axis=-1), 1, atol=1e-5)
    images = files.PREPROCESS(jax.numpy.asarray(pictures, np.float32) / 255)
    expected = load_judge(tmp_path / "anything").network(images)
    assert read["pose"].argmax(-1).tolist() == expected["pose"].argmax(-1).tolist()


@pytest.mark.parametrize("name", [None, "empty"])
def test_nothing_is_said_to_be_missing(tmp_path, name):
    found = find_instruments(tmp_path if name else None)
    assert (found.scorers, found.diversity, found.judge) == ((), None, None)
    assert list(found.missing) == ["clip_t, clip_i, dino, diversity"]


def test_terms_of_a_reward_mark_their_metrics():
    from unichar_jax.config.grpo import GRPOConfig

    config = dataclasses.asdict(GRPOConfig())
    assert rewarded_metrics(config) == ("clip_t", "dino", "diversity")
    off = {"reward": [{"name": "identity", "weight": 0.0}, {"name": "my.py:reward", "weight": 1.0}]}
    assert rewarded_metrics(off) == ()
    assert rewarded_metrics({"base": "mini"}) == ()
