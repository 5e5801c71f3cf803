"""The executor on a toy model of plain JAX: what it sums, in which order, place and precision."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.executor import run
from jaxtron.pipeline.layer_rows import arrange, restore
from jaxtron.pipeline.model import HeadOutput, LayerOutput, Model, Parameters, Stack
from jaxtron.pipeline.partition import Partition, StagePlan, forward_only, partition
from jaxtron.pipeline.schedules.named import SCHEDULES, make_schedule
from jaxtron.pipeline.schedules.schedule import Entry, Schedule, Work, one_stage
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.config import MANUAL_AXES
from jaxtron.sharding.rules import use

ROWS, WIDTH, HIDDEN = 3, 6, 5


def layer(weights, x, number, shared):
    """Numbers of layers and what all of them read are in the values: one that had another's would differ."""
    scale = (1 + 0.2 * number).astype(x.dtype) * shared["scale"]
    return LayerOutput(x + jnp.tanh(x @ weights["up"] * scale) @ weights["down"] + weights["bias"])


def enter(outer, stream, microbatch):
    assert stream is None
    return microbatch["x"] @ outer["embedding"]


def head(ends, y, microbatch):
    error = y @ ends["head"] - microbatch["y"]
    # tied: also the first stage has a part in its gradient
    loss = jnp.sum(error**2) + jnp.sum((y @ ends["embedding"].T) ** 2)
    return HeadOutput(loss, {"absolute": jnp.sum(jnp.abs(error)), "rows": jnp.sum(0 * error[:, 0] + 1)})


STACK = Stack(enter=enter, shared=lambda microbatch: {"scale": microbatch["scale"]}, layer=layer)
TOY = Model((STACK,), head)
UNROLLED = Model((replace(STACK, unroll=100),), head)


def make(num_layers: int, num_microbatches: int) -> tuple[Parameters, dict]:
    generator = np.random.default_rng(0)

    def normal(*shape: int):
        return jnp.asarray(0.3 * generator.normal(size=shape), jnp.float32)

    layers = {"up": normal(num_layers, WIDTH, HIDDEN), "down": normal(num_layers, HIDDEN, WIDTH)}
    layers["bias"] = normal(num_layers, WIDTH)
    ends = {"embedding": normal(WIDTH, WIDTH), "head": normal(WIDTH, 2)}
    batch = {"x": normal(num_microbatches, ROWS, WIDTH), "y": normal(num_microbatches, ROWS, 2)}
    return Parameters((layers,), ends), batch | {"scale": 0.2 + jnp.abs(normal(num_microbatches))}


def plain(params: Parameters, batch: dict, chosen=None) -> tuple[Parameters, dict]:
    """Gradients and reports by `jax.grad`."""

    def loss(params):
        losses, reports = [], []
        for number in range(len(batch["scale"])) if chosen is None else chosen:
            part = jax.tree.map(lambda leaf, number=number: leaf[number], batch)
            x = enter(params.outer, None, part)
            for index in range(len(params.stacks[0]["bias"])):
                weights = jax.tree.map(lambda leaf, index=index: leaf[index], params.stacks[0])
                x = layer(weights, x, jnp.int32(index), {"scale": part["scale"]}).stream
            one, report = head(params.outer, x, part)
            losses.append(one)
            reports.append(report)
        return sum(losses), jax.tree.map(lambda *parts: sum(parts), *reports)

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def assert_close(found, expected, tolerance: float = 1e-5) -> None:
    def compare(one, other):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())

    jax.tree.map(compare, found, expected)


def on_stages(rules, schedule: Schedule, stages: Partition, model: Model, params: Parameters, batch: dict):
    """What every stage has: (layers' gradients in the model's order, ends' gradients and reports by stage)."""

    def local(params, batch):
        params, batch = jax.tree.map(vary, (params, batch))
        gradients, reports, _ = run(schedule, StagePlan((stages,)), model, params, batch)
        ends = None if gradients is None else gradients.outer
        layers = None if gradients is None else gradients.stacks[0]
        return layers, jax.tree.map(lambda leaf: leaf[None], (ends, reports))

    with use(rules), jax.set_mesh(rules.mesh):
        arranged = Parameters(jax.tree.map(functools.partial(arrange, stages), params.stacks), params.outer)
        specs = Parameters(P("pipe"), P())
        region = jax.shard_map(local, in_specs=(specs, P()), out_specs=P(MANUAL_AXES), axis_names=set(MANUAL_AXES))
        placed = jax.device_put((arranged, batch), jax.sharding.NamedSharding(rules.mesh, P()))
        layers, (ends, reports) = jax.tree.map(np.asarray, jax.jit(region)(*placed))
    for leaf in jax.tree.leaves(layers):
        assert leaf.dtype == np.float32 and not leaf[np.asarray(stages.slot_layers) < 0].any()
    return jax.tree.map(functools.partial(restore, stages), layers), ends, reports


def sizes(name: str) -> tuple[int, int, int]:
    """Stages, microbatches, chunks: no multiples where the schedule does not ask for them."""
    return 3, 7 if name == "dualpipe_v" else 4, 2 if name in ("zero_bubble_v", "dualpipe_v") else 1


@functools.cache
def toy(num_layers: int, num_microbatches: int):
    params, batch = make(num_layers, num_microbatches)
    return params, batch, *plain(params, batch)


# one of each kind; `slow` has them all
QUICKEST = ("eager_1f1b", "interleaved", "zero_bubble_v")


@pytest.mark.parametrize(
    "name", [name if name in QUICKEST else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES]
)
def test_every_schedule_is_plain_differentiation(rules_for, name):
    num_stages, num_microbatches, num_chunks = sizes(name)
    num_chunks = 3 if "interleaved" in name else num_chunks
    schedule = make_schedule(name, num_stages, num_microbatches, num_chunks)
    num_layers = num_stages * num_chunks + 2
    params, batch, gradients, reports = toy(num_layers, num_microbatches)
    stages = partition(num_layers, schedule, PipelineConfig())
    assert len(set(stages.lengths)) > 1
    layers, ends, found = on_stages(rules_for(pipe=num_stages), schedule, stages, TOY, params, batch)
    assert_close(layers, gradients.stacks[0])
    assert_close(jax.tree.map(lambda leaf: leaf.sum(0), ends), gradients.outer)
    assert_close(jax.tree.map(lambda leaf: leaf.sum(0), found), reports)
    # loss and head on the last virtual stage alone, the embedding there (tied) and on the first
    last, first = (schedule.place(virtual)[0] for virtual in (schedule.num_virtual - 1, 0))
    assert set(np.flatnonzero(found["rows"])) == {last}
    assert set(np.flatnonzero(ends["head"].any((1, 2)))) == {last}
    assert set(np.flatnonzero(ends["embedding"].any((1, 2)))) == {first, last}


@pytest.mark.parametrize("model", [TOY, UNROLLED], ids=["loop", "unrolled"])
@pytest.mark.parametrize(("num_layers", "num_microbatches"), [(1, 1), (3, 2), (2, 5)])
def test_accumulation(rules_for, model, num_layers, num_microbatches):
    params, batch, gradients, reports = toy(num_layers, num_microbatches)
    stages = Partition((num_layers,))
    layers, ends, found = on_stages(rules_for(data=1), one_stage(num_microbatches), stages, model, params, batch)
    assert_close(layers, gradients.stacks[0])
    assert_close(jax.tree.map(lambda leaf: leaf[0], (ends, found)), (gradients.outer, reports))
    assert found["rows"] == ROWS * num_microbatches


def one_stage_table(*rows: tuple[int | None, int | None, int | None]) -> Schedule:
    table = tuple((Entry(*(None if index is None else Work(0, index) for index in row)),) for row in rows)
    return Schedule("mine", table, 3)


@pytest.mark.parametrize(
    ("table", "chosen"),
    [
        (one_stage_table((2, 2, None), (0, 0, None)), (2, 0)),
        (one_stage_table((1, 1, None), (None, None, None), (0, 0, None)), (0, 1)),
        (one_stage_table((0, None, None), (1, 0, None), (None, 1, None)), (0, 1)),
        (one_stage_table((0, None, None), (2, 2, 2), (None, 0, None), (None, None, 0)), (0, 2)),
    ],
    ids=["whole", "idle", "apart", "split"],
)
@pytest.mark.parametrize("model", [TOY, UNROLLED], ids=["loop", "unrolled"])
def test_the_table_decides_what_runs(rules_for, table, chosen, model):
    params, batch = make(2, 3)
    gradients, reports = plain(params, batch, chosen)
    layers, ends, found = on_stages(rules_for(data=1), table, Partition((2,)), model, params, batch)
    assert_close(layers, gradients.stacks[0])
    assert_close(jax.tree.map(lambda leaf: leaf[0], (ends, found)), (gradients.outer, reports))


@pytest.mark.parametrize("name", ["gpipe", "zero_bubble"])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_gradients_are_summed_in_float32(rules_for, name, num_stages):
    # in bfloat16 a sum of ones stops at 256
    count = 300
    params = Parameters(({"weight": jnp.ones((2, 1, 1), jnp.bfloat16)},), {"scale": jnp.ones((), jnp.bfloat16)})
    stack = Stack(
        enter=lambda outer, _, microbatch: microbatch,
        shared=lambda microbatch: (),
        layer=lambda weights, x, number, shared: LayerOutput(x @ weights["weight"]),
    )
    model = Model(
        (stack,),
        lambda outer, y, _: HeadOutput(jnp.sum(outer["scale"] * y), {"rows": jnp.sum(y / y, dtype=jnp.float32)}),
    )
    schedule = make_schedule(name, num_stages, count)
    stages = partition(2, schedule, PipelineConfig())
    batch = jnp.ones((count, 1, 1), jnp.bfloat16)
    layers, ends, found = on_stages(rules_for(pipe=num_stages), schedule, stages, model, params, batch)
    assert (layers["weight"] == count).all()
    assert ends["scale"].dtype == np.float32 and ends["scale"].sum() == found["rows"].sum() == count


@pytest.mark.parametrize("lengths", [(3,), (2, 3), (1, 2, 0, 2), (2, 1, 1, 2)], ids=str)
def test_a_table_without_backwards_has_reports_and_no_gradients(rules_for, lengths):
    params, batch, _, reports = toy(sum(lengths), 5)
    for num_stages, placement in itertools.product((len(lengths), len(lengths) // 2), ("loop", "vee")):
        if num_stages == 0 or (placement == "vee") != (2 * num_stages == len(lengths)):
            continue
        stages = Partition(lengths, num_stages, placement)
        rules = rules_for(pipe=num_stages)
        layers, ends, found = on_stages(rules, forward_only(StagePlan((stages,)), 5), stages, TOY, params, batch)
        assert layers is ends is None
        assert_close(jax.tree.map(lambda leaf: leaf.sum(0), found), reports)
