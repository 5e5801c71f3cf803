"""Patterns that never repeat: one loop over layers of several kinds, on stages cut anywhere."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.checkpoint.layer_order import layer_order
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.pattern import hybrid_pattern, parse
from jaxtron.models.program import Microbatch
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.partition import Partition
from jaxtron.plan.memory_use import device_bytes
from jaxtron.plan.resident import resident
from jaxtron.run.step import Trainer, batch_sharding
from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.parameters import manual_specs, reduce_gradients
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current, use
from jaxtron.typing import PyTree
from tests.conformance.runs import weighed
from tests.support.equivalence import (
    LENGTH,
    MODELS,
    ONE_STAGE,
    ROWS,
    TOLERANCE,
    assert_equal,
    by_name,
    changed,
    make_batch,
    make_params,
    make_trainer,
    rules_for,
)
from tests.support.plain import plain

SLOW = pytest.mark.slow
# the published pattern, and its like of few layers
PUBLISHED, HYBRID = (hybrid_pattern(0.08, 0.5, count) for count in (56, 14))
MAMBA = {"num_heads": 4, "head_dim": 8, "state_size": 8, "num_groups": 2, "conv_width": 3}


def model(pattern: str, balance_over: str = "sequence", **changes: Any) -> ModelConfig:
    """With a norm in which rounding is not scaled up."""
    if "E" in pattern:
        changes["moe"] = {"num_experts": 4, "balance": 0.3, "balance_over": balance_over, "bias_rate": 0.01}
    if "M" in pattern:
        changes["mamba"] = MAMBA
    return changed(MODELS["llama"], pattern=pattern, num_layers=1, norm_epsilon=0.1, **changes)


class Case(NamedTuple):
    """How a step runs."""

    pattern: str
    mesh: dict[str, int]
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: Any = "none"
    microbatches: int = 4
    zero: str = "optimizer"
    balance_over: str = "sequence"

    def __str__(self) -> str:
        words = [f"{flag} {size}" for flag, size in self.mesh.items()]
        return "-".join([self.pattern[:8].replace("*", "A"), *words, self.schedule, str(self.recompute)])


# the second stage has no MLP
QUICK = (Case("*-*", {"pipe": 2}, recompute="selective", microbatches=2),)
OTHERS = (
    Case("M-*-M", {"pipe": 2}, recompute="selective"),
    Case(HYBRID, {"context": 2, "tensor": 2, "fsdp": 2}, microbatches=1, zero="parameters"),
    Case(HYBRID, {"pipe": 2, "context": 2, "tensor": 2}, "zero_bubble", recompute=("mamba",)),
    Case(HYBRID, {"pipe": 4, "data": 2}, "interleaved", 3, recompute="selective"),
    Case(HYBRID, {"pipe": 2, "fsdp": 2}, "zero_bubble_v", 2),
    Case(HYBRID, {"pipe": 2}, "dualpipe_v", 2),
    Case(PUBLISHED, {"pipe": 4, "tensor": 2}, "eager_1f1b", recompute="full"),
    Case("M-ME*-EM(*-)", {"pipe": 2, "data": 2, "expert": 2}, "eager_interleaved", 2),
    # the load of earlier microbatches is told to layers with experts
    Case("M-ME*-EM(*-)", {"pipe": 4}, "gpipe", balance_over="global"),
    # cut inside of a period
    Case("*-*|-*-*-*-", {"pipe": 2, "tensor": 2}),
)
# rounding adds up over layers: on one device 1.4e-6 of 8 layers, 4.3e-6 of 14, 2.1e-5 of 56. With each parameter the
# next number up or down, plain differentiation of 56 moves by 7.8e-5; on the mesh 5.9e-5 were found
ROUNDING = 1.5e-6


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=SLOW) for case in OTHERS)], ids=str)
def test_loss_and_every_gradient_equal_plain_differentiation(case: Case) -> None:
    pipeline = PipelineConfig(schedule=case.schedule, chunks=case.chunks) if "pipe" in case.mesh else ONE_STAGE
    with use(rules_for(case.mesh, case.zero)):
        config = model(case.pattern, case.balance_over, recompute=case.recompute)
        trainer = make_trainer(config, pipeline=pipeline, microbatches=case.microbatches)
        batch = jax.device_put(make_batch(), batch_sharding())
        scalars = jax.device_put((jnp.int32(5), jnp.float32(1)), NamedSharding(current().mesh, PartitionSpec()))
        reported, gradients = jax.jit(trainer.loss_and_gradients)(make_params(trainer), batch, *scalars)
        found = jax.tree.map(np.asarray, reported), by_name(gradients, trainer)
    expected = reference(case.pattern, case.balance_over, case.microbatches if case.balance_over == "global" else 1)
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        np.testing.assert_allclose(found[0][name], value, rtol=1e-5, err_msg=name)
    assert_equal(found[1], expected[1], max(TOLERANCE, ROUNDING * len(parse(case.pattern).layers)))


@functools.cache
def reference(
    pattern: str, balance_over: str, microbatches: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What a step reports, and every gradient, by `jax.grad` of one layer after the other on one device."""
    with use(rules_for({})):
        trainer = make_trainer(model(pattern, balance_over))
        assert trainer.stages.partitions[0].kinds
        rows = Microbatch(weighed(make_batch()), jnp.arange(ROWS), jnp.full(ROWS, 1 / ROWS))
        lie, whole = manual_specs(trainer.blueprint.parameters), PartitionSpec()
        run = functools.partial(_plain, trainer, ROWS // microbatches)
        sums, metrics, gradients = jax.jit(region(run, (lie, whole), (whole, whole, lie)))(make_params(trainer), rows)
        reported = trainer.program.reported(sums)
        for kind, found in metrics[0].items():
            reported |= {f"stack/layers/{kind}/{name}": value for name, value in dict(found).items()}
        gradients = trainer.blueprint.of("trained", gradients)
        return jax.tree.map(np.asarray, reported), by_name(gradients, trainer)


def _plain(trainer: Trainer, size: int, params: PyTree, rows: PyTree) -> PyTree:
    rows = jax.tree.map(vary, rows)
    cut = jax.tree.map(lambda leaf: jnp.split(leaf, ROWS // size), rows)
    microbatches = jax.tree.transpose(jax.tree.structure(rows), None, cut)
    kinds = [stack.kinds for stack in trainer.stages.partitions]
    pieces = trainer.program.model(trainer.parts, None)
    _, found = plain(pieces, trainer.working(params), microbatches, kinds)
    gradients = reduce_gradients(trainer.parts.join(found.gradients), trainer.blueprint.parameters)
    reported = (found.sums, found.layer_metrics)
    return *jax.tree.map(lambda leaf: all_reduce(vary(leaf), current().manual), reported), gradients


def kept(num_layers: int, recompute: str) -> int:
    """Bytes that the published pattern of so many layers keeps in small for backwards."""
    with use(rules_for({})):
        trainer = make_trainer(model(hybrid_pattern(0.08, 0.5, num_layers), recompute=recompute))
        held = resident(trainer, jax.tree.map(jnp.asarray, make_batch()))[1]
        return sum(map(device_bytes, jax.tree.leaves(held.stacks[0].residuals)))


def program(num_layers: int) -> jax.stages.Lowered:
    """Loss and gradients of the published pattern of so many layers in small, layers recomputed."""
    with use(rules_for({})):
        trainer = make_trainer(model(hybrid_pattern(0.08, 0.5, num_layers), recompute="full"))
        batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_batch()))
        batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding()), batch
        )
        scalars = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))
        return jax.jit(trainer.loss_and_gradients).lower(trainer.blueprint.abstract, batch, *scalars)


def test_a_program_is_as_large_as_its_kinds() -> None:
    few, many = (program(count).as_text().splitlines() for count in (14, 56))
    assert len(few) == len(many)


def test_a_recomputed_layer_keeps_its_input() -> None:
    everything = kept(56, "full")
    assert everything == 56 * ROWS * LENGTH * 32 * 4 < kept(56, "none") / 3


@pytest.mark.slow
def test_a_recomputed_layer_takes_as_much_in_the_compiled_program() -> None:
    few, many = (program(count).compile().memory_analysis().temp_size_in_bytes for count in (28, 56))
    assert many - few == pytest.approx(28 * ROWS * LENGTH * 32 * 4, rel=0.05)


def test_first_values_do_not_depend_on_stages_and_are_saved_in_the_order_of_the_model() -> None:
    def values(mesh: dict[str, int]) -> dict[str, np.ndarray]:
        with use(rules_for(mesh)):
            trainer = make_trainer(model("*-(*-)|-*"), microbatches=4)
            params = trainer.blueprint.initialize(jax.random.key(1))
            order = layer_order(trainer.partitions, trainer.blueprint)
            saved = jax.tree.map(np.asarray, order.in_model_order(params))
            found, again = by_name(params, trainer), jax.tree.leaves(saved)
            for array, own in zip(again, found.values(), strict=True):
                np.testing.assert_array_equal(array, own)
            assert trainer.blueprint.num_parameters == sum(array.size for array in again)
            return found

    one, two = values({}), values({"pipe": 2})
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], err_msg=name)


def test_each_kind_has_slots_of_its_own() -> None:
    partition = Partition((5, 3), 2, kinds=("M", "-", "*", "-", "M", "-", "M", "-"))
    lengths = {kind: part.lengths for kind, part in partition.by_kind.items()}
    assert lengths == {"M": (2, 1), "-": (2, 2), "*": (1, 0)}
    assert partition.by_kind["M"].slot_layers == (0, 1, 2, -1) and partition.by_kind["*"].slot_layers == (0, -1)
    assert [part.num_layers for part in partition.alike] == [3, 4, 1]
    assert partition.alike[0].alike == (partition.alike[0],)
