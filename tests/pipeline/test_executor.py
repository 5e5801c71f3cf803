"""The executor on a toy model of plain JAX: what it sums, in which order, place and precision."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.executor import Result, run
from jaxtron.pipeline.layer_slots import arrange, restore
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.model import HeadOutput, LayerOutput, Model, Parameters, Stack
from jaxtron.pipeline.partition import Partition, StagePlan, forward_only, stage_plan
from jaxtron.pipeline.schedules.named import SCHEDULES, make_schedule
from jaxtron.pipeline.schedules.schedule import Entry, Schedule, Work, one_stage
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import use
from tests.support.plain import plain

ROWS, WIDTH, HIDDEN = 3, 6, 5


def layer(weights, x, number, shared):
    """Numbers of layers and what all of them read are in the values: one that had another's would differ."""
    scale = (1 + 0.2 * number).astype(x.dtype) * shared["scale"]
    hidden = jnp.tanh(x @ weights["up"] * scale)
    y = x + hidden @ weights["down"] + weights["bias"]
    loss = 0.1 * jnp.sum(y**2) * scale
    return LayerOutput(y, loss, {"size": loss * (1.0 + number), "hidden": jnp.sum(hidden, 0)})


def enter(outer, stream, microbatch):
    assert stream is None
    return microbatch["x"] @ outer["embedding"]


def head(outer, y, microbatch):
    error = y @ outer["head"] - microbatch["y"]
    # tied: also the first stage has a part in its gradient
    loss = jnp.sum(error**2) + jnp.sum((y @ outer["embedding"].T) ** 2)
    return HeadOutput(loss, {"absolute": jnp.sum(jnp.abs(error)), "rows": jnp.sum(0 * error[:, 0] + 1)})


def shared(microbatch):
    return {"scale": microbatch["scale"]}


TOY = Model((Stack(enter=enter, shared=shared, layer=layer),), head)
UNROLLED = Model((replace(TOY.stacks[0], unroll=100),), head)


def make_layers(num_layers: int, seed: int = 0) -> dict:
    normal = random_arrays(seed)
    layers = {"up": normal(num_layers, WIDTH, HIDDEN), "down": normal(num_layers, HIDDEN, WIDTH)}
    return layers | {"bias": normal(num_layers, WIDTH)}


def make(num_layers: int, num_microbatches: int) -> tuple[Parameters, dict]:
    normal = random_arrays(1)
    outer = {"embedding": normal(WIDTH, WIDTH), "head": normal(WIDTH, 2)}
    batch = {"x": normal(num_microbatches, ROWS, WIDTH), "y": normal(num_microbatches, ROWS, 2)}
    batch |= {"scale": 0.2 + jnp.abs(normal(num_microbatches))}
    return Parameters((make_layers(num_layers),), outer), batch


def random_arrays(seed: int):
    generator = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(0.3 * generator.normal(size=shape), jnp.float32)


def expected_of(model: Model, params: Parameters, batch: dict, chosen=None) -> Result:
    """What `run` gives of the chosen microbatches (none: all), by plain differentiation; layers in model order."""
    numbers = range(len(batch["scale"])) if chosen is None else chosen

    def differentiate(params: Parameters, batch: dict) -> Result:
        parts = [jax.tree.map(lambda leaf, number=number: leaf[number], batch) for number in numbers]
        return plain(model, params, parts)[1]

    return jax.jit(differentiate)(params, batch)


def assert_close(found, expected, tolerance: float = 1e-5) -> None:
    def compare(one, other):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())

    jax.tree.map(compare, found, expected)


def on_stages(
    rules,
    schedule: Schedule,
    stages: StagePlan,
    model: Model,
    params: Parameters,
    batch: dict,
    frozen: Parameters | None = None,
) -> Result:
    """What the stages have: layers' gradients and metrics in the model's order, the others by stage."""

    def local(params, batch, frozen):
        params, batch, frozen = jax.tree.map(vary, (params, batch, frozen))
        gradients, sums, metrics, _ = run(schedule, stages, model, params, batch, frozen)
        outer = None if gradients is None else gradients.outer
        layers = None if gradients is None else gradients.stacks
        return layers, metrics, jax.tree.map(lambda leaf: leaf[None], (outer, sums))

    def ordered(of_stacks, move):
        pairs = zip(stages.partitions, of_stacks, strict=True)
        return tuple(jax.tree.map(functools.partial(move, partition), layers) for partition, layers in pairs)

    with use(rules), jax.set_mesh(rules.mesh):
        arranged = [
            None if tree is None else Parameters(ordered(tree.stacks, arrange), tree.outer) for tree in (params, frozen)
        ]
        specs = (Parameters(P("pipe"), P()), P(), arranged[1] and Parameters(P("pipe"), P()))
        step = jax.jit(region(local, specs, P(rules.manual)))
        placed = jax.device_put((arranged[0], batch, arranged[1]), jax.sharding.NamedSharding(rules.mesh, P()))
        # nothing is brought to the devices unasked, and no tracer outlives the step
        with jax.transfer_guard("disallow"), jax.checking_leaks():
            found = step(*placed)
        layers, metrics, (outer, sums) = jax.tree.map(np.asarray, found)
    for found in (metrics, layers or ()):
        for stack, tree in zip(stages.partitions, found, strict=bool(found)):
            for leaf in jax.tree.leaves(tree):
                assert leaf.dtype == np.float32 and not leaf[np.asarray(stack.slot_layers) < 0].any()
    gradients = None if layers is None else Parameters(ordered(layers, restore), outer)
    return Result(gradients, sums, ordered(metrics, restore))


def assert_same(found: Result, expected: Result) -> None:
    """What stages have is what plain differentiation gives, summed over them."""
    summed = jax.tree.map(lambda leaf: leaf.sum(0), (found.gradients and found.gradients.outer, found.sums))
    assert_close(found.layer_metrics, expected.layer_metrics)
    if found.gradients is None:
        return assert_close(summed[1], expected.sums)
    assert_close(found.gradients.stacks, expected.gradients.stacks)
    assert_close(summed, (expected.gradients.outer, expected.sums))


def sizes(name: str) -> tuple[int, int, int]:
    """Stages, microbatches, chunks: no multiples where the schedule does not ask for them."""
    return 3, 7 if name == "dualpipe_v" else 4, 2 if name in ("zero_bubble_v", "dualpipe_v") else 1


@functools.cache
def toy(num_layers: int, num_microbatches: int):
    params, batch = make(num_layers, num_microbatches)
    return params, batch, expected_of(TOY, params, batch)


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
    params, batch, expected = toy(num_layers, num_microbatches)
    stages = stage_plan((num_layers,), schedule, PipelineConfig())
    assert len(set(stages.partitions[0].lengths)) > 1
    found = on_stages(rules_for(pipe=num_stages), schedule, stages, TOY, params, batch)
    assert_same(found, expected)
    # loss and head on the last virtual stage alone, the embedding there (tied) and on the first
    last, first = (schedule.place(virtual)[0] for virtual in (schedule.num_virtual - 1, 0))
    assert set(np.flatnonzero(found.sums["rows"])) == {last}
    assert set(np.flatnonzero(found.gradients.outer["head"].any((1, 2)))) == {last}
    assert set(np.flatnonzero(found.gradients.outer["embedding"].any((1, 2)))) == {first, last}


@pytest.mark.parametrize(
    "name",
    ["eager_1f1b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eager_interleaved", "dualpipe_v"))],
)
def test_a_forward_and_a_backward_together_sum_to_the_same(rules_for, name):
    num_stages, num_microbatches, num_chunks = sizes(name)
    num_chunks = 2 if "interleaved" in name else num_chunks
    schedule = replace(make_schedule(name, num_stages, num_microbatches, num_chunks), overlap=True)
    num_layers = 2 * num_stages * num_chunks
    params, batch, expected = toy(num_layers, num_microbatches)
    stages = stage_plan((num_layers,), schedule, PipelineConfig())
    assert lower(schedule).paired.any()
    assert_same(on_stages(rules_for(pipe=num_stages), schedule, stages, TOY, params, batch), expected)


@pytest.mark.parametrize(
    ("model", "num_layers", "num_microbatches"),
    [(TOY, 1, 1), (TOY, 3, 2), pytest.param(TOY, 2, 5, marks=pytest.mark.slow), (UNROLLED, 2, 5)],
    ids=["one of one", "loop", "longer", "unrolled"],
)
def test_accumulation(rules_for, model, num_layers, num_microbatches):
    params, batch, expected = toy(num_layers, num_microbatches)
    stages = StagePlan((Partition((num_layers,)),))
    found = on_stages(rules_for(data=1), one_stage(num_microbatches), stages, model, params, batch)
    assert_same(found, expected)
    assert found.sums["rows"] == ROWS * num_microbatches


def recall(shared, metrics):
    return {"scale": shared["scale"] * (1 + jnp.tanh(metrics["size"] + jnp.sum(metrics["hidden"])))}


@pytest.mark.parametrize(
    ("name", "num_stages", "num_chunks"),
    [
        ("1f1b", 2, 1),
        pytest.param("zero_bubble_v", 2, 2, marks=pytest.mark.slow),
        pytest.param("interleaved", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_a_layer_recalls_the_microbatches_before(rules_for, name, num_stages, num_chunks):
    model = Model((replace(TOY.stacks[0], recall=recall),), head)
    schedule = make_schedule(name, num_stages, 4, num_chunks)
    params, batch, other = toy(5, 4)
    stages = stage_plan((5,), schedule, PipelineConfig())
    expected = expected_of(model, params, batch)
    assert not np.allclose(expected.sums["absolute"], other.sums["absolute"], rtol=1e-3)
    assert_same(on_stages(rules_for(pipe=num_stages), schedule, stages, model, params, batch), expected)


def one_stage_table(*rows: tuple[int | None, int | None, int | None]) -> Schedule:
    table = tuple((Entry(*(None if index is None else Work(0, index) for index in row)),) for row in rows)
    return Schedule("mine", table, 3)


# an idle tick, a backward in its forward's tick and in another, and one in two
TABLES = {
    "whole": (one_stage_table((2, 2, None), (None, None, None), (0, 0, None)), (2, 0)),
    "apart": (one_stage_table((0, None, None), (1, 0, None), (None, 1, None)), (0, 1)),
    "split": (one_stage_table((0, None, None), (2, 2, 2), (None, 0, None), (None, None, 0)), (0, 2)),
}


@pytest.mark.parametrize(
    ("name", "model"),
    [("whole", TOY), ("apart", TOY), ("split", TOY), ("split", UNROLLED)],
    ids=["whole", "apart", "split", "unrolled"],
)
def test_the_table_decides_what_runs(rules_for, name, model):
    table, chosen = TABLES[name]
    params, batch = make(2, 3)
    found = on_stages(rules_for(data=1), table, StagePlan((Partition((2,)),)), model, params, batch)
    assert_same(found, expected_of(model, params, batch, chosen))


@pytest.mark.parametrize(
    ("num_stages", "name"),
    [
        (1, "gpipe"),
        (2, "zero_bubble"),
        pytest.param(1, "zero_bubble", marks=pytest.mark.slow),
        pytest.param(2, "gpipe", marks=pytest.mark.slow),
    ],
)
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
    stages = stage_plan((2,), schedule, PipelineConfig())
    batch = jnp.ones((count, 1, 1), jnp.bfloat16)
    found = on_stages(rules_for(pipe=num_stages), schedule, stages, model, params, batch)
    assert (found.gradients.stacks[0]["weight"] == count).all()
    scale = found.gradients.outer["scale"]
    assert scale.dtype == np.float32 and scale.sum() == found.sums["rows"].sum() == count
    assert found.layer_metrics == ((),)


@pytest.mark.parametrize(
    ("lengths", "num_stages", "placement"),
    [
        ((3,), 1, "round_robin"),
        ((1, 2, 0, 2), 2, "v_shape"),
        *(
            pytest.param(lengths, num_stages, placement, marks=pytest.mark.slow)
            for lengths, num_stages, placement in (
                ((2, 3), 2, "round_robin"),
                ((2, 3), 1, "v_shape"),
                ((1, 2, 0, 2), 4, "round_robin"),
                ((2, 1, 1, 2), 4, "round_robin"),
                ((2, 1, 1, 2), 2, "v_shape"),
            )
        ),
    ],
    ids=str,
)
def test_a_table_without_backwards_has_reports_and_no_gradients(rules_for, lengths, num_stages, placement):
    params, batch, expected = toy(sum(lengths), 5)
    stages = StagePlan((Partition(lengths, num_stages, placement),))
    found = on_stages(rules_for(pipe=num_stages), forward_only(stages, 5), stages, TOY, params, batch)
    assert found.gradients is None
    assert_same(found, expected)


def two_stacks() -> Model:
    """An encoder-decoder: what leaves the encoder is `memory` for every layer of the decoder."""

    def encode(weights, stream, number, shared):
        output = layer(weights, stream["x"], number, shared)
        return replace(output, stream={**stream, "x": output.stream})

    def decode(weights, stream, number, shared):
        # reads what no layer of the encoder does, and reports other metrics
        y = layer(weights, stream["x"] * jnp.cos(stream["memory"]), number, {"scale": shared["decoder scale"]}).stream
        return LayerOutput(stream | {"x": y}, metrics={"memory": jnp.sum(stream["memory"] * y)})

    def enter_encoder(outer, stream, microbatch):
        x = enter(outer, stream, microbatch)
        return {"x": x, "memory": jnp.zeros_like(x)}

    def enter_decoder(outer, stream, microbatch):
        return {"x": microbatch["target"] @ outer["embedding"], "memory": jnp.tanh(stream["x"] * outer["norm"])}

    decoder = Stack(enter_decoder, lambda microbatch: {"decoder scale": 2 * microbatch["scale"]}, decode)
    return Model(
        (Stack(enter_encoder, shared, encode), decoder),
        lambda outer, stream, microbatch: head(outer, stream["x"], microbatch),
    )


def make_two(num_layers: tuple[int, int], num_microbatches: int) -> tuple[Parameters, dict]:
    params, batch = make(num_layers[0], num_microbatches)
    normal = random_arrays(2)
    batch |= {"target": normal(num_microbatches, ROWS, WIDTH)}
    outer = params.outer | {"norm": normal(WIDTH)}
    return Parameters((*params.stacks, make_layers(num_layers[1], seed=3)), outer), batch


@functools.cache
def two(num_layers: tuple[int, int], num_microbatches: int):
    params, batch = make_two(num_layers, num_microbatches)
    return params, batch, expected_of(two_stacks(), params, batch)


@pytest.mark.parametrize(
    ("name", "num_stages", "num_chunks"),
    [
        ("1f1b", 1, 1),
        pytest.param("interleaved", 2, 1, marks=pytest.mark.slow),
        pytest.param("interleaved", 3, 2, marks=pytest.mark.slow),
        pytest.param("eager_interleaved", 3, 1, marks=pytest.mark.slow),
        pytest.param("zero_bubble_v", 2, 1, marks=pytest.mark.slow),
        pytest.param("dualpipe_v", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_an_encoder_decoder_is_plain_differentiation(rules_for, name, num_stages, num_chunks):
    num_microbatches = 4
    num_layers = (num_stages * num_chunks + 1, num_stages * num_chunks)
    schedule = make_schedule(name, num_stages, num_microbatches, num_chunks, num_stacks=2)
    stages = stage_plan(num_layers, schedule, PipelineConfig())
    params, batch, expected = two(num_layers, num_microbatches)
    rules = rules_for(pipe=num_stages)
    assert_same(on_stages(rules, schedule, stages, two_stacks(), params, batch), expected)
    if num_stages < 3:
        found = on_stages(rules, forward_only(stages, num_microbatches), stages, two_stacks(), params, batch)
        assert_same(found, expected)


def divided(params: Parameters, is_frozen) -> tuple[Parameters, Parameters]:
    """Trained and frozen parameters, each with None where the other has a leaf."""

    def kept(frozen: bool) -> Parameters:
        return jax.tree.map_with_path(
            lambda path, leaf: leaf if is_frozen(jax.tree_util.keystr(path)) == frozen else None, params
        )

    return kept(False), kept(True)


# an adapter's way (some matrices of every layer), an encoder's, and all but the head's
FREEZES = {
    "some": lambda name: "up" in name or "embedding" in name,
    "first stack": lambda name: "stacks[0]" in name,
    "all but the head": lambda name: "head" not in name,
}


@pytest.mark.parametrize(
    ("name", "num_stages"),
    [("1f1b", 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("interleaved", "zero_bubble_v"))],
)
@pytest.mark.parametrize("which", FREEZES)
def test_frozen_parameters_have_no_gradients(rules_for, name, num_stages, which):
    num_layers, num_microbatches = (num_stages + 1, num_stages), 4
    schedule = make_schedule(name, num_stages, num_microbatches, 1, num_stacks=2)
    stages = stage_plan(num_layers, schedule, PipelineConfig())
    params, batch, expected = two(num_layers, num_microbatches)
    trained, frozen = divided(params, FREEZES[which])
    assert jax.tree.leaves(trained) and jax.tree.leaves(frozen)
    found = on_stages(rules_for(pipe=num_stages), schedule, stages, two_stacks(), trained, batch, frozen)
    wanted = divided(expected.gradients, FREEZES[which])[0]
    assert jax.tree.structure(found.gradients) == jax.tree.structure(trained)
    assert_same(found, expected._replace(gradients=wanted))
