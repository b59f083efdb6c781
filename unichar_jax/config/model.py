"""Sizes of the unified model, and how to read them from a BAGEL directory.

A ``ModelConfig`` describes the architecture and nothing else (no dtype, no kernel, no mesh). The numbers of a
converted model come from the checkpoint's own ``llm_config.json`` and ``vit_config.json``; what BAGEL keeps
in code rather than in those files (autoencoder, latent patch, table sizes, special tokens) is FLUX's and
BAGEL's own unless an ``extra_config.json`` beside them says otherwise, which is what the small presets of
this repository use.

Sources: BAGEL (arXiv 2505.14683) and UniCharacter (arXiv 2605.08129).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unichar_jax.config.ranges import require, require_multiple
from unichar_jax.errors import UserError, require_known
from unichar_jax.records import Findings, Record, read_settings, shown

LLM_FILE, VIT_FILE, EXTRA_FILE = "llm_config.json", "vit_config.json", "extra_config.json"
Reader = Callable[[Record, str], Any]
Names = dict[str, tuple[str, Reader]]
_ABSENT = f"copy {LLM_FILE} and {VIT_FILE} of the download beside the weights"


@dataclass(frozen=True)
class DecoderConfig:
    """Qwen2 mixture-of-transformers decoder: every layer holds an understanding and a generation expert."""

    hidden_size: int = 3584
    mlp_size: int = 18944
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    vocab_size: int = 152064
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = True

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        require_multiple("decoder: hidden_size", self.hidden_size, f"num_heads {heads}", heads)
        require_multiple("decoder: num_heads", heads, f"num_kv_heads {kv_heads}", kv_heads)
        require(
            self.head_dim % 2 == 0,
            f"decoder: head dimension {self.head_dim} (hidden_size / num_heads) must be even for rotary"
            " embeddings.",
        )
        require(
            self.hidden_size % 4 == 0,
            f"decoder: hidden_size {self.hidden_size} must be a multiple of 4 for the 2-D position tables.",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP tower over packed patches; ``num_layers`` counts the layers that are built (26 for BAGEL)."""

    hidden_size: int = 1152
    mlp_size: int = 4304
    num_layers: int = 26
    num_heads: int = 16
    patch_size: int = 14
    num_channels: int = 3
    max_patches_per_side: int = 70
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        heads = self.num_heads
        require_multiple("vision: hidden_size", self.hidden_size, f"num_heads {heads}", heads)

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * self.num_channels


@dataclass(frozen=True)
class AutoencoderConfig:
    """FLUX's convolutional autoencoder. ``norm_groups`` is 32 in FLUX; small widths want fewer groups."""

    in_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 16
    scale: float = 0.3611
    shift: float = 0.1159
    norm_groups: int = 32

    def __post_init__(self) -> None:
        for m in self.multipliers:
            require(
                self.channels * m % self.norm_groups == 0,
                f"autoencoder: {self.channels} channels x multiplier {m} is not a multiple of norm_groups"
                f" {self.norm_groups}; change channels or norm_groups.",
            )

    @property
    def downsample(self) -> int:
        """Pixels per latent cell and side."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the four tokens that delimit turns and images (public Qwen2.5 values by default)."""

    bos: int = 151644  # <|im_start|>
    eos: int = 151645  # <|im_end|>
    image_start: int = 151652  # <|vision_start|>
    image_end: int = 151653  # <|vision_end|>

    def frame(self, ids: Iterable[int]) -> list[int]:
        """A turn: BOS, its tokens, EOS."""
        return [self.bos, *ids, self.eos]


@dataclass(frozen=True)
class ModelConfig:
    """The whole model: decoder, vision tower, autoencoder, and how latents enter the decoder."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    special_tokens: SpecialTokens = field(default_factory=SpecialTokens)
    latent_patch_size: int = 2
    max_latent_size: int = 64

    @property
    def latent_dim(self) -> int:
        """Width of one latent token: patch x patch x channels."""
        return self.latent_patch_size**2 * self.autoencoder.latent_channels

    @property
    def pixels_per_latent(self) -> int:
        """Pixels per latent token and side (16 for BAGEL)."""
        return self.latent_patch_size * self.autoencoder.downsample

    # -- BAGEL directories ------------------------------------------------------------------------------

    @classmethod
    def from_bagel(cls, folder: str | Path) -> ModelConfig:
        """Reads the sizes from a BAGEL directory.

        Args:
          folder: directory with ``llm_config.json``, ``vit_config.json`` and, for models that are not of
            BAGEL-7B-MoT's own autoencoder and tables, ``extra_config.json``.

        Raises:
          UserError: a file is absent, is not JSON, or asks for something this model does not have.
        """
        folder, found = Path(folder), Findings()
        llm = read_settings(found, folder / LLM_FILE, _ABSENT)
        vit = read_settings(found, folder / VIT_FILE, _ABSENT)
        extra = read_settings(found, folder / EXTRA_FILE)
        _refuse_other_mathematics(llm, vit, (extra, read_settings(found, folder / "config.json")))
        decoder, vision = _read(llm, _LLM), _read(vit, _VIT)
        # BAGEL selects the tower's last-but-one layer, so the last one of the file is never built.
        vision["num_layers"] = vit.whole("num_hidden_layers", low=2) - 1
        vision["max_patches_per_side"] = extra.whole("vit_max_num_patch_per_side", 70)
        if decoder["hidden_size"] % decoder["num_heads"] == 0:
            llm.choice("head_dim", decoder["hidden_size"] // decoder["num_heads"])
        vae, ids = extra.inner("vae"), extra.inner("special_tokens")
        autoencoder = {} if vae is None else _read(vae, _VAE)
        if vae is not None:
            vae.choice("out_ch", autoencoder["in_channels"])
            vae.choice("downsample", 2 ** (len(autoencoder["multipliers"]) - 1))
        tokens = {} if ids is None else _read(ids, _TOKENS)
        sizes = _read(extra, _EXTRA)
        found.refuse()
        try:
            towers = DecoderConfig(**decoder), VisionConfig(**vision), AutoencoderConfig(**autoencoder)
            return cls(*towers, SpecialTokens(**tokens), **sizes)
        except UserError as error:  # sizes that do not go together
            raise UserError(f"{folder}: {error}") from None

    def to_bagel(self) -> dict[str, dict[str, Any]]:
        """The three JSON files that ``from_bagel`` reads, as ``{file name: content}``."""
        v, a = self.vision, self.autoencoder
        llm = dict(
            architectures=["Qwen2ForCausalLM"],
            model_type="qwen2",
            **_written(self.decoder, _LLM),
            hidden_act="silu",
            max_position_embeddings=32768,
            tie_word_embeddings=False,
            layer_module="Qwen2MoTDecoderLayer",
        )
        vit = dict(
            model_type="siglip_vision_model",
            **_written(v, _VIT),
            num_hidden_layers=v.num_layers + 1,
            image_size=v.patch_size * v.max_patches_per_side,
            hidden_act="gelu_pytorch_tanh",
        )
        extra = dict(
            vae=_written(a, _VAE) | dict(out_ch=a.in_channels, downsample=a.downsample),
            **_written(self, _EXTRA),
            vit_max_num_patch_per_side=v.max_patches_per_side,
            connector_act="gelu_pytorch_tanh",
            interpolate_pos=False,
            special_tokens=_written(self.special_tokens, _TOKENS),
        )
        return {LLM_FILE: llm, VIT_FILE: vit, EXTRA_FILE: extra}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def has_tied_head(folder: Path) -> bool:
    """Whether the text head is the embedding, by the settings that ``ModelConfig.from_bagel`` has checked."""
    return read_settings(Findings(), folder / LLM_FILE).flag("tie_word_embeddings")


def _whole(**limits: int) -> Reader:
    return lambda record, key: record.whole(key, **limits)


def _number(default: float | None, low: float, high: float) -> Reader:
    return lambda record, key: record.number(key, default, low, high)


def _read(record: Record, names: Names) -> dict[str, Any]:
    return {ours: read(record, theirs) for ours, (theirs, read) in names.items()}


def _written(config: Any, names: Names) -> dict[str, Any]:
    values = {theirs: getattr(config, ours) for ours, (theirs, _) in names.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _rope_theta(llm: Record) -> float:
    """The base of the rotary frequencies, under its name of either generation of transformers.

    There is no default: that of transformers (10,000) is not that of BAGEL (1,000,000).
    """
    new = llm.data.get("rope_parameters")
    if not isinstance(new, dict) or "rope_theta" not in new:
        return llm.number("rope_theta", None, 1, 1e12)
    theta = Record(llm.found, llm.file, "rope_parameters", new).number("rope_theta", None, 1, 1e12)
    if llm.number("rope_theta", theta, 1, 1e12) != theta:
        llm.error(
            "rope_theta", f"{theta}, as rope_parameters says", shown(llm.data["rope_theta"]), "correct one"
        )
    return theta


# Our fields -> BAGEL's names of them, and how they are read.
_LLM: Names = {
    "hidden_size": ("hidden_size", Record.whole),
    "mlp_size": ("intermediate_size", Record.whole),
    "num_layers": ("num_hidden_layers", Record.whole),
    "num_heads": ("num_attention_heads", Record.whole),
    "num_kv_heads": ("num_key_value_heads", Record.whole),
    "vocab_size": ("vocab_size", Record.whole),
    "rope_theta": ("rope_theta", lambda llm, _: _rope_theta(llm)),
    "norm_eps": ("rms_norm_eps", _number(1e-6, 0, 1)),
    "qk_norm": ("qk_norm", lambda llm, key: llm.flag(key, True)),
}
_VIT: Names = {
    **{name: _LLM[name] for name in ("hidden_size", "mlp_size", "num_heads")},
    "patch_size": ("patch_size", Record.whole),
    "num_channels": ("num_channels", _whole(default=3)),
    "norm_eps": ("layer_norm_eps", _number(1e-6, 0, 1)),
}
_VAE: Names = {
    "in_channels": ("in_channels", Record.whole),
    "channels": ("ch", Record.whole),
    "multipliers": ("ch_mult", lambda vae, key: vae.wholes(key, 1, 1024)),
    "num_res_blocks": ("num_res_blocks", Record.whole),
    "latent_channels": ("z_channels", Record.whole),
    "scale": ("scale_factor", _number(None, 1e-6, 1e6)),
    "shift": ("shift_factor", _number(None, -1e6, 1e6)),
    "norm_groups": ("norm_groups", _whole(default=32)),
}
_TOKENS: Names = {
    "bos": ("bos_token_id", _whole(low=0)),
    "eos": ("eos_token_id", _whole(low=0)),
    "image_start": ("start_of_image", _whole(low=0)),
    "image_end": ("end_of_image", _whole(low=0)),
}
_EXTRA: Names = {n: (n, _whole(default=d)) for n, d in (("latent_patch_size", 2), ("max_latent_size", 64))}


def _refuse_other_mathematics(llm: Record, vit: Record, others: Sequence[Record]) -> None:
    """Settings that would silently change what is computed are errors."""
    kind = llm.data.get("model_type", "qwen2")
    if not isinstance(kind, str) or not kind.startswith(("qwen2", "bagel")):
        llm.error("model_type", "'qwen2'", shown(kind), "only BAGEL's decoder, a Qwen2, is supported")
    for name in ("rope_scaling", "rope_parameters"):
        rope = llm.inner(name)
        if rope is not None and rope.ok:
            plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1, "rope_theta": ...}
            odd = {k: v for k, v in rope.data.items() if v is not None and plain.get(k) not in (v, ...)}
            if odd:
                llm.error(
                    name, "none, or the default type", shown(odd), "only plain rotary positions are supported"
                )
    llm.choice("hidden_act", "silu")
    llm.choice("use_sliding_window", False)
    llm.flag("tie_word_embeddings")
    layers = llm.data.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(x != "full_attention" for x in layers)):
        llm.error("layer_types", "'full_attention' alone", shown(layers), "windows are not supported")
    vit.choice("hidden_act", "gelu_pytorch_tanh")
    for record in others:
        record.choice("connector_act", "gelu_pytorch_tanh")
        record.choice("interpolate_pos", False)


_DEBUG = ModelConfig(
    DecoderConfig(hidden_size=64, mlp_size=160, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=512),
    VisionConfig(hidden_size=48, mlp_size=96, num_layers=2, num_heads=4, max_patches_per_side=8),
    AutoencoderConfig(channels=16, multipliers=(1, 1, 2, 2), num_res_blocks=1, norm_groups=4),
    SpecialTokens(bos=1, eos=2, image_start=3, image_end=4),
    max_latent_size=8,
)

_MINI = ModelConfig(
    DecoderConfig(hidden_size=192, mlp_size=512, num_layers=6, num_heads=4, num_kv_heads=2, vocab_size=2048),
    VisionConfig(hidden_size=192, mlp_size=512, num_layers=4, num_heads=4, max_patches_per_side=8),
    # Scale and shift give the latents of checkpoints/mini zero mean and unit deviation (measured).
    AutoencoderConfig(
        channels=8, multipliers=(1, 2, 4, 8), num_res_blocks=1, norm_groups=2, scale=1.1811, shift=0.0344
    ),
    SpecialTokens(bos=1, eos=2, image_start=3, image_end=4),
    max_latent_size=8,
)

MODEL_PRESETS: dict[str, ModelConfig] = {"debug": _DEBUG, "mini": _MINI, "bagel-7b": ModelConfig()}


def model_preset(name: str) -> ModelConfig:
    """Returns a named preset; an unknown name is a ``UserError`` with the closest one."""
    require_known("model preset", name, MODEL_PRESETS)
    return MODEL_PRESETS[name]
