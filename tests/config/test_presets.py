"""Every shipped configuration, dumped: a changed default shows up as a changed file.

python -m tests.config.test_presets      writes the dumps anew, after a change that was meant
"""

from __future__ import annotations

from pathlib import Path

import pytest

from unichar_jax.config import presets
from unichar_jax.config.compute import MeshConfig
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.model import ModelConfig, model_preset
from unichar_jax.config.train import LoraConfig, OptimizerConfig, SFTConfig
from unichar_jax.errors import UserError

GOLDEN = Path(__file__).parent / "golden"


def _dump(name: str) -> str:
    cls = GRPOConfig if name.startswith("grpo") else SFTConfig
    return presets.to_json(presets.load(cls, name))


@pytest.mark.parametrize("name", presets.available())
def test_resolved_configuration_is_the_one_on_file(name):
    assert _dump(name) == (GOLDEN / f"{name}.json").read_text()


def test_no_dump_is_left_over():
    assert {p.stem for p in GOLDEN.glob("*.json")} == set(presets.available())


def test_the_published_hyper_parameters():
    cfg = presets.load(SFTConfig, "sft-reference")
    o = cfg.optimizer
    assert (o.learning_rate, o.beta1, o.beta2, o.eps, o.weight_decay) == (2e-5, 0.9, 0.95, 1e-15, 0)
    assert (o.max_grad_norm, o.warmup_steps, o.schedule, o.ema_decay) == (1.0, 0, "constant", 0.9999)
    assert (cfg.ce_weight, cfg.mse_weight, cfg.timestep_shift) == (0.25, 1.0, 1.0)
    assert (cfg.steps, cfg.data.recipe, cfg.data.text_dropout) == (501, "full", 0.1)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"stepz": 3}, "field 'stepz' is unknown .*'steps'"),
        ({"optimizer": {"learning_rat": 1.0}}, "'learning_rat' is unknown .*'learning_rate'"),
        ({"trainable": "al"}, "expected one of .*'all'"),
        ({"steps": "many"}, "expected int"),
        ({"steps": 0}, "steps: expected a positive number"),
        ({"data": 3}, "expected a table"),
    ],
)
def test_mistakes_name_the_field_and_the_remedy(tree, message):
    with pytest.raises(UserError, match=message):
        presets.from_dict(SFTConfig, tree)


def test_mistakes_between_fields():
    with pytest.raises(UserError, match=r"lora\.rank"):
        SFTConfig(trainable="lora")
    with pytest.raises(UserError, match="ema_decay"):
        OptimizerConfig(ema_decay=1.0)
    with pytest.raises(UserError, match="does not make 8 devices"):
        MeshConfig(data=3).resolve(8)
    assert MeshConfig(tensor=2).resolve(8) == (1, 4, 2)
    assert SFTConfig(trainable="lora", lora=LoraConfig(rank=4)).lora.rank == 4


def test_unknown_preset_names_the_closest():
    with pytest.raises(UserError, match="did you mean 'sft-mini'"):
        presets.load(SFTConfig, "sft-mni")
    with pytest.raises(UserError, match="did you mean 'mini'"):
        model_preset("minni")


@pytest.mark.parametrize("name", ["debug", "mini", "bagel-7b"])
def test_model_sizes_survive_their_files(name, tmp_path):
    import json

    cfg = model_preset(name)
    for file, content in cfg.to_bagel().items():
        (tmp_path / file).write_text(json.dumps(content))
    assert ModelConfig.from_bagel(tmp_path) == cfg
    assert presets.from_dict(ModelConfig, cfg.to_dict()) == cfg


def test_a_bagel_download_needs_no_extra_file(tmp_path):
    import json

    files = ModelConfig().to_bagel()
    for file in ("llm_config.json", "vit_config.json"):
        (tmp_path / file).write_text(json.dumps(files[file]))
    assert ModelConfig.from_bagel(tmp_path) == ModelConfig()
    broken = files["llm_config.json"] | {"rope_scaling": {"type": "yarn"}, "hidden_act": "gelu"}
    (tmp_path / "llm_config.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"(?s)rope_scaling.*hidden_act"):
        ModelConfig.from_bagel(tmp_path)


if __name__ == "__main__":
    for preset in presets.available():
        (GOLDEN / f"{preset}.json").write_text(_dump(preset))
