"""Jobs of several programs: what they add up to, that their programs are the engine's and the trainer's own."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unichar_jax.cli import main as cli
from unichar_jax.cli import plan as command
from unichar_jax.config import presets
from unichar_jax.config.compute import Compute
from unichar_jax.config.grpo import GRPOConfig
from unichar_jax.config.model import model_preset
from unichar_jax.config.train import SFTConfig
from unichar_jax.errors import UserError
from unichar_jax.models import flops, params
from unichar_jax.models.unified import UnifiedModel
from unichar_jax.plan import sampling, stage2, workload
from unichar_jax.plan.grpo import evaluation_flops
from unichar_jax.plan.program import Flops, Memory, count_flops
from unichar_jax.plan.sampling import Drawing, Talking
from unichar_jax.plan.topology import Topology
from unichar_jax.plan.workload import Compiled, Task, Workload
from unichar_jax.sampling import cache as kv
from unichar_jax.sampling import flow

GIB = 2**30
MODEL, COMPUTE = model_preset("debug"), Compute(dtype="float32", attention="reference")


class Here:
    """A topology of the devices that run this test."""

    text, chip = "h100:1x1x1", Topology.parse("h100:1x1x1").chip

    def __init__(self, size: int = 1):
        self.size = size

    def devices(self):
        return jax.devices()[: self.size]


def task(
    name: str, times: float, useful: float, reads: float, *memory: int, needed: float | None = None
) -> Task:
    held = Memory(*memory) if memory else None
    return Task(Compiled(name, held, needed, Flops(), [], 1.0), times, useful, reads)


def job(*tasks: Task, mesh: int = 1) -> Workload:
    where = dataclasses.replace(Topology.parse("h100:1x1x1"), shape=(1, 1, mesh))
    return Workload(
        "a job", where, {"data": mesh}, "flash", {"model": 30 * GIB, "cache": 2 * GIB}, tasks, ("a",), ()
    )


def test_memory_is_what_stays_and_the_largest_program():
    small = task("small", 3, 0, 0, 32 * GIB, 2 * GIB, GIB, 4 * GIB, 0, 0)  # 2 - 1 + 4 beside its arguments
    large = task("large", 1, 0, 0, 30 * GIB, 0, 0, 9 * GIB, GIB, 5 * GIB)
    assert small.beside == 5 * GIB and large.beside == 10 * GIB
    assert job(small, large).peak == 42 * GIB and job(small, large).fits
    assert not job(task("huge", 1, 0, 0, 0, 0, 0, 60 * GIB, 0, 0)).fits


def test_a_program_without_room_is_no_fit_and_says_what_it_asked_for():
    full = job(task("draw", 1, 0, 0, needed=90 * GIB))
    assert full.peak is None and not full.fits
    assert "no room found: 90.00 GiB asked for" in workload.report(full) and "NOT fit" in workload.report(
        full
    )


def test_the_least_time_is_of_work_or_of_reading_whichever_is_more():
    chip = Topology.parse("h100:1x1x1").chip
    working = task("working", 2, 4 * chip.flops, chip.bandwidth, 0, 0, 0, 0, 0, 0)
    reading = task("reading", 5, chip.flops, 3 * chip.bandwidth, 0, 0, 0, 0, 0, 0)
    assert job(working, reading).floor_seconds == pytest.approx(2 * 4 + 5 * 3)
    assert job(working, reading, mesh=4).floor_seconds == pytest.approx(2 * 1 + 5 * 3)
    assert job(working, reading).useful == pytest.approx(13 * chip.flops)


def test_drawing_is_planned_by_the_engine_s_own_programs():
    made = sampling.plan_drawing(Drawing(size=32, batch=2, steps=10, prompt=16), MODEL, COMPUTE, Here())
    named = {t.compiled.name: t for t in made.tasks}
    runs = {name: t.times for name, t in named.items()}
    # Nine steps at shift 3: eight above t = 0.4.
    acts = sampling.FlowSettings(num_timesteps=10).runs()
    guided = sum(b - a for a, b, on in acts if on)
    assert runs == {"read the prompt": 1, "guided step": guided, "plain step": 9 - guided, "autoencoder": 1}
    tokens = (32 // MODEL.pixels_per_latent) ** 2
    assert named["guided step"].useful == pytest.approx(4 * evaluation_flops(MODEL, tokens, 16))
    assert named["plain step"].useful == pytest.approx(named["guided step"].useful / 2)
    # What one evaluation executes is what is useful, but for what dense attention does beyond its mask.
    model = params.initialize(UnifiedModel(MODEL, COMPUTE), 0)
    noise = jnp.zeros((2, tokens, MODEL.latent_dim))
    evaluate = jax.jit(flow.velocity, static_argnums=4)
    traced = evaluate.trace(model, kv.empty(model, 2, 16), noise, 0.5, (2, 2))
    assert tokens == 4
    executed = count_flops(traced.jaxpr.jaxpr).dense
    assert 1.0 <= executed / named["plain step"].useful < 1.1
    assert made.stays["model"] == sum(4 * x.size for x in jax.tree.leaves(model))
    assert json.loads(json.dumps(made.to_dict()))["programs"][1]["times"] == guided


def test_without_guidance_there_is_no_guided_step():
    made = sampling.plan_drawing(Drawing(size=32, steps=4, scale=1.0, prompt=16), MODEL, COMPUTE, Here())
    assert [t.compiled.name for t in made.tasks] == ["read the prompt", "plain step", "autoencoder"]


def test_a_reply_reads_the_understanding_expert_at_every_token():
    made = sampling.plan_talking(Talking(context=32, reply=20, picture=16), MODEL, COMPUTE, Here())
    assert [t.compiled.name for t in made.tasks] == ["read", "look", "16 tokens"]
    decode = made.tasks[-1]
    assert decode.times == 2
    und = [
        x
        for n, x in params.named_leaves(params.abstract(UnifiedModel(MODEL, COMPUTE)))
        if n == "lm_head.kernel" or (n.startswith("decoder.") and ".und." in n)
    ]
    weights = sum(4 * x.size for x in und)
    assert weights < decode.reads / 16 < 1.2 * weights
    assert "tokens/s" in workload.report(made)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["nft", "flow_grpo"])
def test_a_round_is_planned_by_the_trainer_s_own_programs(algorithm):
    cfg = presets.load(GRPOConfig, "grpo-mini")
    rollout = dataclasses.replace(cfg.rollout, height=32, width=32, batch=0)
    cfg = dataclasses.replace(cfg, algorithm=algorithm, rollout=rollout, compute=COMPUTE, micro_batch=0)
    reward = tuple(t for t in cfg.reward if t.name == "diversity")
    made = stage2.plan_round(dataclasses.replace(cfg, reward=reward), MODEL, Here(8))
    assert any(t.compiled.name == "score: LPIPS" for t in made.tasks) and made.stays["scorers"] > 0
    names = [t.compiled.name for t in made.tasks]
    assert names[0] == "draw" and names[-1] == "learn" and made.devices == 8
    cost = stage2.round_cost(cfg, MODEL, stage2.PROMPT_TOKENS)
    drawn, learned = (
        sum(t.times * t.useful for t in made.tasks if t.compiled.name == n) for n in ("draw", "learn")
    )
    assert (drawn, learned) == pytest.approx((cost.draw * cost.evaluation, cost.learn * cost.evaluation))
    assert made.tasks[-1].times == cfg.updates
    assert "forecast" in workload.report(made)


def test_scorers_are_those_that_the_reward_names():
    shapes = object.__new__(stage2._Shapes)
    cfg = presets.load(GRPOConfig, "grpo-mini")
    only = [t for t in GRPOConfig().reward if t.name == "visual_questions"]
    for name, value in dict(cfg=dataclasses.replace(cfg, reward=tuple(only)), model=MODEL).items():
        object.__setattr__(shapes, name, value)
    mesh = sampling._single(Here())
    object.__setattr__(shapes, "mesh", mesh)
    declared = UnifiedModel(MODEL, COMPUTE)
    named = params.flat(params.abstract(declared, mesh))
    layout = stage2.Layout(declared)
    object.__setattr__(shapes, "layout", layout)
    object.__setattr__(shapes, "state", stage2.TrainState(None, named, {}, None, None))
    with jax.set_mesh(mesh):
        tasks, encoders = stage2._scorers(shapes)
    assert [t.compiled.name for t in tasks] == ["score: look", "score: answer"] and encoders == 0
    work = flops.Work(*(np.zeros(6)))
    assert flops.forward(MODEL, work) == 0 < tasks[0].useful


def test_the_command_knows_what_it_is_asked_for(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(Topology, "devices", lambda self: jax.devices()[: self.size])
    words = ["plan", "draw", "--base", "debug", "--size", "32", "--steps", "3", "--prompt", "16"]
    out = tmp_path / "plan.json"
    assert cli.main([*words, "--topology", "h100:1x1x1", "--json", str(out)]) == 0
    assert "it fits" in capsys.readouterr().out
    assert json.loads(out.read_text())["what"] == "1 x 32 px, 2 steps"
    with pytest.raises(SystemExit):
        cli.main(["plan", "chat", "--size", "32", "--topology", "h100:1x1x1"])
    assert presets.is_of(GRPOConfig, "grpo-bagel-7b") and not presets.is_of(GRPOConfig, "sft-bagel-7b")
    assert presets.is_of(SFTConfig, "sft-bagel-7b")


@pytest.mark.parametrize(
    ("drawing", "message"),
    [
        (Drawing(size=33), "multiple of"),
        (Drawing(size=100_000), "multiple of"),
        (Drawing(batch=0), "draw.batch"),
        (Drawing(steps=1), "draw.steps"),
    ],
)
def test_mistakes_are_explained(drawing, message):
    with pytest.raises(UserError, match=message):
        sampling.plan_drawing(drawing, MODEL, COMPUTE, Here())


def test_sizes_follow_the_preset_that_makes_the_base():
    said: list[str] = []
    assert command.sizes("runs/sft-mini", said.append).decoder.hidden_size < 1000 and not said
    assert command.sizes("runs/nobody-makes-this", said.append) == model_preset("bagel-7b") and said


needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the CUDA compiler, which runs on a CPU host: see 'unichar plan' for the two wheels",
)


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["a100-40", "a100-80", "rtx4090", "h100", "h200"])
def test_every_gpu_of_the_table_can_be_compiled_for(chip):
    made = sampling.plan_drawing(
        Drawing(size=32, steps=3, prompt=16), MODEL, Compute(), Topology.parse(f"{chip}:1x1x1")
    )
    assert made.fits and jnp.isfinite(made.floor_seconds)
