"""One base, many characters: each answers as its merged model would, and changing costs no compilation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.errors import UserError
from unichar_jax.models import lora, params
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling.batching import Cancelled
from unichar_jax.sampling.engine import Engine, EngineConfig
from unichar_jax.sampling.flow import FlowSettings
from unichar_jax.sampling.session import Persona, RolePlay
from unichar_jax.sampling.text import TextSettings
from unichar_jax.sampling.tracing import compilations

from .conftest import CONFIG

SHORT = TextSettings(max_tokens=6)
QUICK = FlowSettings(num_timesteps=3)
SIZE = (32, 32)
# Ranks and places differ: what they have in common is what the engine pads them to.
CHARACTERS = {
    "ann": {f"{e}.{t}": 2 for e in lora.EXPERTS for t in lora.TARGETS},
    "bob": {"und.q": 4, "und.v": 4, "gen.down": 4},
    "cleo": {"gen.gate": 1, "und.o": 3},
}


def made_up(places: lora.Places, seed: int) -> dict[str, jax.Array]:
    """Adapters large enough to change what is said and drawn, with a norm that is kept whole."""
    declared = lora.declare(UnifiedModel(CONFIG), places)
    rng = np.random.default_rng(seed)
    arrays = {
        name: jnp.asarray(rng.normal(size=spec.shape, scale=0.7), jnp.float32)
        for name, spec in params.named_leaves(declared)
        if "lora_" in name
    }
    norm = rng.uniform(0.5, 2, CONFIG.decoder.hidden_size)
    return arrays | {"decoder.norm.und.scale": jnp.asarray(norm, jnp.float32)}


@pytest.fixture(scope="module")
def adapters() -> dict[str, dict[str, jax.Array]]:
    return {name: made_up(places, seed) for seed, (name, places) in enumerate(CHARACTERS.items())}


@pytest.fixture(scope="module")
def engine(model, autoencoder, tokenizer, adapters) -> Iterator[Engine]:
    with Engine(model, autoencoder, tokenizer, EngineConfig(max_batch=4)) as engine:
        for name, arrays in adapters.items():
            engine.add_character(name, arrays)
        yield engine


@pytest.fixture(scope="module")
def merged(model, adapters) -> dict[str, UnifiedModel]:
    plain = lambda arrays: lora.merge(lora.adapted(model, arrays), UnifiedModel(CONFIG, model.compute))  # noqa: E731
    return {"base": model} | {name: plain(arrays) for name, arrays in adapters.items()}


def first_logits(model: UnifiedModel, tokenizer, prompt: str) -> np.ndarray:
    from unichar_jax.sampling import cache as kv

    ids = np.array([[1, *tokenizer.encode(prompt), 2]], np.int32)
    cache = kv.prefill_text(model, kv.empty(model, 1, 64), ids, np.array(ids.shape[1:]))
    return np.asarray(model.logits(kv.read_text(model, cache, jnp.array([[1]]), jnp.array([1]))[0])[0, 0])


def test_a_character_is_its_merged_model(engine: Engine, merged, tokenizer, autoencoder) -> None:
    prompt, said = "what do you see from the hill ?", set()
    with jax.default_matmul_precision("highest"):
        for name, plain in merged.items():
            got, expected = (first_logits(m, tokenizer, prompt) for m in (engine.models[name], plain))
            assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected), name
    for name, plain in merged.items():
        with Engine(plain, autoencoder, tokenizer) as alone:
            words = engine.answer(None, prompt, SHORT, model=name)
            assert words == alone.answer(None, prompt, SHORT)
            said.add(words)
            drawn = engine.generate_images([prompt], 1, QUICK, size=SIZE, model=name)[0][0]
            expected = alone.generate_images([prompt], 1, QUICK, size=SIZE)[0][0]
            assert np.abs(np.asarray(drawn, int) - np.asarray(expected, int)).max() <= 1
    assert len(said) == 4


def test_the_base_is_held_once(engine: Engine, adapters) -> None:
    base = params.flat(engine.models["base"])
    for name in CHARACTERS:
        for array, x in params.flat(engine.models[name]).items():
            own = "lora_" in array or array in adapters[name]
            assert (x is base[array]) != own, (name, array)


def session(engine: Engine, who: list[str]) -> None:
    """Thirty turns of growing, varied length that go from character to character; two are drawn."""
    rng, prompt = np.random.default_rng(0), "once upon a time"
    for turn in range(30):
        name = who[turn % len(who)]
        prompt += " word" * int(rng.integers(1, 4))
        engine.answer(None, prompt, TextSettings(max_tokens=int(rng.integers(1, 20))), model=name)
        if turn in (10, 20):
            engine.generate_images([prompt], 1, QUICK, size=SIZE, model=name)


def test_thirty_turns_with_changes_of_character_compile_nothing_more(
    model, autoencoder, tokenizer, adapters
) -> None:
    """Each bucket is compiled once for all, by our own count and by the compiler's."""
    counted, compiled = [], []
    record = lambda event, *_, **__: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        who = ["base", *CHARACTERS]
        for turned in range(3):
            before = sum(compilations().values())
            with Engine(model, autoencoder, tokenizer) as engine:  # it remembers nothing of the last session
                for name, arrays in adapters.items():
                    engine.add_character(name, arrays)
                compiled.clear()
                session(engine, who[turned:] + who[:turned])
                programs = sum(compilations().values()) - before
                counted.append((programs, sum("backend_compile" in e for e in compiled)))
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
    assert 0 < counted[0][0] < 60
    assert counted[1:] == [(0, 0), (0, 0)], counted


def test_a_role_play_is_its_characters_own(engine: Engine) -> None:
    said = {}
    for name in ("ann", "bob"):
        play = RolePlay(engine, Persona("Tess", "a circle", "hello"), model=name)
        said[name] = play.reply("who are you ?", SHORT).reply
    assert len(set(said.values())) == 2


def test_fifty_concurrent_requests_for_different_characters(engine: Engine) -> None:
    who = ["base", *CHARACTERS]
    asked = [(f"prompt number {i % 9}", who[i % 4]) for i in range(50)]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda a: engine.answer(None, a[0], SHORT, model=a[1]), asked))
    alone = {a: engine.answer(None, a[0], SHORT, model=a[1]) for a in set(asked)}
    assert answers == [alone[a] for a in asked]
    assert len(set(alone.values())) > 20


def test_a_cancelled_request_leaves_the_other_characters_alone(engine: Engine) -> None:
    running = engine.submit_text("hello", settings=TextSettings(max_tokens=400), model="ann")
    waiting = engine.submit_text("hello", settings=SHORT, model="bob")
    never = engine.submit_text("hello", settings=SHORT, model="cleo")
    never.cancel()
    running.cancel()
    for job in (running, never):
        with pytest.raises(Cancelled):
            job.result(60)
    assert waiting.result(60) == engine.answer(None, "hello", SHORT, model="bob")


def test_unknown_taken_and_removed_names_are_clear_errors(engine: Engine, adapters, tokenizer) -> None:
    with pytest.raises(UserError, match=r"character 'boob' is unknown \(did you mean 'bob'\?\).*base, ann"):
        engine.answer(None, "hi", model="boob")
    with pytest.raises(UserError, match="'bob' is served already"):
        engine.add_character("bob", adapters["ann"])
    with pytest.raises(UserError, match="base model cannot be removed"):
        engine.remove("base")
    engine.add_character("dan", adapters["ann"])
    assert engine.answer(None, "hello", SHORT, model="dan") == engine.answer(
        None, "hello", SHORT, model="ann"
    )
    engine.remove("dan")
    with pytest.raises(UserError, match="character 'dan' is unknown"):
        engine.answer(None, "hello", SHORT, model="dan")
    # Another one of that name remembers nothing of the first.
    engine.add_character("dan", adapters["bob"])
    assert engine.answer(None, "hello", SHORT, model="dan") == engine.answer(
        None, "hello", SHORT, model="bob"
    )
    engine.remove("dan")


def test_a_character_removed_while_requests_wait_is_an_error_to_them_alone(engine: Engine, adapters) -> None:
    engine.add_character("eve", adapters["cleo"])
    with engine.together():
        gone = engine.submit_text("hello", settings=SHORT, model="eve")
        stays = engine.submit_text("hello", settings=SHORT, model="ann")
        engine.remove("eve")
    with pytest.raises(UserError, match="character 'eve' is unknown"):
        gone.result(60)
    assert stays.result(60)


def test_a_larger_rank_is_welcome_later(model, tokenizer, adapters) -> None:
    with Engine(model, None, tokenizer) as engine:
        alone = engine.answer(None, "hello there", SHORT)
        engine.add_character("cleo", adapters["cleo"])
        cleo = engine.answer(None, "hello there", SHORT, model="cleo")
        engine.add_character("bob", adapters["bob"])
        assert engine.answer(None, "hello there", SHORT, model="cleo") == cleo != alone
        assert engine.answer(None, "hello there", SHORT) == alone
