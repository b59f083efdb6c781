"""The loader: the same batches on any number of hosts and workers, exact resume, nothing lost."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.conftest import draw_picture, write_tiny_character
from tests.data.unpacking import unpack
from unichar_jax.config.data import DataConfig
from unichar_jax.config.model import SpecialTokens, model_preset
from unichar_jax.data.cache import GeneratedImage
from unichar_jax.data.images import open_image, patchify
from unichar_jax.data.layout import Sizes
from unichar_jax.data.loader import Loader, make_loader, read_samples
from unichar_jax.data.prefetch import Prefetch
from unichar_jax.data.rolescape import find_characters, read_character
from unichar_jax.data.tasks import TASKS, Part, Sample, samples
from unichar_jax.data.tokenizer import Tokenizer, train_tokenizer, write_debug_tokenizer
from unichar_jax.data.transforms import Transforms
from unichar_jax.errors import UserError
from unichar_jax.models.streams import Batch

DEBUG = model_preset("debug")


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stands for the autoencoder: latent tokens hold some of their picture's values."""
    tokens = np.stack([patchify(image, 16) for image in images])[..., :64]
    return tokens, tokens - 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return write_debug_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def config(root: Path, **changes) -> DataConfig:
    base = DataConfig(
        path=str(root),
        tokens_per_row=1024,
        draw_min=32,
        draw_max=64,
        look_min=28,
        look_max=56,
        window=10,
        cache_dir=str(root / "cache"),
    )
    return dataclasses.replace(base, **changes)


def loader(cfg: DataConfig, tokenizer: Tokenizer, rank=0, of=1, rows=2) -> Loader:
    return make_loader(
        cfg, DEBUG, tokenizer, moments, process_index=rank, process_count=of, global_batch=rows
    )


def digest(batch: Batch, rows: slice = slice(None)) -> str:
    leaves = jax.tree.leaves(jax.tree.map(lambda x: np.ascontiguousarray(x[rows]), batch))
    return hashlib.sha256(b"".join(x.tobytes() for x in leaves)).hexdigest()


def take(source: Loader, count: int) -> list[str]:
    return [digest(next(source)) for _ in range(count)]


def test_a_batch_holds_what_the_samples_say(tiny_root, tokenizer):
    """Each laid-out sample is one of the characters', to the last token and pixel; each one comes."""
    cfg = config(tiny_root, text_dropout=0.0)
    transforms = Transforms.configured(cfg, DEBUG)

    def content(task: str, text: str, learned: str, vit: np.ndarray, latent: np.ndarray):
        return task, text, learned, vit.tobytes(), latent.tobytes()

    def expected(sample: Sample):
        text = learned = ""
        vit, latent = np.zeros((0, 588), np.float32), np.zeros((0, 64), np.float32)
        for part in sample.parts:
            if part.kind == "text":
                text += f"<|im_start|>{part.text}<|im_end|>"
                learned += f"{part.text}<|im_end|>" if part.loss else ""
                continue
            text += "<|vision_start|><|vision_end|>"
            image = open_image(part.image.path.name, part.image.path.parent)
            if part.kind == "vit_image":
                vit = patchify(transforms.look(image), 14)
            else:
                latent = moments(transforms.draw(image)[None])[0][0]
        return content(sample.task, text, learned, vit, latent)

    wanted = {expected(sample) for sample in read_samples(cfg)}
    one = loader(cfg, tokenizer)
    seen = set()
    for _ in range(40):
        for row in unpack(next(one)):
            for tokens in row:
                task = one.tasks[int(tokens.text.task[0])]
                learned = tokenizer.decode(tokens.text.targets[tokens.text.weight > 0])
                text = tokenizer.decode(tokens.text.ids)
                seen.add(content(task, text, learned, tokens.vit.patches, tokens.latent.mean))
                assert np.isfinite(tokens.latent.timestep).all()
                assert len(set(tokens.latent.timestep.tolist())) <= 1
    assert seen == wanted


def test_the_same_batches_with_any_number_of_workers(tiny_root, tokenizer):
    expected = take(loader(config(tiny_root), tokenizer), 12)
    assert len(set(expected)) == 12
    for workers in (1, 4):
        other = loader(config(tiny_root, workers=workers), tokenizer)
        assert take(other, 12) == expected
        other.close()


def test_hosts_share_the_global_batch(tiny_root, tokenizer):
    whole = loader(config(tiny_root), tokenizer, rows=4)
    halves = [loader(config(tiny_root), tokenizer, rank, 2, rows=4) for rank in (0, 1)]
    for _ in range(6):
        batch = next(whole)
        for rank, half in enumerate(halves):
            assert digest(next(half)) == digest(batch, slice(2 * rank, 2 * rank + 2))
    states = [json.dumps(x.state()) for x in (whole, *halves)]
    assert len(set(states)) == 1
    with pytest.raises(UserError, match="multiple of the 3 processes"):
        loader(config(tiny_root), tokenizer, 0, 3, rows=4)


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (13, 1), pytest.param(24, 4, marks=pytest.mark.slow)])
def test_resume_is_exact_on_other_hosts_and_workers(tiny_root, tokenizer, stop, workers):
    """From two hosts to one and back, each time followed by 50 identical batches."""
    cfg = config(tiny_root)
    first = loader(cfg, tokenizer, rows=4)
    take(first, stop)
    expected = [next(first) for _ in range(50)]

    two = [loader(cfg, tokenizer, rank, 2, rows=4) for rank in (0, 1)]
    for host in two:
        take(host, stop)
    state = json.loads(json.dumps(two[1].state()))
    one = loader(dataclasses.replace(cfg, workers=workers), tokenizer, rows=4)
    take(one, 3)  # a loader that is somewhere else already
    one.restore(state)
    back = json.loads(json.dumps(one.state()))
    assert take(one, 50) == [digest(b) for b in expected]
    one.close()
    for rank, host in enumerate(two):
        host.restore(back)
        assert take(host, 50) == [digest(b, slice(2 * rank, 2 * rank + 2)) for b in expected]


def test_changed_data_cannot_be_resumed(tiny_root, tokenizer):
    state = loader(config(tiny_root), tokenizer).state()
    picture = tiny_root / "train" / "Friends-Tess" / "0.png"
    before = picture.read_bytes()
    draw_picture(picture, 6)  # another one of the same size
    with pytest.raises(UserError, match="training data changed"):
        loader(config(tiny_root), tokenizer).restore(state)
    picture.write_bytes(before)
    loader(config(tiny_root), tokenizer).restore(state)
    for change in ({"seed": 1}, {"recipe": "base"}, {"window": 11}):
        with pytest.raises(UserError, match="training data changed"):
            loader(config(tiny_root, **change), tokenizer).restore(state)


def test_conditions_are_dropped_and_noise_is_normal(tiny_root, tokenizer):
    cfg = config(tiny_root, recipe="base", text_dropout=0.3, timestep_mean=1.0, timestep_std=0.5)
    one = loader(cfg, tokenizer)
    prompts, levels = [], []
    for _ in range(150):
        for tokens in itertools.chain(*unpack(next(one))):
            if len(tokens.latent.grid):
                prompts.append(len(tokens.text.ids) > 2)
                levels.append(float(tokens.latent.timestep[0]))
            else:
                assert len(tokens.text.ids) > 2  # an answer's question is never dropped
    assert len(set(levels)) == len(levels) > 300
    error = 4 / len(levels) ** 0.5  # four standard errors
    assert abs(np.mean(prompts) - 0.7) < error * 0.46
    assert abs(np.mean(levels) - 1.0) < error * 0.5
    assert abs(np.std(levels) - 0.5) < error * 0.5


def test_what_no_row_can_hold_is_named(tiny_root, tokenizer):
    roomy = loader(config(tiny_root), tokenizer)
    text = roomy.capacities.text
    small = loader(config(tiny_root, capacities=(text, 5, 64)), tokenizer)
    assert small.capacities == Sizes(text, 5, 64)
    assert small.left_out
    assert all("/vqa/" in key for key in small.left_out)
    for key in small.left_out:
        assert f"{key}: it has 6 vit tokens, a row 5" in small.describe()
    assert "vqa" not in small.tasks
    with pytest.raises(UserError, match=r"no sample fits.*raise the capacities"):
        loader(config(tiny_root, capacities=(1, 1, 1)), tokenizer)


def test_the_log_says_why_rows_stay_empty(tiny_root, tokenizer):
    rare = loader(config(tiny_root, tasks={"vqa": 0.02, "vlm": 1.0}, look_max=112, look_min=112), tokenizer)
    vit = rare.capacities.vit
    assert f"note: of {vit} vit tokens a row uses" in rare.describe()
    assert "note: of" not in loader(config(tiny_root, tasks={"vlm": 1.0}), tokenizer).describe()


def test_the_log_says_what_is_trained_on(tiny_root, tokenizer):
    told = loader(config(tiny_root), tokenizer).describe()
    assert "1 characters (Tess)" in told
    assert "vqa: 8 samples" in told
    assert f"text {loader(config(tiny_root), tokenizer).capacities.text}" in told


def test_a_folders_own_name_is_meant_before_a_short_one(tiny_root, tokenizer):
    write_tiny_character(tiny_root / "train" / "Tess", 1)
    write_tiny_character(tiny_root / "train" / "Pokemon-Tess", 2)
    for name, pictures in (("Tess", 1), ("Pokemon-Tess", 2), ("Friends-Tess", 4)):
        keys = [sample.key for sample in read_samples(config(tiny_root, characters=(name,)))]
        assert sum("/t2i/" in key for key in keys) == pictures


def test_mistakes_in_the_configuration(tiny_root, tokenizer):
    for change, message in (
        ({"characters": ("Tes",)}, r"'Tes' is not in .* \(did you mean 'Tess'\?\)"),
        ({"look_max": 126}, r"data\.look_max: expected at most 112"),
        ({"draw_min": 40}, r"data\.draw_min: expected a multiple of 16.*32 is near"),
        ({"recipe": "defualt"}, "did you mean 'default'"),
    ):
        with pytest.raises(UserError, match=message):
            loader(config(tiny_root, **change), tokenizer)
    with pytest.raises(UserError, match=r"data\.text_dropout: expected a probability"):
        config(tiny_root, text_dropout=2.0)
    with pytest.raises(UserError, match=r"data\.capacities: expected three numbers"):
        config(tiny_root, capacities=(1, 2))


def test_samples_can_come_from_memory(tokenizer):
    def picture(shade: int) -> GeneratedImage:
        return GeneratedImage(48, 48, lambda: np.full((48, 48, 3), shade, np.uint8), f"shade {shade}")

    made = [
        Sample(
            f"made/{i}",
            "pure_t2i",
            "Dot",
            (Part("text", False, f"shade {i}", droppable=True), Part("latent_image", True, image=picture(i))),
        )
        for i in range(5)
    ]
    cfg = DataConfig(
        tasks={"pure_t2i": 1.0},
        capacities=(40, 0, 20),
        draw_min=32,
        draw_max=64,
        look_min=28,
        look_max=56,
        cache_dir="",
        text_dropout=0.0,
    )
    one = make_loader(cfg, DEBUG, tokenizer, moments, global_batch=2, samples=made)
    shades = set()
    for _ in range(10):
        for tokens in itertools.chain(*unpack(next(one))):
            told = tokenizer.decode(tokens.text.ids, skip_special=True)
            np.testing.assert_allclose(tokens.latent.mean, int(told.split()[1]) / 127.5 - 1, atol=1e-6)
            shades.add(told)
    assert len(shades) == 5


def test_prefetching_knows_what_was_handed_out(tiny_root, tokenizer):
    expected = take(loader(config(tiny_root), tokenizer), 12)
    ahead = Prefetch(loader(config(tiny_root), tokenizer), digest, depth=2)
    assert [next(ahead) for _ in range(5)] == expected[:5]
    state = ahead.state()
    assert [next(ahead) for _ in range(3)] == expected[5:8]
    ahead.restore(state)
    assert [next(ahead) for _ in range(7)] == expected[5:]
    ahead.close()
    assert next(ahead) not in expected

    def fail(batch: Batch) -> None:
        raise RuntimeError("no device")

    broken = Prefetch(loader(config(tiny_root), tokenizer), fail)
    with pytest.raises(RuntimeError, match="no device"):
        next(broken)


# -- real characters -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rolescape_tokenizer(rolescape_dir, tmp_path_factory) -> Tokenizer:
    """BPE of about the fineness of Qwen2's, trained on the characters' own texts."""
    characters = [read_character(folder) for folder in find_characters(rolescape_dir, "train")]
    texts = [p.text for c in characters for t in TASKS for s in samples(c, t) for p in s.parts]
    return train_tokenizer(texts, 8000, tmp_path_factory.mktemp("rolescape_tokenizer"))


DRAWN = ("t2i", "t2i_with_thinking", "pure_t2i", "t2i_generation_instruction_only")


def _blank(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(images), images.shape[1] * images.shape[2] // 256, 1), np.float32)
    return tokens, tokens


def test_real_characters_fill_their_rows(rolescape_dir, rolescape_tokenizer):
    """All tasks of all characters over 200 sequences: fill, frequencies, waiting."""
    model = dataclasses.replace(model_preset("bagel-7b"), special_tokens=SpecialTokens(1, 2, 3, 4))
    cfg = DataConfig(path=str(rolescape_dir), cache_dir="")

    real = make_loader(cfg, model, rolescape_tokenizer, _blank)
    planner = real.planner
    assert set(real.tasks) == set(TASKS)
    assert not real.left_out
    assert 11_000 <= real.capacities.total <= 13_000

    used, counts, placed = np.zeros(3), collections.Counter(), {}
    for n in range(200):
        for draw in planner.sequence(n):
            size = planner.sizes[draw.source][draw.sample]
            assert (size <= real.capacities).all()
            used += size
            counts[real.mixture.keys[draw.source].task] += 1
            placed[draw.source, draw.number] = n
    total = sum(counts.values())
    assert used.sum() / (200 * real.capacities.total) >= 0.95
    for task, weight in real.mixture.task_weights().items():
        assert counts[task] / total == pytest.approx(weight, rel=0.02)
    order = planner.schedule.draws(planner.schedule.start, total)
    assert max(placed[d.source, d.number] - 200 * i // total for i, d in enumerate(order)) <= 50


@pytest.mark.parametrize("name", ["Adrien Brody", "Bo", "Furina", "Ichihime", "Pikachu", "YuiYagi"])
def test_each_real_character_fills_its_rows_with_exact_weights(name, rolescape_dir, rolescape_tokenizer):
    model = dataclasses.replace(model_preset("bagel-7b"), special_tokens=SpecialTokens(1, 2, 3, 4))
    cfg = DataConfig(path=str(rolescape_dir), cache_dir="", characters=(name,))
    alone = make_loader(cfg, model, rolescape_tokenizer, _blank)
    assert alone.mixture.task_weights() == pytest.approx(
        {
            **dict.fromkeys(DRAWN, 0.25 / len(DRAWN)),
            "vqa": 0.25,
            "vlm_extension": 0.25,
            "knowledge_qa": 0.125,
            "vlm_thinking": 0.075,
            "vlm": 0.05,
        }
    )
    planner = alone.planner
    used = sum(planner.sizes[d.source][d.sample].sum() for n in range(200) for d in planner.sequence(n))
    assert used / (200 * alone.capacities.total) >= 0.88


def test_the_log_names_what_would_fill_rows(rolescape_dir, rolescape_tokenizer):
    """One character with few large pictures: the setting that the log names does what it says."""
    model = dataclasses.replace(model_preset("bagel-7b"), special_tokens=SpecialTokens(1, 2, 3, 4))
    cfg = DataConfig(path=str(rolescape_dir), cache_dir="", characters=("Furina",))
    told = make_loader(cfg, model, rolescape_tokenizer, _blank).describe()
    said = re.search(
        r"; vit ends them\n[\s\S]*vit is full before\. data\.tokens_per_row (\d+) would fill about (\d+) %",
        told,
    )
    assert said, told
    longer = make_loader(
        dataclasses.replace(cfg, tokens_per_row=int(said[1])), model, rolescape_tokenizer, _blank
    )
    assert f"about {said[2]} % full" in longer.describe()
    assert int(said[2]) >= 95
    fixed = dataclasses.replace(cfg, capacities=(4000, 6000, 5000))
    assert "Leave data.capacities out" in make_loader(fixed, model, rolescape_tokenizer, _blank).describe()


def test_real_characters_resume_exactly(rolescape_dir, rolescape_tokenizer, tmp_path):
    cfg = DataConfig(
        path=str(rolescape_dir),
        tokens_per_row=1024,
        draw_min=96,
        draw_max=96,
        look_min=70,
        look_max=70,
        square=True,
        cache_dir=str(tmp_path),
    )
    first = loader(cfg, rolescape_tokenizer, rows=2)
    take(first, 29)
    state = first.state()
    expected = take(first, 50)
    other = loader(dataclasses.replace(cfg, workers=1), rolescape_tokenizer, rows=2)
    other.restore(state)
    assert take(other, 50) == expected
    other.close()
