"""The reference numbers through the public engine: what is asked, queued, batched and drawn by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np
import pytest

from tests.parity import golden
from unichar_jax.data.images import position_ids
from unichar_jax.models.autoencoder import patchify
from unichar_jax.sampling import pixels
from unichar_jax.sampling.context import Part, Picture, Text
from unichar_jax.sampling.engine import Engine
from unichar_jax.sampling.flow import FlowSettings, Guidance
from unichar_jax.sampling.text import TextSettings

CONTEXTS = {"text": ("text",), "vit_text": ("vit", "text"), "vae_vit_text": ("vae", "vit", "text")}


class Numbers:
    """Texts are token ids in decimal, so that an answer shows its tokens."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(golden.model(), golden.autoencoder(), Numbers()) as engine:
        yield engine


def part(engine: Engine, name: str) -> Part:
    cfg, data = golden.config(), golden.tensors()
    if name == "text":
        return engine.parts.text(" ".join(map(str, data["decode.prompt"])))
    if name == "vit":
        rows, columns = (side // cfg.vision.patch_size for side in data["vit.image0"].shape[1:])
        grid = position_ids(rows, columns, cfg.vision.max_patches_per_side)
        return Picture("vit", data["vit.tokens"][: rows * columns], grid)
    rows, columns = (int(n) for n in data["train.latent_shapes"][0])
    side = cfg.pixels_per_latent
    image = data["train.padded_images"][:1, :, : rows * side, : columns * side].transpose(0, 2, 3, 1)
    latents = patchify(jax.jit(golden.autoencoder().encode)(image), cfg.latent_patch_size)
    return Picture("latent", np.asarray(latents[0]), position_ids(rows, columns, cfg.max_latent_size))


def parts(engine: Engine, names: Sequence[str]) -> list[Part]:
    return [part(engine, name) for name in names]


@pytest.mark.parametrize("name", CONTEXTS)
def test_greedy_answers_are_those_of_the_reference_in_any_company(engine: Engine, name: str) -> None:
    expected = golden.tensors()[f"decode.{name}.tokens"][1:]
    asked, settings = parts(engine, CONTEXTS[name]), TextSettings(max_tokens=len(expected))
    other = [*asked[:-1], Text((*asked[-1].keys[:-1].tolist(), 9, 9, 7, int(asked[-1].keys[-1])))]
    with engine.together():
        jobs = [engine.submit_parts(p, settings) for p in (asked, other, asked)]
    answers = [[int(n) for n in job.result(300).split()] for job in jobs]
    assert answers[0] == answers[2] == expected.tolist()


@pytest.mark.parametrize("case", golden.read_json("image_cases.json"), ids=lambda c: c["name"])
def test_pictures_are_those_of_the_reference_in_any_company(engine: Engine, case: dict, monkeypatch) -> None:
    """The latents that the engine gives to its autoencoder, and for one case the picture that comes out."""
    data, decoded, decode = golden.tensors(), [], pixels.decode_images
    monkeypatch.setattr(pixels, "decode_images", lambda *a: decoded.append(a[1]) or decode(*a))
    guidance = Guidance(
        case["cfg_text_scale"],
        case["cfg_img_scale"],
        case["renorm_min"],
        tuple(case["cfg_interval"]),
        case["renorm"],
    )
    settings = FlowSettings(case["num_timesteps"], case["timestep_shift"], guidance)
    contexts = [parts(engine, case[c]) for c in ("context", "cfg_text_context", "cfg_img_context")]
    noise = data["image.init_noise"][None]
    with engine.together():
        job = engine.submit_drawing(*contexts, 1, settings, size=tuple(case["shape"]), noise=noise)
        engine.submit_drawing(*contexts, 2, settings, size=tuple(case["shape"]), seed=5)
    picture = np.asarray(job.result(300)[0], np.float64)
    golden.assert_close(decoded[0][0], data[f"image.{case['name']}"], 1e-5, case["name"])
    assert len(decoded[0]) == 3
    if (name := f"image.{case['name']}.decoded") in data:
        whole = np.floor(np.clip(data[name][0].transpose(1, 2, 0) * 0.5 + 0.5, 0, 1) * 255)
        assert np.abs(picture - whole).max() <= 1  # truncation of a value that is whole up to rounding
        assert np.mean(picture != whole) < 1e-3
