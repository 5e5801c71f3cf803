"""The train step: one manual region for loss and gradients, then the optimizer on global arrays."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.data.batch import SEQUENCES, BatchField, map_batch, present
from jaxtron.kernels.weight_sums.spec import WeightSums
from jaxtron.models.joined import JoinedParts, joined_parts
from jaxtron.models.program import Microbatch, Parts, Program
from jaxtron.optim.config import OptimizerConfig
from jaxtron.optim.guard import after_step, initial_health, is_good
from jaxtron.optim.loss_scale import initial_loss_scale, update_loss_scale
from jaxtron.optim.optimizer import clip_by_global_norm, descend, make_optimizer
from jaxtron.optim.schedule import learning_rate_schedule
from jaxtron.pipeline import executor
from jaxtron.pipeline.layer_slots import in_model_order
from jaxtron.pipeline.model import Parameters, merge
from jaxtron.pipeline.partition import Partition, StagePlan, forward_only
from jaxtron.pipeline.schedules.schedule import Schedule
from jaxtron.run.configuration import TrainConfig
from jaxtron.run.dtypes import DTYPES
from jaxtron.run.model_buffers import updated_buffers
from jaxtron.run.state import TrainState, divided
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.sharding.checksums import by_device, device_rows, inside_region
from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.context import part
from jaxtron.sharding.parameters import manual_specs, reduce_gradients
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, Int, Key, PyTree, UInt32

BatchT = TypeVar("BatchT")
Scalar = Float[Array, ""]


@dataclass(frozen=True)
class Trainer:
    """The pure functions of a training: built once inside `sharding.use(rules)`, jitted by their callers."""

    program: Program
    parts: Parts
    stages: StagePlan
    config: TrainConfig
    optimizer: OptimizerConfig
    schedule: Callable[[int], Schedule]
    """The table of a step with so many microbatches."""
    seed: int
    weight_sums: WeightSums | None = None
    """What adds gradients of weights to their sums; none: XLA."""

    @property
    def blueprint(self) -> Blueprint:
        """Shapes, layouts and roles of the parameters."""
        return self.parts.blueprint

    @functools.cached_property
    def joined(self) -> JoinedParts:
        """The parts that a step computes with: the same with weights joined that are multiplied by as one."""
        return joined_parts(self.parts, DTYPES[self.config.precision])

    @property
    def partitions(self) -> dict[str, Partition]:
        """The slots of each stack's layers, by its path in the parameters; of several kinds, of each by its own."""
        found = {}
        for path, stack in zip(self.parts.stacks, self.stages.partitions, strict=True):
            found |= {f"{path}/{kind}": own for kind, own in stack.by_kind.items()} or {path: stack}
        return found

    def initial_state(self) -> TrainState:
        """The state before the first step, sharded as at rest."""
        params = self.blueprint.initialize(jax.random.key(self.seed))
        return jax.jit(self._around)(params)

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state."""
        return jax.eval_shape(self._around, self.blueprint.abstract)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step on a global batch; one that is not applied changes only the loss scale or the guard.

        With fp16 that is a step whose gradients overflow, and with `train.health` one that is bad.
        """
        reported, gradients = self.loss_and_gradients(state.model, batch, state.step, self._scale(state))
        return self._update(state, reported, gradients)

    def checksums(self, state: TrainState, batch: Any) -> UInt32[Array, "D 3"]:
        """Checksums of what `step` makes on each device: its parts of loss and gradients, and the new state.

        The first two are of what no other device has touched yet, but those that share its layers. Two calls give the
        same bits, on devices that compute what they should and operations that do not add up in any order.
        """

        def local(
            params: PyTree, batch: Any, step_key: Key[Array, ""], scale: Scalar
        ) -> tuple[tuple[dict[str, Array], PyTree], UInt32[Array, "1 P 2"]]:
            result = self._local_result(params, batch, step_key, scale)
            return self._over_devices(result, scale), inside_region([result.sums, result.gradients])

        before = self._in_region(local, PartitionSpec(current().manual))
        (reported, gradients), own = before(state.model, batch, self._key(state.step), self._scale(state))
        after = by_device(self._update(state, reported, gradients))
        # of its many arrays one sum, for the names are of no interest
        whole = (after * (2 * jnp.arange(after.shape[1], dtype=jnp.uint32) + 1)).sum(1, dtype=jnp.uint32)
        return jnp.concatenate([device_rows(own), whole[:, None]], axis=1)

    def _scale(self, state: TrainState) -> Scalar:
        return state.loss_scale.scale if state.loss_scale is not None else jnp.float32(1.0)

    def _key(self, step: Int[Array, ""]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.key(self.seed), step)

    def _update(
        self, state: TrainState, reported: dict[str, Array], gradients: PyTree
    ) -> tuple[TrainState, dict[str, Array]]:
        """The step from its gradients on."""
        scale = self._scale(state)
        gradients, norm = clip_by_global_norm(gradients, self.optimizer.clip_norm)
        directions, optimizer = self._rule().update(gradients, state.optimizer, state.params)
        learning_rate = learning_rate_schedule(self.optimizer, self.config.steps)(state.updates)
        changed = {
            "updates": state.updates + 1,
            "params": descend(state.params, directions, learning_rate),
            "optimizer": optimizer,
        }
        if self.program.update_buffers is not None:
            changed["buffers"] = updated_buffers(self.program, self.parts, self.partitions, state.buffers, reported)
        metrics = {**reported, "gradient_norm": norm, "learning_rate": learning_rate}
        applied = None
        if state.loss_scale is not None:
            applied = jnp.isfinite(norm)
            changed_scale = update_loss_scale(state.loss_scale, applied, self.config.loss_scale)
            metrics["loss_scale"] = scale
            state = replace(state, loss_scale=changed_scale)
        if state.health is not None:
            good = is_good(state.health, reported["loss"], norm, self.config.health)
            health = after_step(state.health, good, reported["loss"], norm)
            if applied is not None:
                # an overflow is the loss scale's to handle
                health = jax.tree.map(lambda new, old: jnp.where(applied, new, old), health, state.health)
            applied = good if applied is None else applied & good
            metrics["bad_steps"] = health.bad
            state = replace(state, health=health)
        if applied is not None:
            kept = {name: getattr(state, name) for name in changed}
            changed = jax.tree.map(functools.partial(jnp.where, applied), changed, kept)
            metrics["skipped_steps"] = state.step + 1 - changed["updates"]
        return replace(state, step=state.step + 1, **changed), metrics

    def loss_and_gradients(
        self, params: PyTree, batch: Any, step: Int[Array, ""], scale: Scalar
    ) -> tuple[dict[str, Array], PyTree]:
        """What the step reports, its mean loss among it, and the float32 gradients of what is trained of `params`.

        `params` are all that the model has. They lie as at rest, and so do the gradients, with None for the others.
        Means are over the global counts of what weighs, so they do not depend on how the batch is cut. `scale`
        multiplies the loss before the backward and is divided out. Metrics of layers have a row for each, in the
        model's order.
        """
        return self._in_region(self._local_gradients)(params, batch, self._key(step), scale)

    def _in_region(self, local: Callable[..., Any], *more: PartitionSpec) -> Callable[..., Any]:
        """A function of parameters, batch, key and scale that gives what `loss_and_gradients` does, and more."""
        specs, gradients = manual_specs(self.blueprint.parameters), manual_specs(self.blueprint.trained)
        given = (PartitionSpec(), gradients)
        return region(
            local,
            in_specs=(specs, batch_spec(), PartitionSpec(), PartitionSpec()),
            out_specs=(given, *more) if more else given,
        )

    def evaluate(
        self, params: PyTree, batch: Any, num_microbatches: int | None = None
    ) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """Of a batch the sums that the model's head reports, and the counts of their normalizers.

        Rows go through the model in so many microbatches (none: as large as those of a step; a smaller batch is one).
        """

        def local(params: PyTree, batch: Any) -> tuple[dict[str, Array], dict[str, Array]]:
            microbatches = self.microbatches(batch, num_microbatches)
            table = forward_only(self.stages, microbatches.rows.shape[0])
            model = self.program.model(self.parts, None)
            sums = executor.run(table, self.stages, model, self.working(params), microbatches).sums
            return _over_all(sums), counts(batch)

        specs = manual_specs(self.blueprint.parameters)
        return region(local, (specs, batch_spec()), PartitionSpec())(params, batch)

    def _local_gradients(
        self, params: PyTree, batch: Any, step_key: Key[Array, ""], scale: Scalar
    ) -> tuple[dict[str, Array], PyTree]:
        """This device's part of `loss_and_gradients`."""
        return self._over_devices(self._local_result(params, batch, step_key, scale), scale)

    def _local_result(self, params: PyTree, batch: Any, step_key: Key[Array, ""], scale: Scalar) -> executor.Result:
        """What this device computes of a step, before any of it is summed over the devices."""
        # what nothing counts weighs nothing
        factors = {name: jnp.where(count > 0, scale / count, 0.0) for name, count in counts(batch).items()}
        microbatches = self.microbatches(weigh(batch, factors), loss_scale=scale)
        table, model = self.schedule(microbatches.rows.shape[0]), self.program.model(self.joined, step_key)
        trained, others = self.trained_and_others(params)
        return executor.run(table, self.stages, model, trained, microbatches, others, self.weight_sums)

    def _over_devices(self, result: executor.Result, scale: Scalar) -> tuple[dict[str, Array], PyTree]:
        """The sums over the devices: what is reported, and gradients as they lie at rest."""
        assert result.gradients is not None, "a table without backwards"
        gradients = self.joined.part_weights(self.joined.join(result.gradients))
        gradients = reduce_gradients(gradients, self.blueprint.trained)
        gradients = jax.tree.map(lambda gradient: gradient / scale, gradients)
        means = jax.tree.map(lambda total: total / scale, _over_all(result.sums))
        return self.program.reported(means) | self._layer_metrics(result.layer_metrics), gradients

    def _layer_metrics(self, by_stack: tuple[PyTree, ...]) -> dict[str, Float[Array, "L ..."]]:
        """Metrics of layers summed over the devices, in the model's order, named as the stack's path and their own."""
        found = {}
        partitions = self.partitions
        for path, metrics in zip(self.parts.stacks, by_stack, strict=True):
            own = {path: metrics} if path in partitions else {f"{path}/{kind}": one for kind, one in metrics.items()}
            for place, (name, slots) in ((place, item) for place, one in own.items() for item in dict(one).items()):
                found[f"{place}/{name}"] = in_model_order(partitions[place], slots)
        return _over_all(found)

    def working(self, params: PyTree) -> Parameters:
        """The parameters that a step computes with, of those at rest, inside the manual region."""
        return self.parts.split(self.blueprint.working(params, DTYPES[self.config.precision]))

    def trained_and_others(self, params: PyTree) -> tuple[Parameters, Parameters]:
        """`working` parameters in two, as `joined` has them: those to differentiate, and frozen ones and buffers."""
        joined = self.joined
        fields = divided(joined.blueprint, joined.join_weights(self.parts.join(self.working(params))))
        return joined.split(fields["params"]), joined.split(merge(fields["frozen"], fields["buffers"]))

    def microbatches(
        self, batch: BatchT, num_microbatches: int | None = None, loss_scale: Scalar | None = None
    ) -> Microbatch[BatchT]:
        """The local batch as [microbatch, row, ...], of sequences the part that lies here.

        In so many microbatches (none: as large as those of a step; a smaller batch is one). With the scale of a loss
        to differentiate, rows have their share of it.
        """
        num_local = jax.tree.leaves(batch)[0].shape[0]
        shards = current().size(current().batch)
        size = min(num_local, self.config.global_batch // self.config.microbatches // shards)
        if num_microbatches is not None:
            size = num_local // num_microbatches
        rows = jax.lax.axis_index(current().batch) * num_local + jnp.arange(num_local)
        row_weights = None if loss_scale is None else jnp.full(num_local, loss_scale / (num_local * shards))
        whole = Microbatch(shard_sequence(batch), rows, row_weights)
        return jax.tree.map(lambda leaf: vary(leaf.reshape(num_local // size, size, *leaf.shape[1:])), whole)

    def _rule(self) -> optax.GradientTransformation:
        return make_optimizer(self.optimizer, self.blueprint.roles)

    def _around(self, params: PyTree) -> TrainState:
        loss_scale = initial_loss_scale(self.config.loss_scale) if self.config.precision == "fp16" else None
        fields = divided(self.blueprint, params)
        optimizer = self._rule().init(fields["params"])
        health = initial_health(self.config.health) if self.config.health.is_on else None
        return TrainState(
            jnp.int32(0), jnp.int32(0), **fields, optimizer=optimizer, loss_scale=loss_scale, health=health
        )


def counts(batch: Any) -> dict[str, Float[Array, ""]]:
    """Sums over the global batch of the weights of each normalizer, inside the manual region."""
    sums: dict[str, Array] = {}
    for _, field, array in present(batch):
        if field.normalizer is not None:
            sums[field.normalizer] = sums.get(field.normalizer, 0.0) + array.sum()
    return {name: all_reduce(count, current().batch) for name, count in sums.items()}


def _over_all(sums: dict[str, Array]) -> dict[str, Array]:
    return {name: all_reduce(total, current().manual) for name, total in sums.items()}


def weigh(batch: BatchT, factors: Mapping[str, Float[Array, ""]]) -> BatchT:
    """The batch with its weights times the factor of their normalizer."""

    def times(field: BatchField, array: Array) -> Array:
        return array if field.normalizer is None else array * factors[field.normalizer]

    return map_batch(times, batch)


def shard_sequence(batch: BatchT) -> BatchT:
    """Of whole sequences those tokens that lie here, where `mesh.context` splits them."""
    rules = current()

    def cut(field: BatchField, array: Array) -> Array:
        for axis, name in enumerate(field.axes, 1):
            if name in SEQUENCES:
                array = part(rules.context, rules.parts("context"), array, axis)
        return array

    return map_batch(cut, batch)


def batch_spec() -> PartitionSpec:
    """Spec of a global batch: rows over the batch axes."""
    return PartitionSpec(current().batch)


def batch_sharding() -> NamedSharding:
    """How a global batch lies: rows over the batch axes, copied along the others."""
    return NamedSharding(current().mesh, batch_spec())


def jit_step(trainer: Trainer) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """The compiled step; its input state is consumed."""
    return jax.jit(trainer.step, donate_argnums=0, compiler_options=_compiler_options())


def _compiler_options() -> dict[str, int]:
    """A pipeline's messages, and a ring's blocks, travel beside work and several at once: XLA would allow one."""
    sends = current().parts("pipe", "context") > 1
    is_on_gpu = current().mesh.devices.flat[0].platform != "cpu"
    return {"xla_gpu_experimental_parallel_collective_overlap_limit": 8} if sends and is_on_gpu else {}
