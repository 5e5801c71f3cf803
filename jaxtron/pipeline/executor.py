"""Runs any schedule's table: each stage its own work of a tick, messages to its neighbours beside it.

A tick has three slots: a forward, a backward, a weight gradient. What a forward sends travels while the backward runs,
and what a backward sends while the next tick's forward does. One stage with its microbatches in order is gradient
accumulation: the same loop, with nothing to send and nothing kept from tick to tick but the sums.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxtron.pipeline.layer_loop import Buffer, LayerFunction, LayerLoop, read, write
from jaxtron.pipeline.lowering import Channel, IntTable, Pairs, Program, Segment, Slots, lower, segments
from jaxtron.pipeline.partition import Partition
from jaxtron.pipeline.schedules.schedule import Schedule
from jaxtron.sharding.collectives import permute, vary, zeros_like_type
from jaxtron.typing import Array, PyTree

PIPE = "pipe"
# how operations of backwards are named in compiled programs, where autodiff's own names may be lost
BACKWARD = "backward"


@dataclass(frozen=True)
class Model:
    """A model in the pieces that stages run; a microbatch is a pytree of its arrays."""

    embed: Callable[[PyTree, PyTree], Array]
    """(ends, microbatch) -> the first layer's input."""
    shared: Callable[[PyTree], PyTree]
    """microbatch -> what all layers read beside their input."""
    layer: LayerFunction
    head: Callable[[PyTree, Array, PyTree], tuple[Array, PyTree]]
    """(ends, the last layer's output, microbatch) -> (loss to differentiate, sums to report)."""
    unroll: int = 1
    """Layers unrolled in each iteration of the loop over them."""


@partial(jax.tree_util.register_dataclass, data_fields=("layers", "ends"), meta_fields=())
@dataclass(frozen=True)
class Parameters:
    """A stage's layers along a leading axis, as `Partition` orders them, and every stage's embedding and head."""

    layers: PyTree
    ends: PyTree


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("activations", "gradients", "residuals", "pairs", "sent", "sums", "reports"),
    meta_fields=(),
)
@dataclass(frozen=True)
class State:
    """What a stage holds between ticks. A field is empty where the schedule has no use for it."""

    activations: Array
    """Inputs of forwards to come, by slot; the last slot is for what nobody reads."""
    gradients: Array
    """Cotangents for backwards to come, likewise."""
    residuals: Buffer
    """What forwards leave for backwards, by slot and layer."""
    pairs: Buffer
    """What backwards leave for weight gradients, likewise."""
    sent: Array | None
    """The gradient that the last tick's backward sends."""
    sums: Parameters
    """Float32 gradients so far; empty where there are none to come."""
    reports: PyTree


def run(
    schedule: Schedule, partition: Partition, model: Model, params: Parameters, batch: PyTree
) -> tuple[Parameters | None, PyTree]:
    """Float32 gradients of the loss summed over all microbatches, and the summed reports.

    `batch` leaves have leading axes [microbatch, row] and are the same on every stage. Called inside the manual region
    with varying parameters: nothing is reduced over the batch axes but what gathering weights at use asks for.
    Gradients of layers are this stage's own; those of the ends, and reports, are yet to be summed over `pipe`. A table
    without backwards has no gradients (None).
    """
    program = lower(schedule)
    executor = _Executor(program, partition, model, params, batch)
    state = executor.initial()
    for segment in segments(program):
        state = executor.loop_over(segment, state)
    return state.sums if executor.trains else None, state.reports


def buffers(schedule: Schedule, partition: Partition, model: Model, params: Parameters, batch: PyTree) -> State:
    """What `run` holds from its first tick to its last, still empty, for its sizes; called where `run` is."""
    return _Executor(lower(schedule), partition, model, params, batch).initial()


class _Executor:
    """One stage's program, traced once for all stages."""

    def __init__(self, program: Program, partition: Partition, model: Model, params: Parameters, batch: PyTree) -> None:
        self.program = program
        self.partition = partition
        self.model = model
        self.params = params
        self.batch = batch
        self.num_stages = program.schedule.num_stages
        self.trains = program.num_residuals > 0
        self.stage = jax.lax.axis_index(PIPE) if self.num_stages > 1 else 0
        numbers = np.maximum(np.asarray(partition.rows, np.int32), 0).reshape(self.num_stages, -1)
        self.loop = LayerLoop(model.layer, params.layers, jnp.asarray(numbers)[self.stage], model.unroll)
        lengths = np.asarray(partition.chunk_lengths, np.int32)
        self.lengths = tuple(sorted(set(lengths.reshape(-1).tolist())))
        self.x = jax.eval_shape(model.embed, params.ends, jax.tree.map(lambda leaf: leaf[0], batch))
        self.length_index = jnp.asarray(np.searchsorted(self.lengths, lengths))[self.stage]

    def loop_over(self, segment: Segment, state: State) -> State:
        """The segment's ticks."""
        length = segment.stop - segment.start
        iterations = -(-length // segment.period)
        rows = self._rows(segment, iterations * segment.period)
        here = jax.tree.map(lambda table: jnp.asarray(table)[:, self.stage].reshape(iterations, segment.period), rows)

        def iterate(state: State, rows: PyTree) -> tuple[State, None]:
            for phase in range(segment.period):
                state = self.tick(state, jax.tree.map(lambda row, phase=phase: row[phase], rows), segment, phase)
            return state, None

        if iterations == 1:
            return iterate(state, jax.tree.map(lambda row: row[0], here))[0]
        return jax.lax.scan(iterate, state, here)[0]

    def _rows(self, segment: Segment, length: int) -> PyTree:
        """The segment's part of the tables, idle ticks at its end to make whole iterations."""
        program = self.program
        missing = length - (segment.stop - segment.start)

        def part(table: np.ndarray, idle: int) -> np.ndarray:
            return np.pad(table[segment.start : segment.stop], ((0, missing), (0, 0)), constant_values=idle)

        works = (program.forward, program.backward, program.weight)
        return (
            tuple(jax.tree.map(lambda table: part(table, 0), slots) for slots in works),
            tuple(part(channel.slots, program.num_activations) for channel in program.activations),
            tuple(part(channel.slots, program.num_gradients) for channel in program.gradients),
        )

    def initial(self) -> State:
        """Empty buffers and zero sums."""
        program, model = self.program, self.model
        first = jax.tree.map(lambda leaf: leaf[0], self.batch)
        x = self.x
        shared = jax.eval_shape(model.shared, first)
        reports = jax.eval_shape(
            lambda ends, x, microbatch: model.head(ends, x, microbatch)[1], self.params.ends, x, first
        )
        residuals, pairs = self._buffers(shared)
        sums = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), self.params)
        return State(
            activations=zeros_like_type(x, (program.num_activations + 1 if program.activations else 0,)),
            gradients=zeros_like_type(x, (program.num_gradients + 1 if self.trains else 0,)),
            residuals=residuals,
            pairs=pairs,
            sent=zeros_like_type(x, ()) if program.gradients else None,
            sums=sums if self.trains else Parameters({}, {}),
            reports=jax.tree.map(lambda leaf: zeros_like_type(leaf, ()), reports),
        )

    def _buffers(self, shared: PyTree) -> tuple[Buffer, Buffer]:
        """For residuals and for pairs; empty where nothing is to be kept."""
        program, rows = self.program, self.partition.chunk_rows
        if not self.trains:
            return [], []
        residuals = self.loop.buffer(self.x, shared, program.num_residuals, rows)
        if not program.num_pairs:
            return residuals, []
        return residuals, self.loop.pairs(self.x, shared, residuals, program.num_pairs, rows)

    def tick(self, state: State, row: PyTree, segment: Segment, phase: int) -> State:
        """One row of the table, in a segment's loop."""
        (forward, backward, weight), arrivals, gradient_arrivals = row
        program = self.program
        messages = self._travel(program.gradients, segment.gradients[phase], state.sent)
        y = cotangent = None
        if self._has_any(program.forward, segment, phase):
            state, y = self._run(self._forward, program.forward, forward, state)
        for message, slot in zip(messages, gradient_arrivals, strict=True):
            state = replace(state, gradients=_receive(state.gradients, message, slot))
        messages = self._travel(program.activations, segment.activations[phase], y)
        if self._has_any(program.backward, segment, phase):
            state, cotangent = self._run(self._backward, program.backward, backward, state)
        if program.gradients:
            state = replace(state, sent=zeros_like_type(self.x, ()) if cotangent is None else cotangent)
        if self._has_any(program.weight, segment, phase):
            state, _ = self._run(self._weight, program.weight, weight, state)
        for message, slot in zip(messages, arrivals, strict=True):
            state = replace(state, activations=_receive(state.activations, message, slot))
        return state

    def _has_any(self, table: Slots[IntTable], segment: Segment, phase: int) -> bool:
        return bool(table.active[segment.start + phase : segment.stop : segment.period].any())

    def _microbatch(self, slots: Slots[Array]) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[slots.microbatch], self.batch)

    def _run(self, work: Callable, table: Slots[IntTable], slots: Slots[Array], state: State) -> tuple[State, Array]:
        """`work` if this tick has any; without a branch where every tick of every stage has."""
        if table.active.all():
            return work(state, slots)
        return jax.lax.cond(slots.active, work, lambda state, _: (state, zeros_like_type(self.x, ())), state, slots)

    def _forward(self, state: State, slots: Slots[Array]) -> tuple[State, Array]:
        """Embedding on the first virtual stage, layers, head and loss with their gradient on the last."""
        microbatch = self._microbatch(slots)
        shared = self.model.shared(microbatch)

        def embed(state: State) -> Array:
            return self.model.embed(self.params.ends, microbatch)

        def received(state: State) -> Array:
            return read(state.activations, (slots.activation,))

        x = self._branch(slots.is_first, embed, received, state)
        first = slots.chunk * self.partition.chunk_rows
        if self.trains:
            y, residuals = self._by_length(
                slots,
                lambda length: self.loop.forward(x, shared, first, length, state.residuals, slots.residual),
            )
            state = replace(state, residuals=residuals)
        else:
            y = self._by_length(slots, lambda length: self.loop.evaluate(x, shared, first, length))
        head = partial(self._head, y=y, microbatch=microbatch, slot=slots.gradient)
        return self._branch(slots.is_last, head, lambda state: state, state), y

    def _head(self, state: State, *, y: Array, microbatch: PyTree, slot: Array) -> State:
        """Loss and, when training, its gradient at once, left where the backward finds it."""
        if not self.trains:
            reports = self.model.head(self.params.ends, y, microbatch)[1]
            return replace(state, reports=_add(state.reports, reports))
        differentiate = jax.value_and_grad(self.model.head, argnums=(0, 1), has_aux=True)
        (_, reports), (ends, cotangent) = differentiate(self.params.ends, y, microbatch)
        return replace(
            state,
            reports=_add(state.reports, reports),
            sums=replace(state.sums, ends=self._add_to_ends(state.sums.ends, ends)),
            gradients=write(state.gradients, cotangent, (slot,)),
        )

    @jax.named_scope(BACKWARD)
    def _backward(self, state: State, slots: Slots[Array]) -> tuple[State, Array]:
        """Layers in reverse, then the embedding on the first virtual stage."""
        microbatch = self._microbatch(slots)
        shared = self.model.shared(microbatch)
        cotangent = read(state.gradients, (slots.gradient,))
        first = slots.chunk * self.partition.chunk_rows

        place = (cotangent, shared, first)
        if self.program.num_pairs:
            cotangent, layers, pairs = self._by_length(
                slots,
                lambda length: self.loop.backward_inputs(
                    *place, length, state.residuals, slots.residual, state.sums.layers, state.pairs, slots.pair
                ),
            )
            state = replace(state, sums=replace(state.sums, layers=layers), pairs=pairs)
        else:
            cotangent, layers = self._by_length(
                slots,
                lambda length: self.loop.backward(*place, length, state.residuals, slots.residual, state.sums.layers),
            )
            state = replace(state, sums=replace(state.sums, layers=layers))

        def embed(state: State) -> State:
            pull = jax.vjp(lambda ends: self.model.embed(ends, microbatch), self.params.ends)[1]
            return replace(state, sums=replace(state.sums, ends=self._add_to_ends(state.sums.ends, pull(cotangent)[0])))

        return self._branch(slots.is_first, embed, lambda state: state, state), cotangent

    @jax.named_scope(BACKWARD)
    def _weight(self, state: State, slots: Slots[Array]) -> tuple[State, Array]:
        """The layers' weight gradients that a backward put off."""
        shared = self.model.shared(self._microbatch(slots))
        first = slots.chunk * self.partition.chunk_rows

        def run(length: int) -> PyTree:
            return self.loop.weight_gradients(shared, first, length, state.pairs, slots.pair, state.sums.layers)

        sums = replace(state.sums, layers=self._by_length(slots, run))
        return replace(state, sums=sums), zeros_like_type(self.x, ())

    def _add_to_ends(self, sums: PyTree, parts: PyTree) -> PyTree:
        return (_add if self.program.schedule.num_virtual == 1 else _add_in_branch)(sums, parts)

    def _branch(self, condition: Array, yes: Callable, no: Callable, state: State) -> PyTree:
        """One of two functions of the state; the first at once where there is one virtual stage."""
        return yes(state) if self.program.schedule.num_virtual == 1 else jax.lax.cond(condition, yes, no, state)

    def _by_length(self, slots: Slots[Array], run: Callable[[int], PyTree]) -> PyTree:
        """`run(length)` with the number of layers of this chunk, which is static in each branch."""
        if len(self.lengths) == 1:
            return run(self.lengths[0])
        branches = [partial(lambda length, _: run(length), length) for length in self.lengths]
        return jax.lax.switch(self.length_index[slots.chunk], branches, None)

    def _travel(
        self, channels: tuple[Channel, ...], pairs: tuple[Pairs, ...], message: Array | None
    ) -> list[Array | None]:
        """What arrives on each channel; None where nothing is sent at this tick of the loop."""
        if message is None:
            return [None] * len(channels)
        return [
            message if not channel.pairs else permute(message, PIPE, now) if now else None
            for channel, now in zip(channels, pairs, strict=True)
        ]


def _receive(buffer: Array, message: Array | None, slot: Array) -> Array:
    return buffer if message is None else write(buffer, message, (slot,))


def _add(sums: PyTree, parts: PyTree) -> PyTree:
    return jax.tree.map(lambda total, part: total + vary(part).astype(total.dtype), sums, parts)


def _add_in_branch(sums: PyTree, parts: PyTree) -> PyTree:
    """As `_add` for sums that other branches pass on as they are.

    A plain sum is another array to XLA, so that every tick without one copied the embedding's; what a loop writes into
    stays where it is.
    """

    def add(total: Array, part: Array) -> Array:
        part = vary(part).astype(total.dtype)
        if total.ndim < 2 or total.shape[-1] % 2:
            return total + part
        size = total.shape[-1] // 2

        def add_half(half: Array, total: Array) -> Array:
            axis, start = total.ndim - 1, half * size
            old, new = (jax.lax.dynamic_slice_in_dim(array, start, size, axis) for array in (total, part))
            return jax.lax.dynamic_update_slice_in_dim(total, old + new, start, axis)

        return jax.lax.fori_loop(0, 2, add_half, total)

    return jax.tree.map(add, sums, parts)
