"""A chunk's layers one after the other, forward and backward, with what the backward needs kept where we say.

The loops are written out instead of differentiating a scan: so residuals go straight into the slot of a buffer, the
weights are not among them, and gradients are added in float32 where they are summed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.kernels.weight_sums.spec import WeightSums
from jaxtron.pipeline import buffers
from jaxtron.pipeline.model import LayerFunction, LayerOutput, Stream, merge
from jaxtron.pipeline.names import BACKWARD
from jaxtron.pipeline.residuals import Pullback, split_residuals
from jaxtron.pipeline.split_backward import SplitBackward, split_backward
from jaxtron.pipeline.weight_products import OpenBackward, Summands, add_products, open_backward
from jaxtron.typing import Array, Float, Int, PyTree


class ChunkWork(NamedTuple):
    """One microbatch's work of one chunk: which layers, and the buffer slots that it uses."""

    first: Int[Array, ""] | int
    """The slot of its first layer among the stage's of this stack."""
    length: int
    """Its layers: known when the program is compiled."""
    residual: Int[Array, ""] | int
    deferred: Int[Array, ""] | int
    microbatch: Int[Array, ""] | int = 0


@partial(jax.tree_util.register_dataclass, data_fields=("shared", "memory"), meta_fields=())
@dataclass(frozen=True)
class Remembering:
    """The shared input of a layer that goes on from what it remembers of a microbatch's sequences."""

    shared: PyTree
    memory: PyTree


class StackBuffers(NamedTuple):
    """What a stage holds of one stack between ticks. A field is empty where the schedule has no use for it.

    Of layers of several kinds each field is by kind.
    """

    residuals: PyTree
    """What forwards leave for backwards: [residual slot, layer of the chunk, ...]."""
    deferred: PyTree
    """What backwards leave for the weight gradients that they put off, beside the residuals, which stay as long:
    [deferred slot, layer of the chunk, ...]."""
    grad_accumulators: PyTree
    """Float32 gradients so far, like the trained parameters: [layer slot, ...]."""
    metrics: PyTree
    """The layers' float32 metrics so far: [layer slot, ...]."""
    memory: PyTree = ()
    """What layers remember of sequences, where these go on: [microbatch, layer of the chunk, ...]."""


# of a forward: the stream, residuals and metrics; of a backward: the cotangent, sums of gradients, what is deferred
ForwardCarry = tuple[Stream, PyTree, PyTree]
BackwardCarry = tuple[Stream, PyTree, PyTree]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("loss", "residuals", "deferred", "metrics"),
    meta_fields=("pullback", "split", "opened"),
)
@dataclass(frozen=True)
class PreparedLayer:
    """A layer's derivative, as it comes out of tracing it once: the same for every layer of a stack.

    Arrays are abstract: shapes, types and shardings of one layer's.
    """

    loss: PyTree
    """None where it has none."""
    residuals: PyTree
    """What a forward leaves for its backward."""
    deferred: PyTree
    """What a backward leaves for its weight gradients, which read the residuals too."""
    metrics: PyTree
    pullback: Pullback | None
    """From the residuals to the derivative; None where nothing is differentiated."""
    split: SplitBackward | None
    """The derivative in two, where weight gradients are put off."""
    opened: OpenBackward | None
    """The derivative, or what was put off of it, without products that are added to sums as they are multiplied; none
    where all are made first."""


@dataclass(frozen=True)
class LayerLoop:
    """Loops over one stack's layers on one stage, whose parameters are stacked along a leading axis of slots."""

    layer: LayerFunction
    trained: PyTree
    """The parameters to differentiate."""
    numbers: Int[Array, "slots"]
    """The layers' numbers in the stack."""
    unroll: int = 1
    frozen: PyTree = None
    """The other parameters, like `trained` with None where that has a leaf, and the other way round (None: no others).
    """
    recall: Callable[[PyTree, PyTree], PyTree] | None = None
    """As that of the stack."""
    weight_sums: WeightSums | None = None
    """What adds products of weight gradients to their sums; none: XLA does, once they are made."""

    def prepare(self, stream: Stream, shared: PyTree, *, trains: bool = True, splits: bool = False) -> PreparedLayer:
        """What a layer leaves for its backward, and (`splits`) this for its weight gradients; by types, never run."""

        def evaluate(stream: Stream, shared: PyTree) -> PreparedLayer:
            output = self._run(0, stream, shared)
            return PreparedLayer(output.loss, [], [], output.metrics, None, None, None)

        def trace(stream: Stream, shared: PyTree, so_far: PyTree) -> PreparedLayer:
            output, residuals, pullback = self._differentiate(0, stream, shared, so_far)
            whole = PreparedLayer(output.loss, residuals, [], output.metrics, pullback, None, None)
            again = (residuals, self._given(0, shared))
            if not splits:
                return replace(whole, opened=self._open(partial(_pull, whole), output.stream, again))
            is_deferred = [*self._is_deferred(), *(False for _ in jax.tree.leaves(stream))]
            split = split_backward(partial(_pull, whole), output.stream, again, is_deferred)
            deferred = split.input_grads(output.stream, again)[1]
            opened = self._open(split.weight_grads, deferred, again)
            return PreparedLayer(output.loss, residuals, deferred, output.metrics, pullback, split, opened)

        if trains:
            so_far = () if self.recall is None else jax.eval_shape(evaluate, stream, shared).metrics
            prepared = jax.eval_shape(trace, stream, shared, so_far)
        else:
            prepared = jax.eval_shape(evaluate, stream, shared)
        assert all(metric.dtype == jnp.float32 for metric in jax.tree.leaves(prepared.metrics))
        return prepared

    def buffers(self, prepared: PreparedLayer, num_residuals: int, num_deferred: int, num_layers: int) -> StackBuffers:
        """Empty buffers of so many slots for chunks of so many layers, and zero sums."""
        trains = prepared.pullback is not None
        accumulators = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), self.trained) if trains else ()
        # a backward reads what its forward wrote
        return StackBuffers(
            buffers.empty(prepared.residuals, num_residuals, num_layers),
            buffers.empty(prepared.deferred, num_deferred, num_layers),
            accumulators,
            buffers.zeros(prepared.metrics, self.numbers.shape[0]),
        )

    def evaluate(
        self, work: ChunkWork, stream: Stream, shared: PyTree, held: StackBuffers
    ) -> tuple[Stream, StackBuffers]:
        """What leaves the chunk's layers, and the buffers with their metrics added."""

        def body(carry: tuple[Stream, PyTree, PyTree], index: Array) -> tuple[Stream, PyTree, PyTree]:
            stream, metrics, memory = carry
            if not jax.tree.leaves(memory):
                return *self.evaluate_layer(work, shared, (stream, metrics), index), memory
            output = self._run(
                work.first + index, stream, Remembering(shared, buffers.read(memory, work.microbatch, index))
            )
            return output.stream, metrics, buffers.write(memory, output.cache, work.microbatch, index)

        stream, metrics, memory = scan(body, (stream, held.metrics, held.memory), work.length, self.unroll)
        return stream, held._replace(metrics=metrics, memory=memory)

    def forward(
        self, prepared: PreparedLayer, work: ChunkWork, stream: Stream, shared: PyTree, held: StackBuffers
    ) -> tuple[Stream, StackBuffers]:
        """As `evaluate`, with each layer's residuals written to the work's slot."""

        def body(carry: ForwardCarry, index: Array) -> ForwardCarry:
            return self.forward_layer(prepared, work, shared, carry, index)

        carry = (stream, held.residuals, held.metrics)
        stream, residuals, metrics = scan(body, carry, work.length, self.unroll)
        return stream, held._replace(residuals=residuals, metrics=metrics)

    def backward(
        self, prepared: PreparedLayer, work: ChunkWork, cotangent: Stream, shared: PyTree, held: StackBuffers
    ) -> tuple[Stream, StackBuffers]:
        """The cotangent of what entered the chunk, and the buffers with the layers' gradients added in place.

        Where the layer is prepared in two parts, without the products of weight gradients: their operands are kept.
        """

        def body(carry: BackwardCarry, index: Array) -> BackwardCarry:
            kept = buffers.read(held.residuals, work.residual, index)
            return self.backward_layer(prepared, work, shared, carry, index, kept)

        carry = (cotangent, held.grad_accumulators, held.deferred)
        cotangent, accumulators, deferred = scan(body, carry, work.length, self.unroll, reverse=True)
        return cotangent, held._replace(grad_accumulators=accumulators, deferred=deferred)

    def both(
        self,
        prepared: PreparedLayer,
        works: tuple[ChunkWork, ChunkWork],
        streams: tuple[Stream, Stream],
        shared: tuple[PyTree, PyTree],
        held: StackBuffers,
    ) -> tuple[Stream, Stream, StackBuffers]:
        """`forward` of one microbatch and `backward` of another through as many layers, a layer of each at a time.

        Neither waits for the other, so that what one communicates can travel while the other computes.
        """
        ahead, back = works
        assert ahead.length == back.length

        def body(carry: tuple[ForwardCarry, BackwardCarry], index: Array) -> PyTree:
            (stream, residuals, metrics), of_backward = carry
            place = back.length - 1 - index
            # read before the forward writes to another slot of the same buffer, which needs no copy then
            residuals, kept = jax.lax.optimization_barrier((residuals, buffers.read(residuals, back.residual, place)))
            of_forward = self.forward_layer(prepared, ahead, shared[0], (stream, residuals, metrics), index)
            with jax.named_scope(BACKWARD):
                return of_forward, self.backward_layer(prepared, back, shared[1], of_backward, place, kept)

        carry = (
            (streams[0], held.residuals, held.metrics),
            (streams[1], held.grad_accumulators, held.deferred),
        )
        (stream, residuals, metrics), (cotangent, sums, deferred) = scan(body, carry, ahead.length, self.unroll)
        return stream, cotangent, StackBuffers(residuals, deferred, sums, metrics)

    def evaluate_layer(
        self, work: ChunkWork, shared: PyTree, carry: tuple[Stream, PyTree], index: Array
    ) -> tuple[Stream, PyTree]:
        """One iteration of `evaluate`: of the chunk's layer `index`."""
        stream, metrics = carry
        output = self._run(work.first + index, stream, shared)
        return output.stream, buffers.add_at(metrics, output.metrics, work.first + index)

    def forward_layer(
        self, prepared: PreparedLayer, work: ChunkWork, shared: PyTree, carry: ForwardCarry, index: Array
    ) -> ForwardCarry:
        """One iteration of `forward`."""
        stream, residuals, metrics = carry
        so_far = () if self.recall is None else buffers.read(metrics, work.first + index)
        output, stored, pullback = self._differentiate(work.first + index, stream, shared, so_far)
        assert prepared.pullback is not None and pullback.sources == prepared.pullback.sources
        # a copy to XLA: else it makes a kernel write to the buffer, and runs it again for who else reads the result
        stored = _as_buffers_lie(work, jax.lax.optimization_barrier(stored))
        residuals = buffers.write(residuals, stored, work.residual, index)
        return output.stream, residuals, buffers.add_at(metrics, output.metrics, work.first + index)

    def backward_layer(
        self,
        prepared: PreparedLayer,
        work: ChunkWork,
        shared: PyTree,
        carry: BackwardCarry,
        index: Array,
        residuals: list[Array],
    ) -> BackwardCarry:
        """One iteration of `backward`, with what the layer's forward left."""
        cotangent, accumulators, deferred = carry
        slot = work.first + index
        again = (_as_buffers_lie(work, residuals), self._given(slot, shared))
        outputs: Sequence[Array | Summands]
        if prepared.split is None:
            outputs = (prepared.opened.run if prepared.opened else partial(_pull, prepared))(cotangent, again)
            wanted = [True] * len(self._is_deferred())
        else:
            outputs, kept = prepared.split.input_grads(cotangent, again)
            kept = _as_buffers_lie(work, jax.lax.optimization_barrier(kept))
            deferred = buffers.write(deferred, kept, work.deferred, index)
            wanted = [not later for later in self._is_deferred()]
        num_grads = sum(wanted)
        accumulators = self._add_some(accumulators, outputs[:num_grads], wanted, slot)
        return jax.tree.unflatten(jax.tree.structure(cotangent), outputs[num_grads:]), accumulators, deferred

    def weight_grads(
        self, prepared: PreparedLayer, work: ChunkWork, shared: PyTree, held: StackBuffers
    ) -> StackBuffers:
        """The buffers with the products added that `backward` put off."""

        def body(accumulators: PyTree, index: Array) -> PyTree:
            kept = (
                buffers.read(held.residuals, work.residual, index),
                buffers.read(held.deferred, work.deferred, index),
            )
            return self.weight_layer(prepared, work, shared, accumulators, index, kept)

        return held._replace(grad_accumulators=scan(body, held.grad_accumulators, work.length, self.unroll))

    def weight_layer(
        self,
        prepared: PreparedLayer,
        work: ChunkWork,
        shared: PyTree,
        accumulators: PyTree,
        index: Array,
        kept: tuple[list[Array], list[Array]],
    ) -> PyTree:
        """One iteration of `weight_grads`, with what the layer's forward and its backward left."""
        assert prepared.split is not None
        slot = work.first + index
        residuals, deferred = _as_buffers_lie(work, kept)
        run = prepared.opened.run if prepared.opened else prepared.split.weight_grads
        gradients = run(deferred, (residuals, self._given(slot, shared)))
        return self._add_some(accumulators, gradients, self._is_deferred(), slot)

    def _open(
        self, function: Callable[[PyTree, PyTree], list[Array]], inputs: PyTree, again: PyTree
    ) -> OpenBackward | None:
        """The function without the products that are added as they are multiplied."""
        if self.weight_sums is None:
            return None
        num_gradients = len(jax.tree.leaves(self.trained))
        return open_backward(function, inputs, again, num_gradients, self.weight_sums)

    def _add_some(
        self, accumulators: PyTree, parts: Sequence[Array | Summands], is_given: list[bool], slot: Array | int
    ) -> PyTree:
        """The accumulators with `parts` added at the slot to those leaves for which there is one."""
        leaves, treedef = jax.tree.flatten(accumulators)
        rest = iter(parts)
        return jax.tree.unflatten(
            treedef,
            [
                self._add(leaf, next(rest), slot) if given else leaf
                for leaf, given in zip(leaves, is_given, strict=True)
            ],
        )

    def _add(self, total: Array, part: Array | Summands, slot: Array | int) -> Array:
        if not isinstance(part, tuple):
            return buffers.add_at(total, part, slot)
        assert self.weight_sums is not None
        return add_products(total, part, slot, self.weight_sums)

    def _is_deferred(self) -> list[bool]:
        """For each trained parameter, whether its gradient is a product worth putting off: not those of norms."""
        return [leaf.ndim > 2 for leaf in jax.tree.leaves(self.trained)]

    def _run(self, slot: Array | int, stream: Stream, shared: PyTree) -> LayerOutput:
        trained, frozen, number, shared = self._given(slot, shared)
        return self.layer(merge(trained, frozen), stream, number, shared)

    def _differentiate(
        self, slot: Array | int, stream: Stream, shared: PyTree, so_far: PyTree
    ) -> tuple[LayerOutput, list[Array], Pullback]:
        """The layer's output, its residuals, and how to make its derivative of these and of what is given.

        What it recalls of `so_far` is kept: by the time of its backward, later microbatches are in it.
        """
        given = self._given(slot, shared)
        trained, frozen, number, shared = given
        shared = shared if self.recall is None else self.recall(shared, so_far)

        def run(trained: PyTree, stream: Stream) -> tuple[tuple[Stream, Float[Array, ""] | None], PyTree]:
            output = self.layer(merge(trained, frozen), stream, number, shared)
            return (output.stream, output.loss), output.metrics

        (stream, loss), pull, metrics = jax.vjp(run, trained, stream, has_aux=True)
        return LayerOutput(stream, loss, metrics), *split_residuals(pull, given)

    def _given(self, slot: Array | int, shared: PyTree) -> tuple[PyTree, PyTree, Array, PyTree]:
        """What a layer reads that is there again in its backward, so that none of it is kept."""
        return (*buffers.read((self.trained, self.frozen), slot), self.numbers[slot], shared)


def scan(body, carry: PyTree, length: int, unroll: int, *, reverse: bool = False) -> PyTree:
    """What `body(carry, index)` leaves of so many layers of a chunk, `unroll` of them in each iteration.

    The index is the loop's own counter, not one of scanned numbers: so XLA knows where in a buffer an iteration reads
    and writes, and copies there beside its products.
    """
    unroll = max(1, min(unroll, length))
    rounds, rest = divmod(length, unroll)

    def place(count: Array | int) -> Array | int:
        return length - 1 - count if reverse else count

    def iterate(state: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        count, carry = state
        for ahead in range(unroll):
            carry = body(carry, place(count * unroll + ahead))
        return count + 1, carry

    if rounds > 1:
        carry = jax.lax.while_loop(lambda state: state[0] < rounds, iterate, (jnp.int32(0), carry))[1]
    else:
        rest = length
    for count in range(length - rest, length):
        carry = body(carry, place(jnp.int32(count)))
    return carry


def _as_buffers_lie(work: ChunkWork, arrays: PyTree) -> PyTree:
    """What is kept of a layer as the buffers of a pipeline lie in memory; a single slot may lie as readers like it."""
    return arrays if isinstance(work.residual, int) else buffers.in_order(arrays)


def _pull(prepared: PreparedLayer, cotangent: Stream, again: tuple[list[Array], PyTree]) -> list[Array]:
    """From (residuals, what is given): gradients of the trained parameters, the stream's cotangent."""
    residuals, given = again
    assert prepared.pullback is not None
    # a layer's loss is a summand of the differentiated loss
    one = jax.tree.map(lambda loss: loss + 1, buffers.zeros(prepared.loss))
    return jax.tree.leaves(prepared.pullback(residuals, given)((cotangent, one)))
