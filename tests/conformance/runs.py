"""Loss, reports and gradients of a subject: by the step on any mesh, and by plain differentiation on one device."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.data.batch import map_batch, normalizers, present
from jaxtron.models.program import Microbatch
from jaxtron.plan.compiled import hlo
from jaxtron.plan.compiled.census import Collective, census
from jaxtron.plan.compiled.rehearsal import rehearse
from jaxtron.run.batches import abstract_batch
from jaxtron.run.session import make_trainer
from jaxtron.run.step import Trainer, batch_sharding
from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.config import ContextConfig
from jaxtron.sharding.parameters import ParameterSpec, manual_specs, reduce_gradients
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current, use
from jaxtron.typing import PyTree
from tests.conformance.subjects import ONE_DEVICE, ROWS, Layout, Subject
from tests.support.equivalence import TOLERANCE, assert_equal, by_name, make_params, rules_for
from tests.support.plain import plain

STEP = 5


class Found(NamedTuple):
    """What a step reports, and every gradient in the model's order and by name; how it came about."""

    reported: dict[str, Any]
    gradients: dict[str, np.ndarray]
    parameters: tuple[ParameterSpec, ...] = ()
    collectives: tuple[Collective, ...] = ()
    num_counts: int = 0


@functools.lru_cache(maxsize=2)
def step(subject: Subject, layout: Layout, **changes: Any) -> Found:
    """By the step's own function, with parameters that are not special."""
    config = subject.configuration(layout, **changes)
    with use(rules_for(dict(layout.mesh), layout.zero, ContextConfig(**layout.context))):
        trainer = make_trainer(config)
        batch = jax.device_put(subject.batch(), batch_sharding())
        scalars = jax.device_put((jnp.int32(STEP), jnp.float32(1)), NamedSharding(current().mesh, PartitionSpec()))
        arguments = (make_params(trainer), batch, *scalars)
        compiled = jax.jit(trainer.loss_and_gradients).lower(*arguments).compile()
        # nothing is brought to the devices unasked
        with jax.transfer_guard("disallow"):
            reported, gradients = compiled(*arguments)
        return Found(
            {name: np.asarray(value) for name, value in reported.items()},
            by_name(gradients, trainer),
            tuple(jax.tree.leaves(trainer.blueprint.trained)),
            tuple(census(hlo.parse(compiled.as_text()), current().sizes)),
            len(normalizers(trainer.program.batch)),
        )


def rehearsed(subject: Subject, layout: Layout) -> Found:
    """The whole step compiled for eight H100s: shapes of what it reports, and how it would communicate."""
    rehearsal = rehearse(subject.configuration(layout), gpu="h100", num_gpus=8)
    session = rehearsal.session
    with session.use():
        trainer, batch = session.trainer, abstract_batch(session.config)
        scalars = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))
        reported, _ = jax.eval_shape(trainer.loss_and_gradients, trainer.blueprint.abstract, batch, *scalars)
        parameters = tuple(jax.tree.leaves(trainer.blueprint.trained))
    return Found(reported, {}, parameters, rehearsal.collectives, len(normalizers(trainer.program.batch)))


@functools.cache
def reference(subject: Subject) -> Found:
    """By `jax.grad` of one layer after the other, the batch whole on one device."""
    with use(rules_for({})):
        trainer = make_trainer(subject.configuration(ONE_DEVICE))
        params, whole = make_params(trainer), PartitionSpec()
        lie = manual_specs(trainer.blueprint.parameters)
        run = jax.jit(region(functools.partial(_plain, trainer), (lie, whole), (whole, whole, lie)))
        sums, metrics, gradients = run(
            params, Microbatch(weighed(subject.batch()), jnp.arange(ROWS), jnp.full(ROWS, 1 / ROWS))
        )
        reported = trainer.program.reported(sums)
        for path, found in zip(trainer.parts.stacks, metrics, strict=True):
            reported |= {f"{path}/{name}": rows for name, rows in dict(found).items()}
        # buffers are differentiated there too
        found = by_name(trainer.blueprint.of("trained", gradients), trainer)
        return Found({name: np.asarray(value) for name, value in reported.items()}, found)


def _plain(trainer: Trainer, params: PyTree, batch: PyTree) -> PyTree:
    key = jax.random.fold_in(jax.random.key(trainer.seed), STEP)
    batch = jax.tree.map(vary, batch)
    _, found = plain(trainer.program.model(trainer.parts, key), trainer.working(params), [batch])
    gradients = reduce_gradients(trainer.parts.join(found.gradients), trainer.blueprint.parameters)
    reported = (found.sums, found.layer_metrics)
    return *jax.tree.map(lambda leaf: all_reduce(vary(leaf), current().manual), reported), gradients


def weighed(batch: Any) -> Any:
    """The batch with its weights divided by their sum, each normalizer's apart."""
    counts: dict[str, float] = {}
    for _, field, array in present(batch):
        if field.normalizer is not None:
            counts[field.normalizer] = counts.get(field.normalizer, 0.0) + array.sum(dtype=np.float64)
    return map_batch(
        lambda field, array: array if field.normalizer is None else np.float32(array / counts[field.normalizer]), batch
    )


def assert_same(found: Found, expected: Found, tolerance: float = TOLERANCE) -> None:
    """Losses, metrics of layers in the model's order, and every gradient."""
    assert found.reported.keys() == expected.reported.keys()
    for name, value in expected.reported.items():
        np.testing.assert_allclose(found.reported[name], value, rtol=TOLERANCE, err_msg=name)
    assert_equal(found.gradients, expected.gradients, tolerance)
