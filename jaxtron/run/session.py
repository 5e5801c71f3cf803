"""A configuration on devices: the mesh, its rules, the attention and the trainer, made once for every command."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtron.checkpoint.layer_order import LayerOrder, layer_order
from jaxtron.kernels.attention.attention import Implementation
from jaxtron.kernels.selection import Backend
from jaxtron.kernels.weight_sums.backend import select_backend
from jaxtron.kernels.weight_sums.spec import WeightSums
from jaxtron.models.families import program_of
from jaxtron.models.program import make_parts
from jaxtron.run.attention import select_attention
from jaxtron.run.batches import BatchSharding
from jaxtron.run.configuration import Configuration
from jaxtron.run.dtypes import DTYPES
from jaxtron.run.state import TrainState
from jaxtron.run.step import Scalar, Trainer, batch_sharding, jit_step
from jaxtron.run.trainable import freeze
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.sharding.checksums import by_device
from jaxtron.sharding.halves import split_of_size
from jaxtron.sharding.mesh import build_mesh
from jaxtron.sharding.rules import Rules, Tables, current, make_rules, use
from jaxtron.typing import Array, Device, PyTree, UInt32


@dataclass(frozen=True, eq=False)
class RunSession:
    """What a resolved configuration becomes on a mesh; made by `make_session`.

    Its methods enter its rules by themselves; what else builds or runs the model does so inside `use()`.
    """

    config: Configuration
    rules: Rules
    attention: Mapping[str, Backend[Implementation]]
    """The backend of each kind of attention, by the pattern's symbol."""
    choices: tuple[str, ...] = ()
    """A line for each thing that was chosen for its steps beside attention, and why."""
    trains: bool = True
    """Whether steps are taken; one that only evaluates does not look at the settings of batches."""

    def use(self) -> contextlib.AbstractContextManager[Rules]:
        """Within this context, models are built and run on the session's mesh."""
        return use(self.rules)

    @property
    def mesh(self) -> Mesh:
        """The devices, by named axes."""
        return self.rules.mesh

    @property
    def sizes(self) -> dict[str, int]:
        """Parts by flag of `mesh`, outermost first."""
        return self.rules.sizes

    @property
    def device_kind(self) -> str:
        """What JAX calls one of the devices."""
        return self.mesh.devices.flat[0].device_kind

    @cached_property
    def trainer(self) -> Trainer:
        """The pure functions of the step, on the session's mesh."""
        with self.use():
            return make_trainer(self.config, self.attention, trains=self.trains)

    @property
    def blueprint(self) -> Blueprint:
        """Shapes, layouts and roles of the parameters."""
        return self.trainer.blueprint

    @cached_property
    def batches(self) -> BatchSharding:
        """How global batches are laid out on the devices."""
        with self.use():
            return BatchSharding(batch_sharding())

    @cached_property
    def layer_order(self) -> LayerOrder:
        """Between the layers of a state here and those of a checkpoint."""
        with self.use():
            return layer_order(self.trainer.partitions, self.blueprint)

    def initial_state(self) -> TrainState:
        """The state before the first step, sharded as at rest."""
        with self.use():
            return self.trainer.initial_state()

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state, where arrays can be restored to."""
        with self.use():
            return placed(self.trainer.abstract_state(), self.mesh)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        """`Trainer.step`, compiled; `state` is consumed."""
        with self.use():
            return self._step(state, batch)

    def lower_step(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """The step traced for a state and a batch, real or abstract, ready to be compiled."""
        with self.use():
            return self._step.lower(state, batch)

    def checksums(self, state: TrainState, batch: Any) -> UInt32[Array, "D 3"]:
        """`Trainer.checksums`, compiled; `state` stays as it is, and no second one is made."""
        with self.use():
            return self._checksums(state, batch)

    def state_checksums(self, state: TrainState) -> UInt32[Array, "D N"]:
        """A checksum of every array of a state, in tree order, for each device's part of it."""
        with self.use():
            return self._state_checksums(state)

    def evaluate(self, params: PyTree, batch: Any) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """`Trainer.evaluate`, compiled; where the session does not train, a batch is one microbatch."""
        with self.use():
            return self._evaluate(params, batch)

    @cached_property
    def _step(self) -> Any:
        return jit_step(self.trainer)

    @cached_property
    def _checksums(self) -> Any:
        return jax.jit(self.trainer.checksums)

    @cached_property
    def _state_checksums(self) -> Any:
        return jax.jit(by_device)

    @cached_property
    def _evaluate(self) -> Any:
        return jax.jit(partial(self.trainer.evaluate, num_microbatches=None if self.trains else 1))


def make_session(
    config: Configuration, devices: Sequence[Device], *, trains: bool = True, tables: Tables | None = None
) -> RunSession:
    """The session of a configuration on these devices; a `UserError` where it does not fit them.

    One that does not train only evaluates: batches are of any size that the batch axes divide, each a microbatch.
    `tables` are the two of sharding (none: the house's).
    """
    config = config.resolved()
    sizes = config.mesh.shape(len(devices))
    if trains:
        config.check_mesh(sizes)
    else:
        config.check_model(sizes)
    attention = select_attention(config, sizes["context"], devices[0].device_kind)
    rules = make_rules(build_mesh(config.mesh, devices), config.sharding, config.context, tables)
    choices = _choices(config, rules) if trains else ()
    return RunSession(config, rules, attention, choices, trains)


def _choices(config: Configuration, rules: Rules) -> tuple[str, ...]:
    rows = config.train.global_batch // config.train.microbatches // rules.size(rules.batch)
    with use(rules):
        choose = program_of(config.model).choices
        chosen = choose(config.model, DTYPES[config.train.precision], rows, config.data.sequence_length)
        sums = _weight_sums(config)
        return chosen if sums.implementation is None else (*chosen, sums.reason)


def placed(abstract: PyTree, mesh: Mesh) -> PyTree:
    """The abstract arrays with their shardings on the mesh's devices, where arrays can be restored to."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract)


def make_trainer(
    config: Configuration, attention: Mapping[str, Backend[Implementation]] | None = None, *, trains: bool = True
) -> Trainer:
    """The trainer of a resolved configuration, inside `sharding.use(rules)`; `trains` as `make_session`'s.

    `attention` has the backends (none: selected by the model for short sequences).
    """
    num_stages, dtype = current().parts("pipe"), DTYPES[config.train.precision]
    stages = config.stage_plan(num_stages, None if trains else num_stages)
    parts = make_parts(config.model, dtype, stages, attention, config.train.lora)
    return Trainer(
        program=program_of(config.model),
        parts=replace(parts, blueprint=freeze(parts.blueprint, config.train.trainable, dtype)),
        stages=stages,
        config=config.train,
        optimizer=config.optimizer,
        schedule=partial(config.schedule, num_stages),
        seed=config.seed,
        weight_sums=_weight_sums(config).implementation if trains else None,
    )


def _weight_sums(config: Configuration) -> Backend[WeightSums | None]:
    """For the tokens that a device multiplies at once: of a microbatch, or of a half of it."""
    rows = max(1, config.train.global_batch // config.train.microbatches // current().size(current().batch))
    length = config.data.sequence_length // current().parts("context")
    tokens = rows * length // (1 if split_of_size(rows, length) is None else 2)
    dtype, device_kind = DTYPES[config.train.precision], current().device_kind
    return select_backend(config.train.gradient_sums, tokens, dtype, device_kind)
