"""Times the sampling engine against its alternatives, as ratios from one run.

Drawing: eight pictures in one batch against eight requests one after the other. Chunks: a drawing by chunks of
steps, as the engine draws, against the whole loop in one program. Talking: replies of a
conversation whose beginning is remembered against reading it anew in every turn. Decoding: tokens a second
against what the memory could deliver if each token did nothing but read the weights it needs and the filled
cache once; the memory's rate is that of a copy (bytes read and written a second), made in turns with the
decoding. All go through the public ``Engine``; the model is random and every answer has its full length.

    python scripts/bench_sampling.py --hidden 768 --layers 12 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np

from unichar_jax.config.compute import Compute
from unichar_jax.config.model import DecoderConfig, model_preset
from unichar_jax.models import params
from unichar_jax.models.autoencoder import Autoencoder
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow
from unichar_jax.sampling.engine import Engine, EngineConfig
from unichar_jax.sampling.flow import FlowSettings, Guidance
from unichar_jax.sampling.session import Persona, RolePlay
from unichar_jax.sampling.text import TextSettings

PARTS = ("drawing", "chunks", "talking", "decoding")
PERSONA = Persona("Ada", "Ada keeps the lighthouse and speaks plainly. " * 12, "The lamp is lit.")


class Letters:
    """One token for each byte."""

    def encode(self, text: str) -> list[int]:
        return [16 + b for b in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(32 + i % 90) for i in ids)


def build(a: argparse.Namespace) -> tuple[UnifiedModel, Autoencoder]:
    """A random model that never ends a text by itself."""
    decoder = DecoderConfig(
        hidden_size=a.hidden,
        mlp_size=a.mlp,
        num_layers=a.layers,
        num_heads=a.heads,
        num_kv_heads=a.kv_heads,
        vocab_size=a.vocabulary,
    )
    cfg = replace(model_preset("debug"), decoder=decoder, max_latent_size=16)
    model = params.initialize(UnifiedModel(cfg, Compute(dtype=a.dtype)), 0)
    tokens = cfg.special_tokens
    head = np.array(model.lm_head.kernel[...])
    head[:, [tokens.bos, tokens.eos]] = 0  # the largest of the others is above 0
    model.lm_head.kernel[...] = head
    return model, params.initialize(Autoencoder(cfg.autoencoder), 1)


def copied_bytes_per_second(array: np.ndarray, target: np.ndarray, pool: ThreadPoolExecutor) -> float:
    """Bytes read and written a second by a copy on all cores."""
    parts = pool._max_workers
    pairs = list(zip(np.array_split(target, parts), np.array_split(array, parts), strict=True))
    start = time.perf_counter()
    list(pool.map(lambda pair: np.copyto(*pair), pairs))
    return 2 * array.nbytes / (time.perf_counter() - start)


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def in_turns(repeats: int, **schemes: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each scheme, ``repeats`` times in turns, after one round that compiles."""
    for f in schemes.values():
        f()
    rounds = [{name: seconds(f) for name, f in schemes.items()} for _ in range(repeats)]
    return {name: [r[name] for r in rounds] for name in schemes}


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median over rounds of how many times faster the second is."""
    return round(statistics.median(s / f for s, f in zip(slow, fast, strict=True)), 2)


def drawing(engine: Engine, a: argparse.Namespace) -> dict[str, object]:
    settings = FlowSettings(a.steps + 1, 1.0, Guidance(4.0, interval=(0.4, 1.0)))
    size = (16 * a.grid, 16 * a.grid)
    draw = lambda n, seed: engine.generate_images(["a lamp"], n, settings, size=size, seed=seed)  # noqa: E731
    took = in_turns(a.repeats, single=lambda: [draw(1, i) for i in range(8)], batch=lambda: draw(8, 0))
    return {
        "eight_single_s": round(statistics.median(took["single"]), 2),
        "batch_of_8_s": round(statistics.median(took["batch"]), 2),
        "batch_is_faster_by": ratio(took["single"], took["batch"]),
    }


def chunks(model: UnifiedModel, a: argparse.Namespace) -> dict[str, object]:
    settings = FlowSettings(a.steps + 1, 1.0, Guidance(4.0, interval=(0.4, 1.0)))
    grid = (a.grid, a.grid)
    ids = np.full((8, 16), 20, np.int32)
    contexts = flow.Contexts(kv.prefill_text(model, kv.empty(model, 8, 64), ids, np.full(8, 16)))
    noise = flow.draw_noise(flow.row_keys(np.arange(8)), 0, grid, model.cfg.latent_dim)
    whole = lambda: jax.block_until_ready(flow.sample_latents(model, contexts, noise, grid, settings))  # noqa: E731
    by_chunks = lambda: list(flow.sample_in_chunks(model, contexts, noise, grid, settings))  # noqa: E731
    by_chunks()  # the first learns the time of a step with the compilation in it
    took = in_turns(a.repeats, whole=whole, chunks=by_chunks)
    return {
        "whole_s": round(statistics.median(took["whole"]), 3),
        "chunks_s": round(statistics.median(took["chunks"]), 3),
        "chunks_are_slower_by": round(statistics.median(np.divide(took["chunks"], took["whole"])) - 1, 4),
        "number_of_chunks": len(by_chunks()),
    }


def talking(model: UnifiedModel, a: argparse.Namespace) -> dict[str, object]:
    def conversation(remembered: int, tokens: int) -> None:
        with Engine(model, None, Letters(), EngineConfig(remembered=remembered)) as engine:
            play = RolePlay(engine, PERSONA)
            for turn in range(a.turns):
                play.reply(f"What do you see tonight, number {turn}?", TextSettings(max_tokens=tokens))

    result: dict[str, object] = {}
    for tokens in (1, 32):
        took = in_turns(
            a.repeats,
            anew=lambda n=tokens: conversation(0, n),
            kept=lambda n=tokens: conversation(16_384, n),
        )
        result[f"replies_of_{tokens}_tokens"] = {
            "anew_s_per_turn": round(statistics.median(took["anew"]) / a.turns, 3),
            "kept_s_per_turn": round(statistics.median(took["kept"]) / a.turns, 3),
            "kept_is_faster_by": ratio(took["anew"], took["kept"]),
        }
    return result


def decoding(engine: Engine, model: UnifiedModel, a: argparse.Namespace) -> dict[str, object]:
    width = np.dtype(model.compute.jax_dtype).itemsize
    und = sum(x.size for name, x in params.named_leaves(model) if ".und." in name or "lm_head" in name)
    d = model.cfg.decoder
    per_slot = 2 * d.num_layers * d.num_kv_heads * d.head_dim * width
    prompt, settings = "x" * a.context, TextSettings(max_tokens=a.tokens)
    short = TextSettings(max_tokens=1)
    source = np.ones(2**26, np.float32)
    target, result = np.empty_like(source), {}
    with ThreadPoolExecutor(a.cores) as pool:
        for batch in (1, 8):
            prompts = [f"{i}{prompt}" for i in range(batch)]

            def ask(settings: TextSettings, prompts: list[str] = prompts) -> float:
                with engine.together():
                    jobs = [engine.submit_text(p, settings=settings) for p in prompts]
                return seconds(lambda: [job.result() for job in jobs])

            ask(short), ask(settings)
            shares, rates = [], []
            for _ in range(a.repeats):
                memory = copied_bytes_per_second(source, target, pool)
                took = ask(settings) - ask(short)  # without reading the prompt, which is remembered
                memory = (memory + copied_bytes_per_second(source, target, pool)) / 2
                steps = (a.tokens - 1) / took
                needed = und * width + batch * (a.context + a.tokens / 2) * per_slot
                shares.append(steps * needed / memory)
                rates.append(batch * steps)
            result[f"batch_{batch}"] = {
                "tokens_per_second": round(statistics.median(rates), 1),
                "bytes_per_step": int(needed),
                "copy_gb_per_second": round(memory / 1e9, 1),
                "share_of_the_bound": round(statistics.median(shares), 2),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    sizes = dict(hidden=768, mlp=2048, layers=12, heads=12, kv_heads=4, vocabulary=8192)
    habits = dict(grid=8, steps=10, turns=10, context=512, tokens=64, cores=2, repeats=5)
    for name, value in (sizes | habits).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", choices=PARTS, nargs="*")
    a = parser.parse_args()
    model, autoencoder = build(a)
    wanted = a.only or PARTS
    result: dict[str, object] = {
        "device": jax.devices()[0].device_kind,
        "parameters_millions": round(params.count(model) / 1e6, 1),
        **vars(a),
    }
    with Engine(model, autoencoder, Letters(), EngineConfig(max_batch=8)) as engine:
        if "drawing" in wanted:
            result["drawing"] = drawing(engine, a)
        if "chunks" in wanted:
            result["chunks"] = chunks(model, a)
        if "talking" in wanted:
            result["talking"] = talking(model, a)
        if "decoding" in wanted:
            result["decoding"] = decoding(engine, model, a)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
