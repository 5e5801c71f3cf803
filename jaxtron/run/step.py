"""The train step: one manual region for loss and gradients, then the optimizer on global arrays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtron.data.batch import SEQUENCE, BatchField, TokenBatch, map_batch, present
from jaxtron.layers.inputs import row_keys
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.model import Decoder
from jaxtron.models.decoder.staged import StagedDecoder
from jaxtron.models.program import as_pytree
from jaxtron.optim.config import OptimizerConfig
from jaxtron.optim.loss_scale import LossScale, initial_loss_scale, update_loss_scale
from jaxtron.optim.optimizer import clip_by_global_norm, make_optimizer
from jaxtron.optim.schedule import learning_rate_schedule
from jaxtron.pipeline import executor
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.model import HeadOutput, Model
from jaxtron.pipeline.partition import Partition, StagePlan, forward_only
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.pipeline.schedules.schedule import Schedule
from jaxtron.run.configuration import TrainConfig
from jaxtron.run.dtypes import DTYPES
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.context import part
from jaxtron.sharding.parameters import manual_specs, reduce_gradients
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, Int, Key, PyTree

BatchT = TypeVar("BatchT")
as_pytree(TokenBatch)


@partial(jax.tree_util.register_dataclass, data_fields=("step", "params", "optimizer", "loss_scale"), meta_fields=())
@dataclass(frozen=True)
class TrainState:
    """All that a step changes: steps done, float32 master weights, optimizer state, loss scale (fp16 only)."""

    step: Int[Array, ""]
    params: PyTree
    optimizer: PyTree
    loss_scale: LossScale | None


@dataclass(frozen=True)
class Trainer:
    """The pure functions of a training: built once inside `sharding.use(rules)`, jitted by their callers."""

    blueprint: Blueprint[Decoder]
    model: ModelConfig
    config: TrainConfig
    optimizer: OptimizerConfig
    pipeline: PipelineConfig
    partition: Partition
    seed: int

    def initial_state(self) -> TrainState:
        """The state before the first step, sharded as at rest."""
        params = self.blueprint.initialize(jax.random.key(self.seed))
        return jax.jit(self._around)(params)

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state."""
        return jax.eval_shape(self._around, self.blueprint.abstract)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step on a global batch. With fp16, a step whose gradients overflow changes only the scale."""
        scale = state.loss_scale.scale if state.loss_scale is not None else jnp.float32(1.0)
        nll, gradients = self.loss_and_gradients(state.params, batch, state.step, scale)
        gradients, norm = clip_by_global_norm(gradients, self.optimizer.clip_norm)
        updates, optimizer = self._rule().update(gradients, state.optimizer, state.params)
        done = TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer, None)
        metrics = {
            "loss": nll,
            "gradient_norm": norm,
            "learning_rate": learning_rate_schedule(self.optimizer, self.config.steps)(_updates(state.optimizer)),
        }
        if state.loss_scale is None:
            return done, metrics
        finite = jnp.isfinite(norm)
        kept = TrainState(state.step + 1, state.params, state.optimizer, None)
        chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), done, kept)
        loss_scale = update_loss_scale(state.loss_scale, finite, self.config.loss_scale)
        metrics |= {"loss_scale": scale, "skipped_steps": chosen.step - _updates(chosen.optimizer)}
        return TrainState(chosen.step, chosen.params, chosen.optimizer, loss_scale), metrics

    def loss_and_gradients(
        self, params: PyTree, batch: Any, step: Int[Array, ""], scale: Float[Array, ""]
    ) -> tuple[Float[Array, ""], PyTree]:
        """Mean negative log-likelihood over the batch's tokens, and the float32 gradients of the training loss.

        The mean is over the global count of tokens that weigh, so it does not depend on how the batch is cut. The
        gradients lie as the state at rest does; `scale` multiplies the loss before the backward and is divided out.
        """
        specs = manual_specs(self.blueprint.parameters)
        step_key = jax.random.fold_in(jax.random.key(self.seed), step)
        run = region(
            self._local_gradients,
            in_specs=(specs, batch_spec(), PartitionSpec(), PartitionSpec()),
            out_specs=(PartitionSpec(), specs),
        )
        return run(params, batch, step_key, scale)

    def evaluate(
        self, params: PyTree, batch: Any, num_microbatches: int | None = None
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Sums over a batch: negative log-likelihood in nats, and the weight of its tokens.

        Rows go through the model in so many microbatches (none: as large as those of a step; a smaller batch is one).
        """

        def local(params: PyTree, batch: Any) -> tuple[Array, Array]:
            working = self.blueprint.working(params, DTYPES[self.config.precision])
            count = counts(batch)["tokens"]
            microbatches = jax.tree.map(vary, self._cut(batch, num_microbatches))
            table = forward_only(StagePlan((self.partition,)), microbatches[1].shape[0])
            _, nll = self._run(table, working, microbatches, key=None)
            return all_reduce(nll, current().manual), count

        specs = manual_specs(self.blueprint.parameters)
        scalars = (PartitionSpec(), PartitionSpec())
        return region(local, (specs, batch_spec()), scalars)(params, batch)

    def held(self, batch: Any) -> tuple[PyTree, executor.ExecutorState]:
        """Types of what a device holds all through an (abstract) batch: working parameters, the executor's buffers.

        Traced, never run. Their shapes are whole along `tensor`, as their shardings say.
        """
        found: list[tuple[PyTree, executor.ExecutorState]] = []

        def local(params: PyTree, batch: Any) -> Array:
            working = self.blueprint.working(params, DTYPES[self.config.precision])
            microbatches = jax.tree.map(vary, self._cut(batch))
            staged, model = self._pieces(working, self._dropout_key(jax.random.key(0)))
            table = self.schedule(microbatches[1].shape[0])
            buffers = executor.initial_state(
                table, StagePlan((self.partition,)), model, staged.parameters, microbatches
            )
            found.append(jax.tree.map(jax.typeof, (working, buffers)))
            return jnp.zeros(())

        specs = (manual_specs(self.blueprint.parameters), batch_spec())
        jax.eval_shape(region(local, specs, PartitionSpec()), self.blueprint.abstract, batch)
        return found[0]

    def _local_gradients(
        self, params: PyTree, batch: Any, step_key: Key[Array, ""], scale: Float[Array, ""]
    ) -> tuple[Float[Array, ""], PyTree]:
        """This device's part of `loss_and_gradients`."""
        working = self.blueprint.working(params, DTYPES[self.config.precision])
        factors = {name: scale / count for name, count in counts(batch).items()}
        microbatches = jax.tree.map(vary, self._cut(weigh(batch, factors)))
        table = self.schedule(microbatches[1].shape[0])
        gradients, nll = self._run(table, working, microbatches, self._dropout_key(step_key))
        gradients = reduce_gradients(gradients, self.blueprint.parameters)
        gradients = jax.tree.map(lambda gradient: gradient / scale, gradients)
        return all_reduce(nll, current().manual) / scale, gradients

    def schedule(self, num_microbatches: int) -> Schedule:
        """The table of a step with this many microbatches."""
        return make_schedule(self.pipeline.schedule, current().parts("pipe"), num_microbatches, self.pipeline.chunks)

    def _run(
        self, table: Schedule, working: PyTree, microbatches: tuple[Any, Array], key: Key[Array, ""] | None
    ) -> tuple[PyTree, Array]:
        """Gradients like the working parameters, and the sum of the negative log-likelihood, on this device."""
        staged, model = self._pieces(working, key)
        result = executor.run(table, StagePlan((self.partition,)), model, staged.parameters, microbatches)
        return None if result.gradients is None else staged.nested(result.gradients), result.sums["nll"]

    def _pieces(self, working: PyTree, key: Key[Array, ""] | None) -> tuple[StagedDecoder, Model]:
        staged = StagedDecoder(self.blueprint, working)

        def keys(rows: Array) -> Array | None:
            return None if key is None else row_keys(key, rows)

        def head(decoder: Decoder, x: Array, part: tuple[Any, Array]) -> HeadOutput:
            loss, nll = decoder.score(x, part[0].targets, part[0].weights)
            return HeadOutput(loss, {"nll": nll})

        model = staged.model(
            embed=lambda decoder, part: decoder.embed(part[0].tokens, keys(part[1]), part[0].positions),
            inputs=lambda decoder, part: decoder.inputs(
                part[0].tokens.shape[1], keys(part[1]), part[0].positions, part[0].segments
            ),
            head=head,
        )
        return staged, model

    def _cut(self, batch: BatchT, num_microbatches: int | None = None) -> tuple[BatchT, Int[Array, "M B"]]:
        """The local batch as [microbatch, row, ...], of sequences the part that lies here, and global row numbers."""
        num_local = jax.tree.leaves(batch)[0].shape[0]
        shards = current().size(current().batch)
        size = min(num_local, self.config.global_batch // self.config.microbatches // shards)
        if num_microbatches is not None:
            size = num_local // num_microbatches
        rows = jax.lax.axis_index(current().batch) * num_local + jnp.arange(num_local)
        batch = shard_sequence(batch)
        return jax.tree.map(lambda leaf: leaf.reshape(num_local // size, size, *leaf.shape[1:]), (batch, rows))

    def _dropout_key(self, key: Key[Array, ""]) -> Key[Array, ""] | None:
        return key if self.model.dropout > 0 or self.model.attention_dropout > 0 else None

    def _rule(self) -> optax.GradientTransformation:
        return make_optimizer(self.optimizer, self.config.steps, self.blueprint.roles)

    def _around(self, params: PyTree) -> TrainState:
        loss_scale = initial_loss_scale(self.config.loss_scale) if self.config.precision == "fp16" else None
        return TrainState(jnp.int32(0), params, self._rule().init(params), loss_scale)


def counts(batch: Any) -> dict[str, Float[Array, ""]]:
    """Sums over the global batch of the weights of each normalizer, inside the manual region."""
    sums: dict[str, Array] = {}
    for _, field, array in present(batch):
        if field.normalizer is not None:
            sums[field.normalizer] = sums.get(field.normalizer, 0.0) + array.sum()
    return {name: all_reduce(count, current().batch) for name, count in sums.items()}


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
            if name == SEQUENCE:
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


def _updates(optimizer: PyTree) -> Int[Array, ""]:
    """Updates made, skipped steps left out: where the learning rate's schedule is."""
    nodes = jax.tree.leaves(optimizer, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
    return jnp.asarray(next(node.count for node in nodes if isinstance(node, optax.ScaleByScheduleState)))
