"""The engine as its callers see it: right answers in any company, clear errors, few compilations."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from tests.sampling.decoding import decode
from unichar_jax.data import templates
from unichar_jax.data.images import ImageError
from unichar_jax.errors import UserError
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import context, flow, pixels
from unichar_jax.sampling.batching import Cancelled, EngineBusy
from unichar_jax.sampling.engine import EDITING, Engine, EngineConfig
from unichar_jax.sampling.flow import FlowSettings, Guidance
from unichar_jax.sampling.text import TextSettings
from unichar_jax.sampling.tracing import compilations

from .conftest import CONFIG

SHORT = TextSettings(max_tokens=6)
QUICK = FlowSettings(num_timesteps=4)
SIZE = (32, 48)


def scribble(seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def engine(model, autoencoder, tokenizer) -> Iterator[Engine]:
    with Engine(model, autoencoder, tokenizer, EngineConfig(max_batch=4)) as engine:
        yield engine


def test_text_in_a_batch_is_the_text_alone(engine: Engine, model, tokenizer) -> None:
    prompts = ["one", "a prompt of quite some more words than one", ""]
    together = engine.generate_text(prompts, settings=SHORT)
    assert [engine.answer(None, p, SHORT) for p in prompts] == together
    # Below the engine: the same by hand.
    ids = np.array([[1, *tokenizer.encode(prompts[1]), 2]], np.int32)
    cache = kv.prefill_text(model, kv.empty(model, 1, 64), ids, np.array(ids.shape[1:]))
    tokens, _ = decode(model, cache, [SHORT])
    assert together[1] == tokenizer.decode(tokens[0])


def test_seeds_count_up_and_decide(engine: Engine) -> None:
    warm = TextSettings(max_tokens=6, temperature=1.0, seed=5)
    first = engine.generate_text(["hello"] * 3, settings=warm)
    assert len(set(first)) > 1
    assert engine.answer(None, "hello", replace(warm, seed=6)) == first[1]


def test_a_picture_and_its_question_are_both_read(engine: Engine) -> None:
    asked = engine.answer(scribble(), "what is this ?", SHORT)
    assert asked != engine.answer(scribble(1), "what is this ?", SHORT)
    assert asked != engine.answer(scribble(), "who is that ?", SHORT)
    assert asked != engine.answer(None, "what is this ?", SHORT)
    both = engine.generate_text(["what is this ?"] * 2, [scribble(), scribble(1)], SHORT)
    assert both[0] == asked


def test_pictures_of_a_batch_are_the_pictures_alone(engine: Engine, model, autoencoder, tokenizer) -> None:
    drawn = engine.generate_images(["a cat", "a blue dog on a hill"], 2, QUICK, size=SIZE, seed=3)
    assert [[p.size for p in row] for row in drawn] == [[(48, 32)] * 2] * 2
    alone = engine.generate_images(["a blue dog on a hill"], 1, QUICK, size=SIZE, seed=4)
    difference = np.abs(np.asarray(alone[0][0], int) - np.asarray(drawn[1][1], int))
    assert difference.max() <= 1  # truncation to whole numbers
    assert np.asarray(drawn[0][0]).std() > 1
    assert np.abs(np.asarray(drawn[0][0], int) - np.asarray(drawn[1][0], int)).max() > 5
    # Below the engine: the same by hand.
    ids = np.array([[1, *tokenizer.encode("a blue dog on a hill"), 2]], np.int32)
    cache = kv.prefill_text(model, kv.empty(model, 1, 64), ids, np.array(ids.shape[1:]))
    noise = flow.draw_noise(flow.row_keys(np.array([4])), 0, (2, 3), CONFIG.latent_dim)
    latents = flow.sample_latents(model, flow.Contexts(cache), noise, (2, 3), QUICK)
    picture = pixels.decode_images(autoencoder, latents, (2, 3), CONFIG.latent_patch_size)
    assert np.abs(np.asarray(picture[0], int) - np.asarray(alone[0][0], int)).max() <= 1


def test_editing_reads_the_picture_the_text_and_keeps_the_size(engine: Engine) -> None:
    settings = replace(EDITING, num_timesteps=3)
    edited = engine.generate_images(["make it night"], 1, settings, image=scribble())[0][0]
    width, height = engine.parts.transforms.draw.size(50, 40)
    assert edited.size == (width, height)
    other = engine.generate_images(["make it night"], 1, settings, image=scribble(1))[0][0]
    assert np.abs(np.asarray(edited, int) - np.asarray(other, int)).max() > 5


def test_a_plan_comes_first_in_the_format_of_training(engine: Engine, monkeypatch) -> None:
    asked = []

    def write(prompts, images, settings, *, model):
        asked.extend(prompts)
        return ["<think>why</think><gen>a cat</gen>", "no format at all"]

    monkeypatch.setattr(engine, "generate_text", write)
    drawn = engine.generate_images(["x", "y"], 1, QUICK, size=SIZE, think=SHORT)
    monkeypatch.undo()
    assert asked == [templates.plan_first("x"), templates.plan_first("y")]
    for picture, prompt in zip(drawn, ["a cat", "y"], strict=True):
        expected = engine.generate_images([prompt], 1, QUICK, size=SIZE)[0][0]
        assert np.abs(np.asarray(picture[0], int) - np.asarray(expected, int)).max() <= 1


def test_streams_end_with_the_whole_text(engine: Engine) -> None:
    job = engine.submit_text("hello", settings=TextSettings(max_tokens=40))
    pieces = list(job)
    assert len(pieces) == 3  # 16 tokens each
    assert "".join(pieces) == job.result()


# -- remembering what was read ---------------------------------------------------------------------


def test_a_remembered_beginning_changes_nothing_and_is_not_read_again(model, monkeypatch) -> None:
    lengths: list[int] = []

    def spy(model, cache, ids, lens):
        lengths.append(int(np.sum(lens)))
        return prefill(model, cache, ids, lens)

    prefill = kv.prefill_text
    monkeypatch.setattr(kv, "prefill_text", spy)
    reader, forgetful = context.Reader(), context.Reader(0)
    long = tuple(range(10, 40))
    picture = context.Picture("vit", np.ones((16, CONFIG.vision.patch_dim), np.float32), np.arange(16))
    contexts = [
        (context.Text((1, *long, 2)),),
        (context.Text((1, *long, 5, 6, 2)),),
        (picture, context.Text((1, 7, 8, 2))),
        (picture, context.Text((1, 7, 9, 2))),
        (context.Text((1, *long, 2)),),
    ]
    read = []
    for parts in contexts:
        fresh = forgetful.read(model, "m", [parts])
        lengths.clear()
        again = reader.read(model, "m", [parts])
        read.append(sum(lengths))
        n = context.num_tokens(parts)
        assert int(again.length[0]) == n == int(fresh.length[0])
        assert int(again.rope[0]) == int(fresh.rope[0])
        np.testing.assert_allclose(again.k[:, 0, :, :n], fresh.k[:, 0, :, :n], rtol=1e-3, atol=1e-4)
    assert read == [32, 3, 4, 2, 0]
    lengths.clear()
    reader.read(model, "another", [contexts[0]])  # another model's memories are not its own
    assert sum(lengths) == 32


def test_memory_is_bounded_and_the_oldest_goes_first(model) -> None:
    reader = context.Reader(slots=128)  # two contexts of 64 slots
    parts = [(context.Text((1, *[10 + i] * 20, 2)),) for i in range(3)]
    for i in (0, 1, 0, 2):  # 1 was used least recently
        reader.read(model, "m", [parts[i]])
    assert [reader._recall("m", p[0].keys)[1] for p in parts] == [22, 0, 22]


# -- bad requests ----------------------------------------------------------------------------------


def test_mistakes_are_errors_at_once_and_the_engine_lives(engine: Engine, tmp_path) -> None:
    note = tmp_path / "note.png"
    note.write_text("not a picture")
    with pytest.raises(ImageError, match="not a readable image"):
        engine.answer(note, "what ?")
    with pytest.raises(ImageError, match="absent"):
        engine.answer(tmp_path / "absent.png", "what ?")
    with pytest.raises(ImageError, match="8000x8000"):
        engine.answer(Image.new("1", (8000, 8000)), "what ?")
    with pytest.raises(ImageError, match="got int"):
        engine.answer(3, "what ?")
    with pytest.raises(UserError, match="not valid Unicode at character 2"):
        engine.answer(None, "ab\ud800")
    with pytest.raises(UserError, match="max_context"):
        engine.answer(None, "word " * 20_000)
    with pytest.raises(UserError, match="multiples of 16 pixels"):
        engine.generate_images(["x"], size=(40, 48))
    with pytest.raises(UserError, match="at most 128"):
        engine.generate_images(["x"], size=(144, 48))
    with pytest.raises(UserError, match="at least 1 picture"):
        engine.generate_images(["x"], 0)
    with pytest.raises(UserError, match="did you mean 'base'"):
        engine.answer(None, "hi", model="bass")
    assert engine.answer(None, "one", SHORT)


def test_a_picture_of_one_pixel_is_a_picture(engine: Engine) -> None:
    assert engine.answer(Image.new("LA", (1, 1)), "what ?", SHORT)


def test_an_engine_without_autoencoder_talks_but_does_not_draw(model, tokenizer) -> None:
    with Engine(model, None, tokenizer) as engine, pytest.raises(UserError, match="no autoencoder"):
        engine.generate_images(["x"])


def test_cancelled_and_crowding_requests_leave_the_engine_well(model, tokenizer) -> None:
    long, rows = TextSettings(max_tokens=2000), EngineConfig(max_batch=1, max_queue=1)
    with Engine(model, None, tokenizer, rows) as engine:
        running = engine.submit_text("hello", settings=long)
        next(iter(running))
        waiting = engine.submit_text("one", settings=SHORT)
        with pytest.raises(EngineBusy):
            engine.submit_text("two", settings=SHORT)
        running.cancel()
        with pytest.raises(Cancelled):
            running.result(60)
        assert waiting.result(60)
        unfinished = engine.submit_text("hello", settings=long)
    assert unfinished.done


def test_a_cancelled_drawing_ends_between_its_chunks_of_steps(engine: Engine, monkeypatch) -> None:
    monkeypatch.setattr(flow, "CHUNK_SECONDS", 0.0)  # one step each
    steps, run, jobs = [], flow._some_steps, []

    def spy(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            jobs[0].cancel()
        return run(*args, **kwargs)

    monkeypatch.setattr(flow, "_some_steps", spy)
    settings = replace(QUICK, num_timesteps=40)
    with engine.together():
        jobs.append(engine.submit_images("a cat", 2, settings, size=SIZE))
    with pytest.raises(Cancelled):
        jobs[0].result(60)
    assert len(steps) == 3
    # A neighbour in the batch is drawn to its end.
    del steps[:], jobs[:]
    with engine.together():
        jobs.extend(engine.submit_images("a cat", 1, settings, size=SIZE, seed=i) for i in range(2))
    with pytest.raises(Cancelled):
        jobs[0].result(60)
    assert len(jobs[1].result(60)) == 1
    assert len(steps) == 39


def test_nothing_is_left_of_requests_that_ended(model, tokenizer) -> None:
    """Answered, cancelled or refused: no array and no thread stays."""

    def mixture(engine: Engine) -> None:
        assert engine.answer(None, "hello", SHORT)
        job = engine.submit_text("hello", settings=TextSettings(max_tokens=40))
        job.cancel()
        with pytest.raises(Cancelled):
            job.result(60)
        with pytest.raises(UserError):
            engine.answer(None, "\ud800")

    def held() -> tuple[int, int]:
        gc.collect()
        return len(jax.live_arrays()), threading.active_count()

    outside = threading.active_count()
    with Engine(model, None, tokenizer, EngineConfig(remembered=0)) as engine:
        mixture(engine)
        before = held()
        for _ in range(5):
            mixture(engine)
        # A result is handed out before its batch's own arrays go: wait for the thread to let go of them.
        end = time.monotonic() + 60
        while held() > before and time.monotonic() < end:
            time.sleep(0.05)
        assert held() <= before
    assert threading.active_count() == outside


def test_fifty_concurrent_requests_are_answered_as_one_would_be(engine: Engine) -> None:
    prompts = [f"prompt number {i}" for i in range(50)]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda p: engine.answer(None, p, SHORT), prompts))
    assert answers == engine.generate_text(prompts, settings=SHORT)


# -- compilations ----------------------------------------------------------------------------------


def test_a_long_session_compiles_a_bounded_number_of_programs(engine: Engine) -> None:
    """Thirty turns of growing, varied length: at most one program for each bucket of each kind."""
    rng, prompt, lengths = np.random.default_rng(0), "once upon a time", []
    before = sum(compilations().values())
    for turn in range(30):
        prompt += " word" * int(rng.integers(1, 9)) + f" {turn}"
        lengths.append(context.num_tokens([engine.parts.text(prompt)]))
        engine.answer(None, prompt, TextSettings(max_tokens=int(rng.integers(1, 20))))
    capacities = {kv.bucket(n + more, context.MIN_CAPACITY) for n in lengths for more in (0, 2, 20)}
    added = {kv.bucket(int(n) + 1, context.MIN_TEXT) for n in [lengths[0], *np.diff(lengths)]}
    # Reading, decoding, copying from and to each capacity, an empty cache.
    bound = len(capacities) * (len(added) + 5)
    assert 0 < sum(compilations().values()) - before <= bound < 60
    before = sum(compilations().values())
    engine.answer(None, prompt, TextSettings(max_tokens=7))
    assert sum(compilations().values()) == before


def test_another_model_of_the_same_sizes_compiles_nothing(engine: Engine, model) -> None:
    expected = engine.answer(None, "hello", SHORT)
    before = sum(compilations().values())
    engine.add_model("other", jax.tree.map(lambda x: x * np.float32(0.9), model))
    assert engine.answer(None, "hello", SHORT, model="other") != expected
    assert engine.answer(None, "hello", SHORT) == expected
    assert sum(compilations().values()) == before


def test_models_and_settings_are_checked(engine: Engine, model) -> None:
    other = jax.tree.map(lambda x: x, model)
    other.cfg = replace(CONFIG, max_latent_size=4)
    with pytest.raises(UserError, match="sizes"):
        engine.add_model("other", other)
    with pytest.raises(UserError, match=r"engine\.max_queue"):
        EngineConfig(max_queue=0)
    assert Guidance(1.0, 3.0).uses == (False, False)
