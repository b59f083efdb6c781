"""Compares upstream BAGEL (PyTorch) and this package on the same prompts with the real weights.

NOT YET RUN on real weights: it is here for the day you have them. The tests run its second half, against
numbers of this package's own. Two halves, because the two models rarely fit on one device together:

    # where upstream BAGEL runs (its checkout, its requirements, a CUDA device with 40 GB or more)
    python scripts/compare_with_upstream.py record --upstream CHECKOUT --model BAGEL-7B-MoT --out ref.npz

    # where this package runs; MODEL is the same download, or what 'unichar convert' made of it
    python scripts/compare_with_upstream.py compare --model MODEL --reference ref.npz

``record`` answers each prompt greedily and draws it from fixed noise, and keeps logits, velocities, latents
and pixels. ``compare`` feeds this package the same tokens, noise and noised latents, and prints how far it is
from each. Both sides compute in bfloat16, so expect differences of the size of its rounding, not zero.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

PROMPTS = (
    "A small blue dragon reads a book under a paper lantern.",
    "Describe the sea at night in one sentence.",
)


def record(
    upstream: Path,
    model: Path,
    out: Path,
    prompts: tuple[str, ...] = PROMPTS,
    max_tokens: int = 32,
    size: tuple[int, int] = (512, 512),
    num_timesteps: int = 20,
    text_scale: float = 4.0,
    seed: int = 0,
) -> None:
    """Runs upstream BAGEL and keeps what it computes.

    Args:
      upstream: checkout of https://github.com/ByteDance-Seed/Bagel.
      model: BAGEL-7B-MoT download.
      out: .npz file to write.
      prompts: what to answer and to draw.
      max_tokens: of an answer.
      size: height and width of the pictures, multiples of 16.
      num_timesteps: of drawing.
      text_scale: classifier-free guidance.
      seed: of the noise.
    """
    inferencer = _load_upstream(upstream, model)
    torch = sys.modules["torch"]
    bagel, arrays = inferencer.model, {}
    tokens = (size[0] // 16) * (size[1] // 16)
    noise = np.random.default_rng(seed).standard_normal((len(prompts), tokens, 64), np.float32)
    for i, prompt in enumerate(prompts):
        empty, context = inferencer.init_gen_context(), inferencer.init_gen_context()
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            context = inferencer.update_context_text(prompt, context)
            with _outputs(bagel.language_model.lm_head) as logits:
                inferencer.gen_text(context, max_length=max_tokens, do_sample=False)
            arrays[f"{i}.logits"] = np.stack([x.reshape(-1) for x in logits])
            with _flow(bagel, torch, noise[i]) as steps:
                picture = inferencer.gen_image(
                    size,
                    context,
                    cfg_text_scale=text_scale,
                    cfg_img_scale=1.0,
                    cfg_text_precontext=empty,
                    cfg_img_precontext=context,
                    num_timesteps=num_timesteps,
                )
        arrays[f"{i}.ids"] = np.array(inferencer.tokenizer.encode(prompt), np.int32)
        arrays[f"{i}.noise"] = noise[i]
        arrays[f"{i}.x"] = np.stack([x for x, _ in steps])
        arrays[f"{i}.velocity"] = np.stack([v for _, v in steps])
        arrays[f"{i}.picture"] = np.asarray(picture)
        print(f"recorded {i + 1} of {len(prompts)}: {len(logits)} tokens, {len(steps)} steps")
    settings = {"prompts": prompts, "size": size, "num_timesteps": num_timesteps, "text_scale": text_scale}
    np.savez(out, settings=json.dumps(settings), **arrays)


def _load_upstream(upstream: Path, model: Path) -> Any:
    """Upstream's ``InterleaveInferencer`` over the download, on one CUDA device in bfloat16."""
    sys.path.insert(0, str(upstream.resolve()))
    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from data.data_utils import add_special_tokens
    from data.transforms import ImageTransform
    from inferencer import InterleaveInferencer
    from modeling import bagel
    from modeling.autoencoder import load_ae
    from modeling.qwen2 import Qwen2Tokenizer

    language = bagel.Qwen2Config.from_json_file(str(model / "llm_config.json"))
    language.qk_norm, language.tie_word_embeddings = True, False
    language.layer_module = "Qwen2MoTDecoderLayer"
    vision = bagel.SiglipVisionConfig.from_json_file(str(model / "vit_config.json"))
    vision.rope, vision.num_hidden_layers = False, vision.num_hidden_layers - 1
    autoencoder, autoencoder_config = load_ae(local_path=str(model / "ae.safetensors"))
    config = bagel.BagelConfig(
        visual_gen=True,
        visual_und=True,
        llm_config=language,
        vit_config=vision,
        vae_config=autoencoder_config,
        vit_max_num_patch_per_side=70,
        connector_act="gelu_pytorch_tanh",
        latent_patch_size=2,
        max_latent_size=64,
    )
    with init_empty_weights():
        tower = bagel.SiglipVisionModel(vision)
        net = bagel.Bagel(bagel.Qwen2ForCausalLM(language), tower, config)
        tower.vision_model.embeddings.convert_conv2d_to_linear(vision, meta=True)
    net = load_checkpoint_and_dispatch(
        net, checkpoint=str(model / "ema.safetensors"), device_map={"": "cuda:0"}, dtype=torch.bfloat16
    ).eval()
    _move_inputs(net, "cuda:0")
    tokenizer, special, _ = add_special_tokens(Qwen2Tokenizer.from_pretrained(str(model)))
    return InterleaveInferencer(
        model=net,
        vae_model=autoencoder.to("cuda:0", torch.bfloat16).eval(),
        tokenizer=tokenizer,
        vae_transform=ImageTransform(1024, 512, 16),
        vit_transform=ImageTransform(980, 224, 14),
        new_token_ids=special,
    )


def _move_inputs(model: Any, device: str) -> None:
    """Upstream prepares its inputs on the CPU; this puts what is prepared on the device of the model."""

    def moved(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: moved(value) for name, value in x.items()}
        if isinstance(x, tuple):
            return tuple(moved(value) for value in x)
        return x.to(device) if hasattr(x, "to") else x

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: moved(function(*args, **kwargs))

    for name in ("prepare_prompts", "prepare_start_tokens", "prepare_vae_latent", "prepare_vae_latent_cfg"):
        setattr(model, name, wrap(getattr(model, name)))


@contextmanager
def _outputs(module: Any) -> Iterator[list[np.ndarray]]:
    """Collects what a PyTorch module returns."""
    seen: list[np.ndarray] = []
    hook = module.register_forward_hook(lambda m, a, y: seen.append(y.detach().float().cpu().numpy()))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _flow(model: Any, torch: Any, noise: np.ndarray) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Makes upstream draw from ``noise``, and collects ``(noised latents, guided velocity)`` of each step."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    prepare, forward = model.prepare_vae_latent, model._forward_flow

    def prepare_from_noise(*args: Any, **kwargs: Any) -> dict[str, Any]:
        prepared = prepare(*args, **kwargs)
        drawn = prepared["packed_init_noises"]
        prepared["packed_init_noises"] = torch.from_numpy(noise).to(drawn.device, drawn.dtype)
        return prepared

    def forward_and_keep(*args: Any, **kwargs: Any) -> Any:
        v = forward(*args, **kwargs)
        seen.append((kwargs["x_t"].detach().float().cpu().numpy(), v.detach().float().cpu().numpy()))
        return v

    model.prepare_vae_latent, model._forward_flow = prepare_from_noise, forward_and_keep
    try:
        yield seen
    finally:
        model.prepare_vae_latent, model._forward_flow = prepare, forward


# -- this package -------------------------------------------------------------------------------------------


def compare(model: Path, reference: Path, dtype: Literal["bfloat16", "float32"] = "bfloat16") -> None:
    """Prints how far this package is from a recorded reference.

    Args:
      model: BAGEL download, or a converted directory.
      reference: .npz file that ``record`` wrote.
      dtype: this package computes in.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model} and {reference}, {dtype}")
    for column in ("prompt", "what", "relative L2", "largest difference", "note"):
        table.add_column(column)
    for prompt, what, mine, theirs, note in differences(model, reference, dtype):
        error = np.linalg.norm(mine - theirs) / max(np.linalg.norm(theirs), 1e-30)
        table.add_row(str(prompt), what, f"{error:.3g}", f"{np.abs(mine - theirs).max():.3g}", note)
    Console().print(table)


def differences(
    path: Path, reference: Path, dtype: str = "bfloat16"
) -> Iterator[tuple[int, str, np.ndarray, np.ndarray, str]]:
    """``(prompt, what, this package's array, upstream's array, note)`` for everything that was recorded."""
    import jax
    import jax.numpy as jnp

    from unichar_jax.checkpoint import store
    from unichar_jax.config.compute import Compute
    from unichar_jax.data.tokenizer import load_tokenizer
    from unichar_jax.sampling import cache as kv
    from unichar_jax.sampling import flow, pixels

    data = np.load(reference)
    settings = json.loads(str(data["settings"]))
    model = store.load_model(path, compute=Compute(dtype=dtype), dtype=dtype)
    autoencoder, special = store.load_autoencoder(path), model.cfg.special_tokens
    grid = tuple(s // model.cfg.pixels_per_latent for s in settings["size"])
    drawing = flow.FlowSettings(settings["num_timesteps"], guidance=flow.Guidance(settings["text_scale"]))
    tokenizer = load_tokenizer(store.config_folder(path))
    read_text = jax.jit(kv.read_text)
    velocity = jax.jit(flow.guided_velocity, static_argnames="grid")
    for i, prompt in enumerate(settings["prompts"]):
        ids = data[f"{i}.ids"].tolist()
        if tokenizer.encode(prompt) != ids:
            raise SystemExit(f"prompt {i} has other token ids here than upstream: another tokenizer")
        logits = data[f"{i}.logits"]
        turn = [special.bos, *ids, special.eos]
        context = kv.empty(model, 1, kv.bucket(len(turn) + len(logits)))
        context = kv.prefill_text(model, context, jnp.array([turn]), jnp.array([len(turn)]))
        # The answer as upstream gave it: BOS, then all of its tokens but the last.
        answer = [special.bos, *logits.argmax(-1)[:-1].tolist()]
        states, _ = read_text(model, context, jnp.array([answer]), jnp.array([len(answer)]))
        mine = np.asarray(model.logits(states)[0])
        agree = int((mine.argmax(-1) == logits.argmax(-1)).sum())
        yield i, "logits", mine, logits, f"{agree} of {len(logits)} greedy tokens agree"

        contexts = flow.Contexts(context)
        branched, guidance = flow.branches(model, contexts, drawing.guidance), drawing.guidance
        for step in _some(len(data[f"{i}.x"])):
            t = drawing.times[step]
            acts = guidance.uses[0] and bool(guidance.acts(t))
            rows = branched if acts else branched.unguided()
            x = jnp.asarray(data[f"{i}.x"][step])[None]
            mine = np.asarray(velocity(model, rows, x, jnp.float32(t), grid=grid, guidance=guidance))[0]
            yield i, f"velocity at t = {t:.3f}", mine, data[f"{i}.velocity"][step], ""

        noise = jnp.asarray(data[f"{i}.noise"])[None]
        latents = flow.sample_latents(model, contexts, noise, grid, drawing)
        drawn = pixels.decode_images(autoencoder, latents, grid, model.cfg.latent_patch_size)
        mine, theirs = np.asarray(drawn[0], np.float32), data[f"{i}.picture"].astype(np.float32)
        error = np.mean(np.square(mine - theirs))
        psnr = 10 * np.log10(255**2 / error) if error else np.inf
        yield i, "picture", mine, theirs, f"PSNR {psnr:.1f} dB"


def _some(steps: int) -> Sequence[int]:
    """The first, a middle and the last step."""
    return sorted({0, steps // 2, steps - 1})


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"record": record, "compare": compare})
