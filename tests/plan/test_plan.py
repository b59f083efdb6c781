"""Reading programs (FLOPs against the formula, collectives as often as their loop runs), the plan, and stage costs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unichar_jax.config.compute import Compute, MeshConfig
from unichar_jax.config.grpo import GRPOConfig, NFTConfig, RolloutConfig
from unichar_jax.config.model import model_preset
from unichar_jax.config.train import LoraConfig, OptimizerConfig, SFTConfig
from unichar_jax.errors import UserError
from unichar_jax.models import flops
from unichar_jax.parallel.chips import CHIPS
from unichar_jax.parallel.mesh import gather, make_mesh
from unichar_jax.plan import program, topology, workload
from unichar_jax.plan import sft as plan_lib
from unichar_jax.plan.grpo import round_cost
from unichar_jax.plan.program import Collective, Memory
from unichar_jax.plan.topology import Topology

MODEL = model_preset("debug")
CAPACITIES = (96, 64, 64)


def traced_step(remat: str = "none", **fields):
    """The training step of the debug model on one device, traced."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    compute = Compute(dtype="float32", attention="reference", remat=remat)
    cfg = SFTConfig(compute=compute, ce_chunk=96, **fields)
    with jax.set_mesh(mesh):
        step, state, _ = plan_lib.abstract_run(cfg, MODEL, mesh)
        batch = plan_lib.abstract_batch(MODEL, CAPACITIES, 1, mesh)
        return program.count_flops(step.trace(state, batch).jaxpr.jaxpr)


def useful() -> float:
    """By formula: the reference kernel scores all pairs."""
    text, vit, latent = CAPACITIES
    return flops.train_step(MODEL, flops.Work(text, vit, latent, text, sum(CAPACITIES) ** 2, vit**2))


def test_flops_of_the_step_are_those_of_the_formula():
    # Inputs need no gradient, and the head's chunk is recomputed: a few percent at this size.
    counted, head = traced_step().dense, 2 * 64 * MODEL.decoder.vocab_size * CAPACITIES[0]
    assert counted - head == pytest.approx(useful(), rel=0.03)


def test_adapters_need_no_gradients_of_weights():
    """Nor any gradient of what lies before them: the tower only runs forward."""
    counted = traced_step(trainable="lora", lora=LoraConfig(rank=1)).dense
    text, vit, latent = CAPACITIES
    work = flops.Work(text, vit, latent, text, sum(CAPACITIES) ** 2, vit**2)
    head = 2 * 64 * MODEL.decoder.vocab_size * text
    tower = MODEL.vision.num_layers * flops.vision_layer(MODEL.vision, vit, vit**2)
    expected = (
        flops.train_step(MODEL, work, 2)
        - tower
        - MODEL.vision.num_layers
        * flops.attention(MODEL.vision.num_heads, MODEL.vision.hidden_size // MODEL.vision.num_heads, vit**2)
    )
    assert counted - head == pytest.approx(expected, rel=0.05)


def test_full_rematerialisation_costs_a_forward_pass():
    decoder, vision = MODEL.decoder, MODEL.vision
    layers = decoder.num_layers * flops.decoder_layer(decoder, sum(CAPACITIES), sum(CAPACITIES) ** 2)
    layers += vision.num_layers * flops.vision_layer(vision, CAPACITIES[1], CAPACITIES[1] ** 2)
    more = traced_step(remat="full").dense - traced_step().dense
    # The last product of a layer is not needed again.
    assert 0.75 * layers < more <= layers


def test_a_scanned_layer_counts_as_often_as_it_runs():
    def f(w, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    w, x = jnp.ones((5, 8, 8)), jnp.ones((4, 8))
    assert program.count_flops(jax.make_jaxpr(f)(w, x).jaxpr).dense == 5 * 2 * 4 * 8 * 8


def test_of_branches_the_dearest_counts():
    def f(p, x):
        return jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert program.count_flops(jax.make_jaxpr(f)(True, jnp.ones((8, 8))).jaxpr).dense == 2 * 2 * 8**3


def test_every_device_of_a_shard_map_counts():
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    rows = PartitionSpec("fsdp")
    with jax.set_mesh(mesh):
        f = jax.shard_map(lambda x, w: x @ w, in_specs=(rows, PartitionSpec()), out_specs=rows)
        jaxpr = jax.make_jaxpr(f)(jnp.ones((16, 8)), jnp.ones((8, 8)))
    assert program.count_flops(jaxpr.jaxpr).dense == 2 * 16 * 8 * 8


@pytest.fixture(scope="module")
def sharded_scan():
    """Five layers whose weights are gathered one by one, on four devices."""
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])

    def shape(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def f(w, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, PartitionSpec())
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, w)[0].sum()

    with jax.set_mesh(mesh):
        arguments = shape((5, 64, 64), None, "fsdp"), shape((8, 64), "fsdp")
        return jax.jit(f).lower(*arguments).compile()


def test_collectives_count_as_often_as_their_loop_runs(sharded_scan):
    found = {c.kind: c for c in program.collectives(sharded_scan.as_text())}
    gathered = 5 * 64 * 64 * 4
    assert found["all-gather"] == Collective("all-gather", 5, gathered, gathered * 3 / 4)
    assert found["all-reduce"] == Collective("all-reduce", 1, 4, 4 * 2 * 3 / 4)


def test_a_gathered_weight_sends_its_gradient_back_to_its_shards():
    """Not to every device: the sum over devices can be a reduce-scatter."""
    mesh, w, x = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4]), jnp.ones((64, 64)), jnp.ones((8, 64))
    with jax.set_mesh(mesh):
        f = lambda w: (x @ gather(w, ("embed", "mlp"))).sum()  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(f))(w)
    pinned = [e.params["sharding"].spec for e in _equations(jaxpr.jaxpr) if "constraint" in e.primitive.name]
    assert [tuple(spec) for spec in pinned] == [(None, None), ("fsdp", None)]


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in program._inner_jaxprs(eqn.params):
            yield from _equations(inner)


def test_memory_by_kind(sharded_scan):
    memory = Memory.of(sharded_scan)
    assert memory.arguments == (5 * 64 * 64 + 8 * 64) * 4 / 4
    assert memory.device == memory.arguments + memory.outputs + memory.temporaries + memory.code


TPU_TEXT = """\
HloModule step

%all-reduce-scatter.3 (input: f32[64,64]) -> f32[8,64] {
  %input = f32[64,64]{1,0} parameter(0)
  %all-reduce.1 = f32[64,64]{1,0} all-reduce(%input), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %slice = f32[8,64]{1,0} dynamic-slice(%all-reduce.1, %input)
}

%start (p: bf16[8,64]) -> (bf16[8,64], bf16[64,64]) {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[64,64]{1,0:T(8,128)} all-gather(%p), channel_id=3, replica_groups=mesh['a'=1,'b'=8] {'b'}
  ROOT %c.1 = (bf16[8,64], bf16[64,64]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.4 (p.2: bf16[8,64]) -> bf16[64,64] {
  %p.2 = bf16[8,64]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[64,64] all-gather(%p.2), channel_id=3, replica_groups=mesh['a'=1,'b'=8] {'b'}
}

%done (p.1: bf16[8,64]) -> bf16[64,64] {
  %p.1 = bf16[8,64]{1,0} parameter(0)
  %all-gather.2 = bf16[64,64] all-gather(%p.1), channel_id=3, replica_groups=mesh['a'=1,'b'=8] {'b'}
  ROOT %c.2 = bf16[64,64] custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%own (w: f32[8,64], all: bf16[64,64], place: s32[]) -> f32[8,64] {
  %all = bf16[64,64]{1,0} parameter(1)
  %place = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice.1 = bf16[8,64]{1,0} dynamic-slice(%all, %place, %zero), dynamic_slice_sizes={8,64}
  ROOT %sum = f32[8,64] convert(%slice.1)
}

%inner_condition (c.3: (s32[])) -> pred[] {
  %twenty-six = s32[] constant(26)
  %c.3 = (s32[]) parameter(0)
  ROOT %lt.3 = pred[] compare(%c.3, %twenty-six), direction=LT
}

%inner_body (b.3: (s32[])) -> (s32[]) {
  %b.3 = (s32[]) parameter(0)
  %swap = f32[4,4] collective-permute(%b.3), channel_id=10, source_target_pairs={{0,1},{1,0}}
  ROOT %m = bf16[64,64] fusion(%b.3), kind=kCustom, calls=%async_collective_fusion.4
}

%condition (c: (s32[])) -> pred[] {
  %twenty-eight = s32[]{:T(128)} constant(28)
  %c = (s32[]{:T(128)}) parameter(0)
  ROOT %lt = pred[] compare(%c, %twenty-eight), direction=LT
}

%body (b: (s32[])) -> (s32[]) {
  %b = (s32[], /*index=1*/bf16[8,64]) parameter(0)
  %s = bf16[64,64] fusion(%b), kind=kCustom, calls=%start
  %h = (f32[4,4], f32[4,4], u32[], u32[]) collective-permute-start(%b), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %i = f32[4,4] collective-permute-done(%h)
  %kernel = bf16[8,64] custom-call(%b), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="x"}
  %one = s32[] constant(1)
  %counter = s32[] copy(%one)
  %inner = (s32[]) tuple(%counter)
  %while.2 = (s32[]) while(%inner), condition=%inner_condition, body=%inner_body
  %d = bf16[64,64] fusion(%while.2), kind=kCustom, calls=%done
  %both = (bf16[64,64], f32[64]) all-reduce(%d, %b), replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}
  %first = bf16[64,64]{1,0} get-tuple-element(%both), index=0
  %second = f32[64]{0} get-tuple-element(%both), index=1
  %mine = f32[8,64] fusion(%h, %first, %s), kind=kLoop, calls=%own
  %more = f32[64]{0} add(%second, %second)
  ROOT %r = f32[8,64] fusion(%d), kind=kCustom, calls=%all-reduce-scatter.3
}

ENTRY %main (x: s32[]) -> (s32[]) {
  %x = s32[] parameter(0)
  ROOT %while.1 = (s32[], f32[8,64]) while(%x), condition=%condition, body=%body
}
"""


def test_what_the_tpu_compiler_writes():
    """Its loops state no count and may start at their second round; its reduce-scatter is a fusion, or a sum and a
    slice; its gathers stand in pieces, some of them in the loops of what they overlap with."""
    gather, reduce, sliced, whole, permute = program.collectives(TPU_TEXT)
    assert gather == Collective("all-gather", 28, 28 * 64 * 64 * 2, 28 * 64 * 64 * 2 * 7 / 8)
    assert reduce == Collective("reduce-scatter", 28, 28 * 64 * 64 * 4, 28 * 64 * 64 * 4 * 7 / 8)
    assert sliced == Collective(program.SLICED, 28, 28 * 64 * 64 * 2, 28 * 64 * 64 * 2 * 2 * 3 / 4)
    assert whole == Collective("all-reduce", 28, 28 * 64 * 4, 28 * 64 * 4 * 2 * 3 / 4)
    swaps = 28 + 28 * 25
    assert permute == Collective("collective-permute", swaps, swaps * 4 * 4 * 4, swaps * 4 * 4 * 4)


def test_topologies():
    pod = Topology.parse("v5e:8x8")
    assert (pod.chip, pod.size) == (CHIPS["v5e"], 64)
    assert Topology.parse("h200:1x1x8").size == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v6:8x8", "chip 'v6' is unknown .did you mean 'v6e'"),
        ("v5e:64", "expected chip:AxB or chip:AxBxC, such as v5e:8x8"),
        ("h200", "such as h200:1x1x8"),
    ],
)
def test_a_wrong_topology_is_explained(text, message):
    with pytest.raises(UserError, match=message):
        Topology.parse(text)


@pytest.mark.parametrize(("text", "extra"), [("v5e:2x4", "tpu"), ("h200:1x1x8", "cuda")])
def test_an_absent_compiler_names_its_extra(monkeypatch, text, extra):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'unichar-jax\[{extra}\]'"):
        Topology.parse(text).devices()


def changes(cfg: SFTConfig, text: str = "v5e:8x8") -> list[str]:
    """Names of the settings that are proposed for the full model, in order."""
    model, where = model_preset("bagel-7b"), Topology.parse(text)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    _, state, _ = plan_lib.abstract_run(cfg, model, mesh)
    found = plan_lib.cheapest_changes(cfg, model, where, state, 12_288)
    assert all(saved > 0 for _, saved in found)
    return [change.split(" ")[0] for change, _ in found]


def test_cheapest_changes_come_first_and_are_not_proposed_twice():
    costly = SFTConfig(optimizer=OptimizerConfig(ema_decay=0.999))
    assert changes(costly)[:4] == [
        "compute.remat",
        "compute.remat",
        "optimizer.first_moment_dtype",
        "optimizer.ema_decay",
    ]
    lean = SFTConfig(
        compute=Compute(remat="offload_inputs"),
        optimizer=OptimizerConfig(first_moment_dtype="bfloat16"),
    )
    assert changes(lean)[0] == "a"  # a larger topology


def test_plan_and_report(monkeypatch):
    """A small step compiled for two devices that are here, in place of GPUs."""
    monkeypatch.setattr(Topology, "devices", lambda self: jax.devices()[: self.size])
    model = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, num_layers=1))
    data = dataclasses.replace(SFTConfig().data, capacities=(32, 0, 16))
    cfg = SFTConfig(data=data, compute=Compute(attention="reference"))
    plan = plan_lib.make_plan(cfg, model, Topology.parse("h200:1x2"))
    assert plan.fits
    text = plan_lib.report(plan)
    assert "it fits" in text
    assert "reference - a stand-in, unproven" in text
    state = 3 * 4 * plan.parameters / 2  # weights and both moments in float32 on two devices
    assert plan.memory.arguments == pytest.approx(state, rel=0.1)
    assert {c.kind for c in plan.collectives} >= {"all-gather", "all-reduce"}
    assert plan.to_dict()["topology"] == "h200:1x2"

    small = dataclasses.replace(CHIPS["h200"], memory=1e3)
    tight = dataclasses.replace(plan, topology=dataclasses.replace(plan.topology, chip=small))
    assert not tight.fits
    assert "does NOT fit" in plan_lib.report(tight)
    assert tight.changes[0][0] in plan_lib.report(tight)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm. Exceeded hbm capacity by 1.50G.",
            17.25,
        ),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (17.74G) exceeds available"
            " HBM (15.75G).",
            17.74,
        ),
        ("Used 512.00M of 256.00M hbm.", 0.5),
    ],
)
def test_what_the_compiler_says_when_it_finds_no_room(message, gib):
    assert workload._bytes_asked(f"RESOURCE_EXHAUSTED: {message}") == gib * 2**30


def test_a_refusal_without_a_number_names_none():
    assert workload._bytes_asked("RESOURCE_EXHAUSTED: Failed to allocate request.") is None


def test_turns_in_guidance_cost_what_they_draw():
    """Half of the members have two branches: half as much again, and as much to learn."""
    model = model_preset("debug")
    plain = GRPOConfig(group=4, prompts_per_round=2, rollout=RolloutConfig(height=32, width=32))
    turns = dataclasses.replace(plain, nft=NFTConfig(scales=(1.0, 4.0)))
    one, other = round_cost(plain, model), round_cost(turns, model)
    assert other.draw == 1.5 * one.draw
    assert other.learn == one.learn
    with pytest.raises(UserError, match=r"group 4 is not a multiple of the 3 nft\.scales"):
        dataclasses.replace(plain, nft=NFTConfig(scales=(1.0, 2.0, 4.0)))
