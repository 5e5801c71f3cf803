"""A chunk's layers one after the other, forward and backward, with what the backward needs kept where we say.

The loops are written out instead of differentiating a scan: so residuals go straight into the slot of a buffer, the
weights are not among them, and gradients are added in float32 where they are summed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jaxtron.pipeline.residuals import Recipe, take_apart
from jaxtron.pipeline.split import Halves, split
from jaxtron.sharding.collectives import zeros_like_type
from jaxtron.typing import Array, PyTree

# (a layer's parameters, its input, its number in the model, shared inputs) -> its output
LayerFunction = Callable[[PyTree, Array, Array, PyTree], Array]
Buffer = list[Array]


@dataclass
class LayerLoop:
    """Loops over rows of stacked parameters, `numbers` being the layers' places in the model."""

    layer: LayerFunction
    weights: PyTree
    numbers: Array
    unroll: int
    _recipe: list[Recipe] = field(default_factory=list)
    _halves: list[Halves] = field(default_factory=list)

    def evaluate(self, x: Array, shared: PyTree, first: Array | int, length: int) -> Array:
        """The output of `length` layers from row `first` on."""

        def body(x: Array, index: Array) -> tuple[Array, None]:
            return self.layer(self._row(first + index), x, self.numbers[first + index], shared), None

        return jax.lax.scan(body, x, jnp.arange(length), unroll=self._unrolled(length))[0]

    def buffer(self, x: jax.ShapeDtypeStruct, shared: PyTree, slots: int, rows: int) -> Buffer:
        """Zeros for the residuals of `rows` layers in each slot."""
        stored = jax.eval_shape(lambda x, shared: self._differentiate(x, shared, 0)[1], x, shared)
        return [zeros_like_type(leaf, (slots, rows)) for leaf in stored]

    def forward(
        self, x: Array, shared: PyTree, first: Array | int, length: int, buffer: Buffer, slot: Array | int
    ) -> tuple[Array, Buffer]:
        """As `evaluate`, with each layer's residuals written to the buffer's slot."""

        def body(carry: tuple[Array, Buffer], index: Array) -> tuple[tuple[Array, Buffer], None]:
            x, buffer = carry
            y, stored = self._differentiate(x, shared, first + index)
            buffer = [write(part, leaf, (slot, index)) for part, leaf in zip(buffer, stored, strict=True)]
            return (y, buffer), None

        return jax.lax.scan(body, (x, buffer), jnp.arange(length), unroll=self._unrolled(length))[0]

    def backward(
        self,
        cotangent: Array,
        shared: PyTree,
        first: Array | int,
        length: int,
        buffer: Buffer,
        slot: Array | int,
        sums: PyTree,
    ) -> tuple[Array, PyTree]:
        """The input's cotangent, and the stacked `sums` with the layers' gradients added in place."""

        def body(carry: tuple[Array, PyTree], index: Array) -> tuple[tuple[Array, PyTree], None]:
            cotangent, sums = carry
            row = first + index
            stored = [read(part, (slot, index)) for part in buffer]
            pull = self._recipe[0](stored, self._given(row, shared))
            gradients, cotangent = pull(cotangent)
            return (cotangent, jax.tree.map(lambda total, part: add(total, part, row), sums, gradients)), None

        carry = (cotangent, sums)
        return jax.lax.scan(body, carry, jnp.arange(length), reverse=True, unroll=self._unrolled(length))[0]

    def pairs(self, x: jax.ShapeDtypeStruct, shared: PyTree, buffer: Buffer, slots: int, rows: int) -> Buffer:
        """Zeros for what `backward_inputs` leaves of `rows` layers in each slot; after `buffer`."""
        kept = jax.eval_shape(lambda x, shared, buffer: self._split(x, shared, 0, buffer, (0, 0))[1], x, shared, buffer)
        return [zeros_like_type(leaf, (slots, rows)) for leaf in kept]

    def backward_inputs(
        self,
        cotangent: Array,
        shared: PyTree,
        first: Array | int,
        length: int,
        buffer: Buffer,
        slot: Array | int,
        sums: PyTree,
        pairs: Buffer,
        pair: Array | int,
    ) -> tuple[Array, PyTree, Buffer]:
        """As `backward` without the products of weight gradients, whose operands are written to `pairs`."""

        def body(carry: tuple[Array, PyTree, Buffer], index: Array) -> tuple[tuple[Array, PyTree, Buffer], None]:
            cotangent, sums, pairs = carry
            gradients, kept, cotangent = self._split(cotangent, shared, first + index, buffer, (slot, index))
            pairs = [write(part, leaf, (pair, index)) for part, leaf in zip(pairs, kept, strict=True)]
            return (cotangent, self._add(sums, gradients, first + index, is_later=False), pairs), None

        carry = (cotangent, sums, pairs)
        return jax.lax.scan(body, carry, jnp.arange(length), reverse=True, unroll=self._unrolled(length))[0]

    def weight_gradients(
        self, shared: PyTree, first: Array | int, length: int, pairs: Buffer, pair: Array | int, sums: PyTree
    ) -> PyTree:
        """The sums with the products that `backward_inputs` put off."""

        def body(sums: PyTree, index: Array) -> tuple[PyTree, None]:
            row = first + index
            kept = [read(part, (pair, index)) for part in pairs]
            gradients = self._halves[0].later(kept, self._given(row, shared))
            return self._add(sums, gradients, row, is_later=True), None

        return jax.lax.scan(body, sums, jnp.arange(length), unroll=self._unrolled(length))[0]

    def _split(
        self, cotangent: Array, shared: PyTree, row: Array | int, buffer: Buffer, place: tuple[Array | int, ...]
    ) -> tuple[list[Array], list[Array], Array]:
        """Gradients formed at once, what to keep for the others, and the input's cotangent."""

        def pull(inputs: tuple[list[Array], Array], given: PyTree) -> list[Array]:
            stored, cotangent = inputs
            gradients, cotangent = self._recipe[0](stored, given)(cotangent)
            return [*jax.tree.leaves(gradients), cotangent]

        inputs = ([read(part, place) for part in buffer], cotangent)
        given = self._given(row, shared)
        halves = split(pull, inputs, given, [*self._put_off(), False])
        self._halves[:] = [halves]
        (*gradients, cotangent), kept = halves.now(inputs, given)
        return gradients, kept, cotangent

    def _put_off(self) -> list[bool]:
        """For each of a layer's parameters, whether its gradient is a product worth putting off: not those of norms."""
        return [leaf.ndim > 2 for leaf in jax.tree.leaves(self.weights)]

    def _add(self, sums: PyTree, gradients: list[Array], row: Array | int, *, is_later: bool) -> PyTree:
        leaves, treedef = jax.tree.flatten(sums)
        parts = iter(gradients)
        put_off = self._put_off()
        return jax.tree.unflatten(
            treedef,
            [
                add(leaf, next(parts), row) if later == is_later else leaf
                for leaf, later in zip(leaves, put_off, strict=True)
            ],
        )

    def _given(self, row: Array | int, shared: PyTree) -> PyTree:
        return self._row(row), self.numbers[row], shared

    def _differentiate(self, x: Array, shared: PyTree, row: Array | int) -> tuple[Array, list[Array]]:
        weights, number = self._row(row), self.numbers[row]
        y, pull = jax.vjp(lambda weights, x: self.layer(weights, x, number, shared), weights, x)
        stored, recipe = take_apart(pull, (weights, number, shared))
        self._recipe[:] = [recipe]
        return y, stored

    def _row(self, row: Array | int) -> PyTree:
        return jax.tree.map(lambda leaf: read(leaf, (row,)), self.weights)

    def _unrolled(self, length: int) -> int:
        return max(1, min(self.unroll, length))


def read(array: Array, indices: tuple[Array | int, ...]) -> Array:
    """`array` at those indices of its leading axes, sharded as the rest of it is."""
    for index in indices:
        array = jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)
    return array


def write(array: Array, value: Array, indices: tuple[Array | int, ...]) -> Array:
    """`array` with `value` at those indices of its leading axes."""
    start = (*indices, *(0,) * value.ndim)
    return jax.lax.dynamic_update_slice(array, value[(None,) * len(indices)], start)


def add(total: Array, part: Array, row: Array | int) -> Array:
    """`total` with `part` added to one of its rows."""
    return write(total, read(total, (row,)) + part.astype(total.dtype), (row,))
