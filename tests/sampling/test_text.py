"""Decoding: what is drawn, when it ends, and that a row never depends on its neighbours."""

from __future__ import annotations

import copy
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.sampling.decoding import decode
from unichar_jax.errors import UserError
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import text
from unichar_jax.sampling.text import Choice, Reply, TextSettings

BOS = 1


@pytest.fixture(scope="module")
def read(model: UnifiedModel, prompts) -> kv.KVCache:
    return kv.prefill_text(model, kv.empty(model, 3, 48), *prompts)


def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 2


choose = jax.jit(text.choose)


def counts(n: int) -> np.ndarray:
    return np.full(4, n, np.int32)


def test_temperature_zero_and_top_k_of_one_take_the_likeliest_token() -> None:
    expected = logits().argmax(-1)
    for settings in (
        TextSettings(),
        TextSettings(temperature=5, top_k=1),
        TextSettings(temperature=5, top_p=1e-6),
    ):
        np.testing.assert_array_equal(choose(logits(), Choice.of([settings] * 4), counts(0)), expected)


def test_truncation_keeps_what_it_should() -> None:
    def drawn(settings: TextSettings) -> set[int]:
        choice = Choice.of([settings] * 4)
        return {int(choose(logits(), choice, counts(n))[0]) for n in range(150)}

    ranked = np.argsort(-logits()[0])
    assert drawn(TextSettings(temperature=1.5, top_k=3)) == set(ranked[:3].tolist())
    # By hand: the smallest set of likeliest tokens that reaches half of the probability.
    p = np.exp(logits()[0] / 1.5)
    needed = int(np.searchsorted(np.cumsum(p[ranked] / p.sum()), 0.5)) + 1
    assert drawn(TextSettings(temperature=1.5, top_p=0.5)) <= set(ranked[:needed].tolist())
    assert len(drawn(TextSettings(temperature=1.5))) > needed


def test_a_draw_depends_on_its_own_settings_only() -> None:
    """Also when another row brings truncation, or sampling at all, into the batch."""
    plain, truncated = TextSettings(temperature=1, seed=7), TextSettings(temperature=1, top_k=2, seed=7)
    alone = choose(logits(), Choice.of([plain] * 4), counts(3))
    mixed = choose(logits(), Choice.of([plain, truncated, TextSettings(), plain]), counts(3))
    assert int(mixed[0]) == int(alone[0])
    assert int(mixed[3]) == int(alone[3])
    assert int(mixed[2]) == logits()[2].argmax()
    other_seed = [replace(plain, seed=s) for s in range(20)]
    tokens = {int(choose(logits(), Choice.of([s] * 4), counts(3))[0]) for s in other_seed}
    assert len(tokens) > 3


def test_decoding_a_batch_is_decoding_each_row(model: UnifiedModel, read: kv.KVCache) -> None:
    settings = [
        TextSettings(max_tokens=9),
        TextSettings(max_tokens=4, temperature=0.8, seed=3),
        TextSettings(max_tokens=9, temperature=0.8, top_p=0.9, seed=4),
    ]
    together, state = decode(model, read, settings)
    assert [len(t) for t in together] == [9, 4, 9]
    np.testing.assert_array_equal(state.cache.length, read.length + np.array([9, 4, 9]))
    for row, expected in enumerate(together):
        alone, _ = decode(model, kv.take(read, np.array([row])), [settings[row]])
        assert alone[0] == expected


def test_a_row_ends_at_eos_and_its_neighbours_go_on(model: UnifiedModel, read: kv.KVCache) -> None:
    settings = [TextSettings(max_tokens=9, temperature=0.9, seed=s) for s in range(3)]
    free, _ = decode(model, read, settings)
    ending = copy.copy(model)  # the same weights, with another token as its end
    eos = free[0][4]
    special = replace(model.cfg.special_tokens, eos=eos)
    ending.cfg = replace(model.cfg, special_tokens=special)
    ended, state = decode(ending, read, settings)
    for got, all_tokens in zip(ended, free, strict=True):
        cut = all_tokens.index(eos) if eos in all_tokens else len(all_tokens)
        assert got == all_tokens[:cut]
    assert len(ended[0]) <= 4 < max(map(len, ended))
    assert bool(state.done.all())
    assert int(state.token[0]) == eos


def test_streaming_gives_the_same_text_in_pieces(model: UnifiedModel, read: kv.KVCache, tokenizer) -> None:
    settings = [TextSettings(max_tokens=n) for n in (20, 3)]  # the third row is padding
    whole, _ = decode(model, read, [*settings, TextSettings(max_tokens=1)])
    pieces: list[tuple[int, str]] = []
    texts = text.stream(model, read, tokenizer, settings, lambda row, piece: pieces.append((row, piece)))
    for row, got in enumerate(texts):
        assert got == tokenizer.decode(whole[row])
        assert "".join(p for r, p in pieces if r == row) == got
    assert len(pieces) >= 3

    stop = f"w{whole[0][6]} "
    first = texts[0].index(stop)
    stopped = text.stream(model, read, tokenizer, [replace(settings[0], stop=(stop,)), settings[1]])
    assert stopped == [texts[0][:first], texts[1]]


def test_cancelling_ends_one_row(model: UnifiedModel, read: kv.KVCache, tokenizer) -> None:
    settings = [TextSettings(max_tokens=24)] * 3
    texts = text.stream(model, read, tokenizer, settings, cancelled=lambda row: row == 1)
    assert [len(t.split()) for t in texts] == [24, text.CHUNK, 24]


def test_log_probs_are_those_of_decoding(model: UnifiedModel, read: kv.KVCache) -> None:
    tokens, _ = decode(model, read, [TextSettings(max_tokens=5)] * 3)
    ids = np.array([[BOS, *row] for row in tokens], np.int32)
    log_probs = text.token_log_probs(model, read, ids, np.array([6, 3, 6], np.int32))
    assert np.all(np.asarray(log_probs)[1, 2:] == 0)
    other = ids.copy()
    other[0, 3] = (ids[0, 3] + 1) % 500
    less = text.token_log_probs(model, read, other, np.array([6, 3, 6], np.int32))
    assert float(less[0, 2]) < float(log_probs[0, 2])  # greedy took the likeliest
    np.testing.assert_allclose(less[0, :2], log_probs[0, :2], rtol=1e-5)

    cache, token = read, ids[:, 0]
    step = jax.jit(kv.read_text)
    for i in range(2):
        hidden, cache = step(model, cache, token[:, None], np.ones(3, np.int32))
        scores = model.logits(hidden[:, 0])
        expected = jax.nn.log_softmax(scores)[np.arange(3), ids[:, i + 1]]
        np.testing.assert_allclose(log_probs[:, i], expected, rtol=1e-4, atol=1e-5)
        token = ids[:, i + 1]


class Bytes:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def feed(reply: Reply, data: bytes, size: int) -> list[str]:
    return [reply.feed(list(data[i : i + size])) for i in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_a_reply_hands_out_only_what_is_final(size: int) -> None:
    reply = Reply(Bytes(), TextSettings(stop=("STOP", "\n\n")), bos=0)
    pieces = feed(reply, "Süß STO… ok\nSTOP and more".encode(), size)
    assert "".join(pieces) == reply.text == "Süß STO… ok\n"
    assert reply.ended
    assert not any("�" in piece for piece in pieces)


def test_a_reply_ends_where_the_model_opens_another_turn() -> None:
    reply = Reply(Bytes(), TextSettings(), bos=0)
    assert reply.feed([*b"one", 0, *b"two"]) == "one"
    assert reply.ended
    assert reply.feed([*b"more"]) == ""


def test_an_unfinished_character_is_given_at_the_end() -> None:
    reply = Reply(Bytes(), TextSettings(), bos=0)
    assert reply.feed(list("ü".encode()[:1])) == ""
    assert reply.finish() == "�"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, r"text\.max_tokens"),
        ({"temperature": -1}, r"text\.temperature"),
        ({"top_p": 0}, r"text\.top_p"),
        ({"top_k": -1}, r"text\.top_k"),
        ({"stop": ("",)}, r"text\.stop"),
    ],
)
def test_settings_are_checked(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextSettings(**change)


def test_stacked_layers_decode_as_those_taken_apart(model: UnifiedModel, read: kv.KVCache) -> None:
    """TPUs, and GPUs that are nearly full, scan the layers where they are. Rows end at different times."""
    choice = Choice.of(
        [TextSettings(max_tokens=n, temperature=t, seed=n) for n, t in ((9, 0), (4, 1), (7, 0.5))]
    )
    layers = text.text_layers(model)
    assert layers is not None  # this is a CPU
    runs = []
    for way in (layers, None):
        state, tokens = text.start(model, read), []
        for _ in range(2):
            new, state = text.decode_chunk(model, way, state, choice, num_tokens=5)
            tokens.append(np.asarray(new))
        runs.append((np.concatenate(tokens, axis=1), state))
    (apart, first), (stacked, second) = runs
    np.testing.assert_array_equal(stacked, apart)
    assert (apart >= 0).sum(axis=1).max() == 9
    np.testing.assert_array_equal(first.cache.length, second.cache.length)
    np.testing.assert_allclose(second.cache.k, first.cache.k, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(second.cache.v, first.cache.v, rtol=1e-3, atol=1e-3)
