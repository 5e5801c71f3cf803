"""Runs any schedule's table: each stage its own work of a tick, messages to its neighbours beside it.

A tick has three slots: a forward, a backward, a weight gradient. What a forward sends travels while the backward runs,
and what a backward sends while the next tick's forward does. One stage with its microbatches in order is gradient
accumulation: the same loop, with nothing to send and nothing kept from tick to tick but the sums.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtron.kernels.weight_sums.spec import WeightSums
from jaxtron.pipeline import buffers
from jaxtron.pipeline.layer_loop import ChunkWork, LayerLoop, Remembering, StackBuffers
from jaxtron.pipeline.lowering import Channel, IntTable, Routes, WorkTable, lower
from jaxtron.pipeline.mixed_loop import stack_loop
from jaxtron.pipeline.model import Microbatch, Model, Parameters, Stream, merge
from jaxtron.pipeline.names import BACKWARD, PAIRED, WEIGHT
from jaxtron.pipeline.partition import StagePlan
from jaxtron.pipeline.schedules.schedule import Schedule
from jaxtron.pipeline.tick_loops import TickLoop, tick_loops
from jaxtron.sharding.collectives import permute
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float, PyTree

# of a kind of work what may be the same at every tick: where it reads and writes, and what it chooses by
BUFFERS = ("chunk", "input", "cotangent", "residual", "deferred")
BRANCHES = ("enters", "is_last")


class Result(NamedTuple):
    """What a step's microbatches sum to on this device."""

    gradients: Parameters | None
    """Float32, like the trained parameters; None from a table without backwards."""
    sums: dict[str, Float[Array, "..."]]
    """The head's."""
    layer_metrics: tuple[PyTree, ...]
    """By stack, each array [layer slot, ...]: `layer_slots.restore` puts them in the model's order."""
    memory: tuple[PyTree, ...] = ()
    """By stack, as it was given, with what was added."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("inputs", "cotangents", "sent", "stacks", "outer_accumulators", "sums"),
    meta_fields=(),
)
@dataclass(frozen=True)
class ExecutorState:
    """What a stage holds between ticks. A field is empty where the schedule has no use for it."""

    inputs: Stream
    """Inputs of forwards to come, by slot; the last slot is for what nobody reads."""
    cotangents: Stream
    """Cotangents for backwards to come, likewise."""
    sent: Stream | None
    """The cotangent that the last tick's backward sends."""
    stacks: tuple[StackBuffers, ...]
    outer_accumulators: PyTree
    """Float32 gradients so far of the trained parameters outside of stacks."""
    sums: dict[str, Float[Array, "..."]]
    """The head's so far."""


def run(
    schedule: Schedule,
    stages: StagePlan,
    model: Model,
    params: Parameters,
    batch: PyTree,
    frozen: Parameters | None = None,
    weight_sums: WeightSums | None = None,
    memory: tuple[PyTree, ...] = (),
) -> Result:
    """Float32 gradients of the head's and the layers' losses summed over all microbatches, and what these report.

    `batch` leaves have leading axes [microbatch, row] and are the same on every stage. `frozen` is like `params` with
    None where that has a leaf, and the other way round (None: all are trained). `weight_sums` adds gradients of
    weights as it multiplies (none: XLA does, once they are made). `memory` has by stack what its layers remember of
    sequences that go on, arrays [microbatch, layer of the stage, ...], in a forward-only schedule of one chunk:
    layers get `layer_loop.Remembering` (empty: they remember nothing). Called inside the manual region with varying
    parameters: nothing is reduced over the batch axes but what gathering weights at use asks for. Gradients and
    metrics of layers are this stage's own; outer gradients, and sums, are yet to be summed over `pipe`.
    """
    executor = _Executor(schedule, stages, model, params, batch, frozen, weight_sums, memory)
    state = executor.initial()
    for ticks in tick_loops(executor.lowered):
        state = executor.loop_over(ticks, state)
    gradients = None
    if executor.trains:
        gradients = Parameters(tuple(held.grad_accumulators for held in state.stacks), state.outer_accumulators)
    of_stacks = (tuple(getattr(held, name) for held in state.stacks) for name in ("metrics", "memory"))
    return Result(gradients, state.sums, *of_stacks)


def initial_state(
    schedule: Schedule,
    stages: StagePlan,
    model: Model,
    params: Parameters,
    batch: PyTree,
    frozen: Parameters | None = None,
) -> ExecutorState:
    """What `run` holds from its first tick to its last, still empty, for its sizes; called where `run` is."""
    return _Executor(schedule, stages, model, params, batch, frozen).initial()


class _Executor:
    """One stage's program, traced once for all stages."""

    def __init__(
        self,
        schedule: Schedule,
        stages: StagePlan,
        model: Model,
        params: Parameters,
        batch: PyTree,
        frozen: Parameters | None,
        weight_sums: WeightSums | None = None,
        memory: tuple[PyTree, ...] = (),
    ) -> None:
        assert schedule.num_chunks == stages.num_chunks and len(model.stacks) == len(stages.partitions)
        self.lowered = lower(schedule, stages.stack_chunks)
        self.stages = stages
        self.model = model
        self.outer = params.outer
        self.frozen_outer = None if frozen is None else frozen.outer
        self.batch = batch
        self.memory = memory or ((),) * len(model.stacks)
        self.num_stages = schedule.num_stages
        self.works = self.lowered.alone
        self.trains = any(self.lowered.num_residuals)
        self.stage = jax.lax.axis_index(current().axes("pipe")) if self.num_stages > 1 else 0
        self.loops = tuple(
            stack_loop(
                stack,
                stages.partitions[index],
                params.stacks[index],
                None if frozen is None else frozen.stacks[index],
                self.stage,
                weight_sums,
            )
            for index, stack in enumerate(model.stacks)
        )
        self.stream = jax.eval_shape(partial(self._enter, 0), self.outer, None, self._first_microbatch())
        self.prepared = self._prepare()
        self.variants, self.variant_numbers = self._chunk_variants()
        self.variant_number = jnp.asarray(self.variant_numbers)[self.stage]

    def _first_microbatch(self) -> Microbatch:
        return jax.tree.map(lambda leaf: leaf[0], self.batch)

    def _prepare(self) -> tuple[Any, ...]:
        """Every stack's layer, or each kind of them, traced once."""
        found = []
        for stack, loop, memory in zip(self.model.stacks, self.loops, self.memory, strict=True):
            shared = jax.eval_shape(stack.shared, self._first_microbatch())
            if jax.tree.leaves(memory):
                shared = Remembering(shared, jax.eval_shape(lambda memory: buffers.read(memory, 0, 0), memory))
            splits = self.lowered.schedule.split
            found.append(loop.prepare(self.stream, shared, trains=self.trains, splits=splits))
        return tuple(found)

    def loop_over(self, ticks: TickLoop, state: ExecutorState) -> ExecutorState:
        """The ticks of one loop."""
        iterations = ticks.num_iterations
        rows = self._rows(ticks)
        works, paired, *_ = rows
        known = [self._known(works, paired, phase, ticks.period) for phase in range(ticks.period)]
        here = jax.tree.map(lambda table: jnp.asarray(table)[:, self.stage].reshape(iterations, ticks.period), rows)

        def iterate(state: ExecutorState, rows: PyTree) -> tuple[ExecutorState, None]:
            for phase in range(ticks.period):
                works, *arrivals = jax.tree.map(lambda row, phase=phase: row[phase], rows)
                works = tuple(replace(work, **found) for work, found in zip(works, known[phase], strict=True))
                state = self.tick(state, (works, *arrivals), ticks, phase)
            return state, None

        if iterations == 1:
            return iterate(state, jax.tree.map(lambda row: row[0], here))[0]
        return jax.lax.scan(iterate, state, here)[0]

    def _rows(self, ticks: TickLoop) -> PyTree:
        """The loop's part of the tables, idle ticks at its end to make whole iterations."""
        lowered = self.lowered
        missing = ticks.num_iterations * ticks.period - (ticks.stop - ticks.start)

        def part(table: np.ndarray, idle: int) -> np.ndarray:
            return np.pad(table[ticks.start : ticks.stop], ((0, missing), (0, 0)), constant_values=idle)

        return (
            tuple(jax.tree.map(lambda table: part(table, 0), work) for work in self.works),
            part(lowered.paired, 0),
            tuple(part(channel.slots, lowered.num_inputs) for channel in lowered.inputs),
            tuple(part(channel.slots, lowered.num_cotangents) for channel in lowered.cotangents),
        )

    def _known(
        self, works: tuple[WorkTable[IntTable], ...], paired: IntTable, phase: int, period: int
    ) -> list[dict[str, int]]:
        """Of each kind of work, what is the same on every stage whenever there is any at this tick of the iterations.

        Then XLA knows where in a buffer is read and written. On one stage no branch is needed either; on several all
        work is in one, for XLA copies buffers where some ticks have a branch and some have none.
        """
        names = BUFFERS if self.num_stages > 1 else (*BUFFERS, *BRANCHES)
        names = (*names, "microbatch") if jax.tree.leaves(self.memory) else names
        found = []
        for work in works:
            alone = work.active[phase::period] > 0
            runs = alone | (paired[phase::period] > 0)
            columns = {name: getattr(work, name)[phase::period][runs] for name in names}
            if self.num_stages == 1:
                columns["active"] = alone
            values = {name: set(map(int, column.flat)) for name, column in columns.items()}
            found.append({name: min(column) for name, column in values.items() if len(column) == 1})
        return found

    def initial(self) -> ExecutorState:
        """Empty buffers and zero sums."""
        lowered = self.lowered
        head = jax.eval_shape(self._run_head, self.outer, self.stream, self._first_microbatch())[1]
        stacks = tuple(
            loop.buffers(
                prepared, lowered.num_residuals[stack], lowered.num_deferred[stack], partition.slots_per_chunk
            )._replace(memory=self.memory[stack])
            for stack, (loop, prepared, partition) in enumerate(
                zip(self.loops, self.prepared, self.stages.partitions, strict=True)
            )
        )
        accumulators = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), self.outer)
        return ExecutorState(
            inputs=buffers.zeros(self.stream, lowered.num_inputs + 1 if lowered.inputs else 0),
            cotangents=buffers.zeros(self.stream, lowered.num_cotangents + 1 if self.trains else 0),
            sent=buffers.zeros(self.stream) if lowered.cotangents else None,
            stacks=stacks,
            outer_accumulators=accumulators if self.trains else (),
            sums=buffers.zeros(head),
        )

    def tick(self, state: ExecutorState, rows: PyTree, ticks: TickLoop, phase: int) -> ExecutorState:
        """One tick: a row of each table, at this phase of the loop's iterations."""
        (forward, backward, weight), paired, arrivals, cotangent_arrivals = rows
        lowered, (forwards, backwards, weights) = self.lowered, self.works
        messages = self._travel(lowered.cotangents, ticks.cotangents[phase], state.sent)
        y = cotangent = None
        if self._has_any(forwards.active, ticks, phase):
            state, y = self._run(self._forward, forwards, forward, state)
        for message, slot in zip(messages, cotangent_arrivals, strict=True):
            state = replace(state, cotangents=_receive(state.cotangents, message, slot))
        # beside the branches of what runs alone: XLA copies what a branch inside another passes on
        if self._has_any(lowered.paired, ticks, phase):
            state, y, cotangent = self._pair(paired, forward, backward, state, y)
        messages = self._travel(lowered.inputs, ticks.inputs[phase], y)
        if self._has_any(backwards.active, ticks, phase):
            state, alone = self._run(self._backward, backwards, backward, state)
            cotangent = _either(backward.active, alone, cotangent)
        if lowered.cotangents:
            state = replace(state, sent=buffers.zeros(self.stream) if cotangent is None else cotangent)
        if self._has_any(weights.active, ticks, phase):
            state, _ = self._run(self._weight, weights, weight, state)
            # read before the next tick's backward writes there, which needs no copy then
            state = replace(state, stacks=jax.lax.optimization_barrier(state.stacks))
        for message, slot in zip(messages, arrivals, strict=True):
            state = replace(state, inputs=_receive(state.inputs, message, slot))
        return state

    def _has_any(self, table: IntTable, ticks: TickLoop, phase: int) -> bool:
        return bool(table[ticks.start + phase : ticks.stop : ticks.period].any())

    def _microbatch(self, row: WorkTable[Array]) -> Microbatch:
        return jax.tree.map(lambda leaf: leaf[row.microbatch], self.batch)

    def _shared(self, microbatch: Microbatch) -> tuple[PyTree, ...]:
        return tuple(stack.shared(microbatch) for stack in self.model.stacks)

    def _run(
        self, work: Callable, table: WorkTable[IntTable], row: WorkTable[Array], state: ExecutorState
    ) -> tuple[ExecutorState, Stream]:
        """`work` if this tick has any; without a branch where every tick of every stage has."""
        if table.active.all() or (isinstance(row.active, int) and row.active > 0):
            return work(state, row)

        def nothing(state: ExecutorState) -> tuple[ExecutorState, Stream]:
            return state, buffers.zeros(self.stream)

        return jax.lax.cond(row.active, lambda state: work(state, row), nothing, state)

    def _pair(
        self,
        paired: Array,
        forward: WorkTable[Array],
        backward: WorkTable[Array],
        state: ExecutorState,
        y: Stream | None,
    ) -> tuple[ExecutorState, Stream, Stream]:
        """A forward and a backward together, if there are two, and what they send; `y` is what a forward alone does."""

        @jax.named_scope(PAIRED)
        def together(state: ExecutorState, _: Stream) -> tuple[ExecutorState, Stream, Stream]:
            ahead, back = self._microbatch(forward), self._microbatch(backward)
            ((stack, length),) = self.variants
            slots = self.stages.partitions[stack].slots_per_chunk
            works = (
                ChunkWork(forward.chunk * slots, length, forward.residual, forward.deferred),
                ChunkWork(backward.chunk * slots, length, backward.residual, backward.deferred),
            )
            streams = (self._entered(state, forward, ahead), buffers.read(state.cotangents, backward.cotangent))
            shared = (self._shared(ahead)[stack], self._shared(back)[stack])
            loop = self.loops[stack]
            assert isinstance(loop, LayerLoop), "layers that go together are alike"
            y, entered, held = loop.both(self.prepared[stack], works, streams, shared, state.stacks[stack])
            state = self._scored(replace(state, stacks=_put(state.stacks, stack, held)), forward, ahead, y)
            state, cotangent = self._back_from(state, backward, back, entered)
            return state, y, cotangent

        def nothing(state: ExecutorState, y: Stream) -> tuple[ExecutorState, Stream, Stream]:
            return state, y, buffers.zeros(self.stream)

        y = buffers.zeros(self.stream) if y is None else y
        return jax.lax.cond(paired, together, nothing, state, y)

    def _forward(self, state: ExecutorState, row: WorkTable[Array]) -> tuple[ExecutorState, Stream]:
        """What enters the chunk, its layers, and on the last virtual stage head and loss with their gradient."""
        microbatch = self._microbatch(row)
        shared, entered = self._shared(microbatch), self._entered(state, row, microbatch)

        def layers(stack: int, work: ChunkWork) -> tuple[Stream, tuple[StackBuffers, ...]]:
            loop, held = self.loops[stack], state.stacks[stack]
            if self.trains:
                y, held = loop.forward(self.prepared[stack], work, entered, shared[stack], held)
            else:
                y, held = loop.evaluate(work, entered, shared[stack], held)
            return y, _put(state.stacks, stack, held)

        y, stacks = self._by_chunk(row, layers)
        return self._scored(replace(state, stacks=stacks), row, microbatch, y), y

    def _entered(self, state: ExecutorState, row: WorkTable[Array], microbatch: Microbatch) -> Stream:
        """What enters the chunk."""

        def enter(stack: int, state: ExecutorState) -> Stream:
            received = None if stack == 0 else buffers.read(state.inputs, row.input)
            return received if stack < 0 else self._enter(stack, self.outer, received, microbatch)

        return self._by_enters(row, enter, state)

    def _scored(self, state: ExecutorState, row: WorkTable[Array], microbatch: Microbatch, y: Stream) -> ExecutorState:
        """With head and loss on the last virtual stage."""
        head = partial(self._head, y=y, microbatch=microbatch, slot=row.cotangent)
        if isinstance(row.is_last, int):
            return head(state) if row.is_last else state
        return jax.lax.cond(row.is_last, head, lambda state: state, state)

    def _head(self, state: ExecutorState, *, y: Stream, microbatch: Microbatch, slot: Array | int) -> ExecutorState:
        """Loss and, when training, its gradient at once, left where the backward finds it."""
        if not self.trains:
            return replace(state, sums=buffers.add(state.sums, self._run_head(self.outer, y, microbatch)[1]))
        differentiate = jax.value_and_grad(self._run_head, argnums=(0, 1), has_aux=True)
        (_, sums), (outer, cotangent) = differentiate(self.outer, y, microbatch)
        return replace(
            state,
            sums=buffers.add(state.sums, sums),
            outer_accumulators=self._add_to_outer(state.outer_accumulators, outer),
            cotangents=buffers.write(state.cotangents, cotangent, slot),
        )

    @jax.named_scope(BACKWARD)
    def _backward(self, state: ExecutorState, row: WorkTable[Array]) -> tuple[ExecutorState, Stream]:
        """Layers in reverse, then what entered the chunk."""
        microbatch = self._microbatch(row)
        shared = self._shared(microbatch)
        cotangent = buffers.read(state.cotangents, row.cotangent)

        def layers(stack: int, work: ChunkWork) -> tuple[Stream, tuple[StackBuffers, ...]]:
            arguments = (work, cotangent, shared[stack], state.stacks[stack])
            entered, held = self.loops[stack].backward(self.prepared[stack], *arguments)
            return entered, _put(state.stacks, stack, held)

        entered, stacks = self._by_chunk(row, layers)
        return self._back_from(replace(state, stacks=stacks), row, microbatch, entered)

    def _back_from(
        self, state: ExecutorState, row: WorkTable[Array], microbatch: Microbatch, entered: Stream
    ) -> tuple[ExecutorState, Stream]:
        """From the cotangent of the chunk's first layer to that of what entered it."""

        def enter(stack: int, accumulators: PyTree) -> tuple[PyTree, Stream]:
            if stack < 0:
                return accumulators, entered
            received = None if stack == 0 else buffers.read(state.inputs, row.input)
            pull = jax.vjp(partial(self._enter, stack, microbatch=microbatch), self.outer, received)[1]
            outer, before = pull(entered)
            # nothing is before the first stack; what it sends nobody reads
            return self._add_to_outer(accumulators, outer), entered if stack == 0 else before

        accumulators, cotangent = self._by_enters(row, enter, state.outer_accumulators)
        return replace(state, outer_accumulators=accumulators), cotangent

    @jax.named_scope(f"{BACKWARD}/{WEIGHT}")
    def _weight(self, state: ExecutorState, row: WorkTable[Array]) -> tuple[ExecutorState, Stream]:
        """The layers' weight gradients that a backward put off."""
        shared = self._shared(self._microbatch(row))

        def layers(stack: int, work: ChunkWork) -> tuple[StackBuffers, ...]:
            loop, held = self.loops[stack], state.stacks[stack]
            return _put(state.stacks, stack, loop.weight_grads(self.prepared[stack], work, shared[stack], held))

        return replace(state, stacks=self._by_chunk(row, layers)), buffers.zeros(self.stream)

    def _enter(self, stack: int, outer: PyTree, received: Stream | None, microbatch: Microbatch) -> Stream:
        return self.model.stacks[stack].enter(merge(outer, self.frozen_outer), received, microbatch)

    def _run_head(
        self, outer: PyTree, y: Stream, microbatch: Microbatch
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "..."]]]:
        loss, sums = self.model.head(merge(outer, self.frozen_outer), y, microbatch)
        return loss, sums

    def _add_to_outer(self, totals: PyTree, parts: PyTree) -> PyTree:
        return (buffers.add if self.num_stages == 1 else buffers.add_in_branch)(totals, parts)

    def _by_enters(self, row: WorkTable[Array], run: Callable[[int, PyTree], PyTree], operand: PyTree) -> PyTree:
        """`run(stack, operand)` with the stack that begins with this chunk, or -1, which is static in each branch."""
        if isinstance(row.enters, int):
            return run(row.enters, operand)
        # XLA copies what a branch chosen by number passes on, and not what one of two does
        others = [partial(run, stack) for stack in range(1, len(self.loops))]

        def first_or_none(operand: PyTree) -> PyTree:
            return jax.lax.cond(row.enters == 0, partial(run, 0), partial(run, -1), operand)

        if not others:
            return first_or_none(operand)
        return jax.lax.switch(jax.lax.max(row.enters, 0), [first_or_none, *others], operand)

    def _by_chunk(self, row: WorkTable[Array], run: Callable[[int, ChunkWork], PyTree]) -> PyTree:
        """`run(stack, work)` of this chunk, whose stack and number of layers are static in each branch."""

        def run_variant(variant: tuple[int, int]) -> PyTree:
            stack, length = variant
            partition = self.stages.partitions[stack]
            chunk = row.chunk - partition.first_chunk if partition.first_chunk else row.chunk
            first = chunk * partition.slots_per_chunk
            return run(stack, ChunkWork(first, length, row.residual, row.deferred, row.microbatch))

        if len(self.variants) == 1:
            return run_variant(self.variants[0])
        if isinstance(row.chunk, int) and len({*(numbers := self.variant_numbers[:, row.chunk])}) == 1:
            return run_variant(self.variants[numbers[0]])
        branches = [partial(lambda variant, _: run_variant(variant), variant) for variant in self.variants]
        return jax.lax.switch(self.variant_number[row.chunk], branches, None)

    def _chunk_variants(self) -> tuple[list[tuple[int, int]], np.ndarray]:
        """The pairs (stack, layers of a chunk) there are, and by [stage, chunk] which it is."""
        plan = self.stages
        chunks = [
            [
                (stack, partition.chunk_lengths[stage][chunk])
                for stack, partition in enumerate(plan.partitions)
                for chunk in range(partition.num_chunks)
            ]
            for stage in range(self.num_stages)
        ]
        variants = sorted({variant for row in chunks for variant in row})
        return variants, np.asarray([[variants.index(variant) for variant in row] for row in chunks], np.int32)

    def _travel(
        self, channels: tuple[Channel, ...], routes: tuple[Routes, ...], message: Stream | None
    ) -> list[Stream | None]:
        """What arrives on each channel; None where nothing is sent at this tick of the loop."""
        if message is None:
            return [None] * len(channels)

        def send(channel: Channel, now: Routes) -> Stream | None:
            if not channel.routes:
                return message
            return jax.tree.map(lambda leaf: permute(leaf, current().axes("pipe"), now), message) if now else None

        return [send(channel, now) for channel, now in zip(channels, routes, strict=True)]


def _either(is_first: Array | int, first: Stream, second: Stream | None) -> Stream:
    return first if second is None else jax.tree.map(partial(jnp.where, is_first), first, second)


def _receive(buffer: Stream, message: Stream | None, slot: Array) -> Stream:
    return buffer if message is None else buffers.write(buffer, message, slot)


def _put(stacks: tuple[StackBuffers, ...], stack: int, held: StackBuffers) -> tuple[StackBuffers, ...]:
    return (*stacks[:stack], held, *stacks[stack + 1 :])
