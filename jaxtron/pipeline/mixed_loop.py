"""A chunk's layers of several kinds in one loop: each iteration runs one layer, by the branch of its kind.

So a pattern that never repeats is compiled as large as its kinds, however many layers it has. What a layer leaves for
its backward differs by kind, so each kind has buffers of its own, as it has parameters.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxtron.kernels.weight_sums.spec import WeightSums
from jaxtron.pipeline import buffers
from jaxtron.pipeline.layer_loop import ChunkWork, LayerLoop, PreparedLayer, StackBuffers, scan
from jaxtron.pipeline.model import Stack, Stream
from jaxtron.pipeline.partition import Partition
from jaxtron.typing import Array, Int, PyTree

# how operations of a kind of layers are named in compiled programs, with the kind behind it
KIND = "kind="
Prepared = Mapping[str, PreparedLayer]
# (kind, work of the chunk's layers of this kind, place among these, what the loop carries) -> what it carries on
Step = Callable[[str, ChunkWork, Array, PyTree], PyTree]


@runtime_checkable
class StackLoop(Protocol):
    """What the executor asks of a loop over a stack's layers; `prepared` is what its own `prepare` gave."""

    def prepare(self, stream: Stream, shared: PyTree, *, trains: bool = True, splits: bool = False) -> Any: ...

    def buffers(self, prepared: Any, num_residuals: int, num_deferred: int, num_layers: int) -> StackBuffers: ...

    def evaluate(
        self, work: ChunkWork, stream: Stream, shared: PyTree, held: StackBuffers
    ) -> tuple[Stream, StackBuffers]: ...

    def forward(
        self, prepared: Any, work: ChunkWork, stream: Stream, shared: PyTree, held: StackBuffers
    ) -> tuple[Stream, StackBuffers]: ...

    def backward(
        self, prepared: Any, work: ChunkWork, cotangent: Stream, shared: PyTree, held: StackBuffers
    ) -> tuple[Stream, StackBuffers]: ...

    def weight_grads(self, prepared: Any, work: ChunkWork, shared: PyTree, held: StackBuffers) -> StackBuffers: ...


@dataclass(frozen=True)
class MixedLoop:
    """As `LayerLoop` for layers of several kinds; of buffers and what is prepared each field is by kind."""

    loops: Mapping[str, LayerLoop]
    """Of each kind, the commonest first."""
    slots_per_chunk: Mapping[str, int]
    """Of each kind's parameters."""
    kinds: Int[Array, "layers"]
    """By the stage's layer, chunk after chunk: the number of its kind in `loops`,"""
    slots: Int[Array, "layers"]
    """its slot among the stage's of its kind,"""
    places: Int[Array, "layers"]
    """and its place among those of its kind in its chunk."""
    unroll: int

    def prepare(self, stream: Stream, shared: PyTree, *, trains: bool = True, splits: bool = False) -> Prepared:
        """As that of a `LayerLoop`, of each kind."""
        return {kind: loop.prepare(stream, shared, trains=trains, splits=splits) for kind, loop in self.loops.items()}

    def buffers(self, prepared: Prepared, num_residuals: int, num_deferred: int, num_layers: int) -> StackBuffers:
        """Empty buffers, of each kind for as many of its layers as a chunk has at most, and zero sums."""
        found = {
            kind: loop.buffers(prepared[kind], num_residuals, num_deferred, self.slots_per_chunk[kind])
            for kind, loop in self.loops.items()
        }
        trains = any(one.pullback is not None for one in prepared.values())
        sums = {kind: sums for held in found.values() for kind, sums in dict(held.grad_accumulators).items()}
        return StackBuffers(
            residuals={kind: held.residuals for kind, held in found.items()},
            deferred={kind: held.deferred for kind, held in found.items()},
            grad_accumulators=sums if trains else (),
            metrics={kind: held.metrics for kind, held in found.items()},
        )

    def evaluate(
        self, work: ChunkWork, stream: Stream, shared: PyTree, held: StackBuffers
    ) -> tuple[Stream, StackBuffers]:
        """What leaves the chunk's layers, and the buffers with their metrics added."""

        def step(kind: str, work: ChunkWork, place: Array, carry: PyTree) -> PyTree:
            stream, metrics = carry
            stream, own = self.loops[kind].evaluate_layer(work, shared, (stream, metrics[kind]), place)
            return stream, {**metrics, kind: own}

        stream, metrics = self._scan(step, work, (stream, held.metrics))
        return stream, held._replace(metrics=metrics)

    def forward(
        self, prepared: Prepared, work: ChunkWork, stream: Stream, shared: PyTree, held: StackBuffers
    ) -> tuple[Stream, StackBuffers]:
        """As `evaluate`, with each layer's residuals written to the work's slot of its kind's buffer."""

        def step(kind: str, work: ChunkWork, place: Array, carry: PyTree) -> PyTree:
            stream, residuals, metrics = carry
            own = (stream, residuals[kind], metrics[kind])
            stream, *own = self.loops[kind].forward_layer(prepared[kind], work, shared, own, place)
            return stream, {**residuals, kind: own[0]}, {**metrics, kind: own[1]}

        stream, residuals, metrics = self._scan(step, work, (stream, held.residuals, held.metrics))
        return stream, held._replace(residuals=residuals, metrics=metrics)

    def backward(
        self, prepared: Prepared, work: ChunkWork, cotangent: Stream, shared: PyTree, held: StackBuffers
    ) -> tuple[Stream, StackBuffers]:
        """As that of a `LayerLoop`."""

        def step(kind: str, work: ChunkWork, place: Array, carry: PyTree) -> PyTree:
            cotangent, sums, deferred = carry
            kept = buffers.read(held.residuals[kind], work.residual, place)
            own = (cotangent, {kind: sums[kind]}, deferred[kind])
            cotangent, *own = self.loops[kind].backward_layer(prepared[kind], work, shared, own, place, kept)
            return cotangent, {**sums, **own[0]}, {**deferred, kind: own[1]}

        carry = (cotangent, held.grad_accumulators, held.deferred)
        cotangent, sums, deferred = self._scan(step, work, carry, reverse=True)
        return cotangent, held._replace(grad_accumulators=sums, deferred=deferred)

    def weight_grads(self, prepared: Prepared, work: ChunkWork, shared: PyTree, held: StackBuffers) -> StackBuffers:
        """The buffers with the products added that `backward` put off."""

        def step(kind: str, work: ChunkWork, place: Array, sums: PyTree) -> PyTree:
            residuals = buffers.read(held.residuals[kind], work.residual, place)
            kept = (residuals, buffers.read(held.deferred[kind], work.deferred, place))
            own = {kind: sums[kind]}
            return {**sums, **self.loops[kind].weight_layer(prepared[kind], work, shared, own, place, kept)}

        return held._replace(grad_accumulators=self._scan(step, work, held.grad_accumulators))

    def _scan(self, step: Step, work: ChunkWork, carry: PyTree, *, reverse: bool = False) -> PyTree:
        def body(carry: PyTree, index: Array) -> PyTree:
            layer = work.first + index
            place = self.places[layer]
            own = work._replace(first=self.slots[layer] - place)

            def branch(kind: str, carry: PyTree) -> PyTree:
                with jax.named_scope(KIND + kind):
                    return step(kind, own, place, carry)

            return one_of(self.kinds[layer], [partial(branch, kind) for kind in self.loops], carry)

        return scan(body, carry, work.length, self.unroll, reverse=reverse)


def one_of(number: Array, branches: Sequence[Callable[[PyTree], PyTree]], operand: PyTree) -> PyTree:
    """The branch of this number, of the operand."""
    first, *others = branches
    if not others:
        return first(operand)
    # XLA copies what a branch chosen by number passes on, and not what one of two does
    return jax.lax.cond(number == 0, first, lambda operand: one_of(number - 1, others, operand), operand)


def stack_loop(
    stack: Stack,
    partition: Partition,
    trained: PyTree,
    frozen: PyTree,
    stage: Array | int,
    weight_sums: WeightSums | None = None,
) -> StackLoop:
    """The loop over a stack's layers on one stage, whose parameters these are."""

    def here(table: Sequence[int]) -> Array:
        rows = np.maximum(np.asarray(table, np.int32), 0).reshape(partition.num_stages, -1)
        return jnp.asarray(rows)[stage]

    if not partition.kinds:
        return LayerLoop(
            stack.layer, trained, here(partition.slot_layers), stack.unroll, frozen, stack.recall, weight_sums
        )
    common = [kind for kind, _ in Counter(partition.kinds).most_common()]
    numbers = {kind: [layer for layer, own in enumerate(partition.kinds) if own == kind] for kind in common}

    def loop_of(kind: str) -> LayerLoop:
        layers = [numbers[kind][layer] for layer in partition.by_kind[kind].slot_layers]
        others = None if frozen is None else {kind: frozen[kind]}
        return LayerLoop(stack.layer, {kind: trained[kind]}, here(layers), 1, others, stack.recall, weight_sums)

    slots, places = _slots_of_kinds(partition)
    return MixedLoop(
        {kind: loop_of(kind) for kind in common},
        {kind: partition.by_kind[kind].slots_per_chunk for kind in common},
        here([common.index(partition.kinds[layer]) for layer in partition.slot_layers]),
        here(slots),
        here(places),
        stack.unroll,
    )


def _slots_of_kinds(partition: Partition) -> tuple[list[int], list[int]]:
    """By the slot of all stages: the layer's slot in its stage's parameters of its kind, and its place among those of
    its kind in its chunk."""
    slots, places = [], []
    per_stage = partition.num_chunks * partition.slots_per_chunk
    for slot, layer in enumerate(partition.slot_layers):
        chunk, place = divmod(slot % per_stage, partition.slots_per_chunk)
        kind = partition.kinds[layer]
        before = partition.slot_layers[slot - place : slot]
        places.append(sum(partition.kinds[other] == kind for other in before))
        slots.append(chunk * partition.by_kind[kind].slots_per_chunk + places[-1])
    return slots, places
