"""What every layer of a decoder receives beside the residual stream, and dropout, which draws from it."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.kernels import dropout as arithmetic
from jaxtron.layers.cache import Growth
from jaxtron.layers.saved import save_for_backward
from jaxtron.sharding.context import part
from jaxtron.sharding.halves import Split, halve
from jaxtron.sharding.rules import constrain, current, spec
from jaxtron.typing import Array, Bool, DTypeLike, Float, Int, Key, UInt


class BranchOutput(NamedTuple):
    """What a branch with losses or metrics of its own returns; the others return the array alone."""

    x: Float[Array, "B S E"]
    loss: Float[Array, ""] | None
    """A device's part of a summand of the step's loss."""
    metrics: dict[str, Float[Array, "..."]]
    """Sums over a device's tokens."""


# cosines and sines of what is rotated
Tables = tuple[Float[Array, "*B S P"], Float[Array, "*B S P"]]
# the model's setting that says how, and the number of rotated dimensions
RotaryKey = tuple[str, int]
# logical axes that `mesh.context` splits
SEQUENCE = ("seq", "full_seq")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """Shared inputs of the layers: rotary tables, dropout keys (one a row of the global batch), documents by number."""

    rotary: dict[RotaryKey, Tables] = dataclasses.field(default_factory=dict)
    """Empty where positions are others."""
    keys: Key[Array, "B"] | None = None
    segments: Int[Array, "B S"] | None = None
    memory_segments: Int[Array, "B T"] | None = None
    """Of a sequence that the layers attend to beside their own (cross-attention), those by number that may be seen by
    the same of `segments`."""
    distance_bias: Float[Array, "H N"] | None = None
    """What self-attention adds by distance, as `AttentionSpec` has it; none: nothing. It has a gradient."""
    row_weights: Float[Array, "B"] | None = None
    """A row's share of the step's loss, for losses of layers; none: they are not asked for."""
    load: Float[Array, "layers N"] | None = None
    """Tokens that this device sent to each expert in the step's earlier microbatches, by layer with experts, the next
    one's first; none: as if this were the first microbatch."""
    growth: Growth | None = None
    """How the sequences grow, where layers go on from what they remember of them."""
    memory_counts: Int[Array, "B"] | None = None
    """Then of the sequence that they attend to beside their own so many positions of each row, the first."""
    half: int | None = dataclasses.field(default=None, metadata={"static": True})
    """Which of two halves of the positions these inputs go with; none: the whole."""

    def halves(self, split: Split) -> "tuple[LayerInputs, LayerInputs]":
        """Of each half of a microbatch its inputs."""
        if split == "positions":
            return dataclasses.replace(self, half=0), dataclasses.replace(self, half=1)

        def rows(half: int) -> "LayerInputs":
            def own(array: Array | None, rank: int) -> Array | None:
                return array if array is None or array.ndim < rank else halve(array, split)[half]

            # tables of all rows alike have no axis of rows
            rotary = {key: (own(tables[0], 3), own(tables[1], 3)) for key, tables in self.rotary.items()}
            given = {
                name: own(getattr(self, name), 1) for name in ("keys", "segments", "memory_segments", "row_weights")
            }
            return dataclasses.replace(self, rotary=rotary, **given)

        return rows(0), rows(1)

    def fold(self, number: int | Array) -> "LayerInputs":
        """The same inputs with keys of their own for the layer (or the site in it) `number`."""
        if self.keys is None:
            return self
        return dataclasses.replace(self, keys=jax.vmap(jax.random.fold_in, (0, None))(self.keys, number))


def row_keys(seed_key: Key[Array, ""], rows: Array) -> Key[Array, "B"]:
    """One dropout key for each global row number: masks do not depend on how the batch is split."""
    return jax.vmap(jax.random.fold_in, (None, 0))(seed_key, rows)


def dropout(x: Float[Array, "B ..."], rate: float, inputs: LayerInputs, *logical: str | None) -> Float[Array, "B ..."]:
    """Inverted dropout with each row's own key; `logical` names the axes of `x`. Identity without keys or rate.

    The backward keeps the mask, a byte an element.
    """
    mask = dropout_mask(x.shape, rate, inputs, *logical)
    return x if mask is None else drop(constrain(x, *logical), mask, rate)


def dropout_mask(
    shape: tuple[int, ...], rate: float, inputs: LayerInputs, *logical: str | None
) -> Bool[Array, "B ..."] | None:
    """What dropout leaves of an array of this shape, drawn from each row's own key; None without keys or rate."""
    if rate == 0.0 or inputs.keys is None:
        return None
    if inputs.half is not None:
        # of the whole sequence, so that a mask does not depend on how it is split
        whole = dropout_mask(
            (shape[0], 2 * shape[1], *shape[2:]), rate, dataclasses.replace(inputs, half=None), *logical
        )
        return None if whole is None else halve(whole, "positions")[inputs.half]
    return random_bits(shape, inputs, *logical) >= jnp.uint16(arithmetic.threshold(rate))


def random_bits(
    shape: tuple[int, ...], inputs: LayerInputs, *logical: str | None, dtype: DTypeLike = jnp.uint16
) -> UInt[Array, "B ..."]:
    """Random bits for each element, drawn from each row's own key: the same on every mesh."""
    assert inputs.keys is not None
    rules, row_spec = current(), spec(*logical[1:])
    sequence = [axis - 1 for axis, name in enumerate(logical) if name in SEQUENCE]
    parts = rules.parts("context") if sequence else 1

    def draw(key: Array) -> Array:
        if parts == 1:
            return jax.random.bits(key, shape[1:], dtype, out_sharding=row_spec)
        # of the whole sequence, so that a mask does not depend on who has what of it
        (axis,) = sequence
        whole = [size * parts if number == axis else size for number, size in enumerate(shape[1:])]
        return part(rules.context, parts, jax.random.bits(key, whole, dtype), axis)

    return constrain(jax.vmap(draw)(inputs.keys), *logical)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def drop(x: Float[Array, "..."], mask: Bool[Array, "..."], rate: float) -> Float[Array, "..."]:
    """`x` where the mask is, scaled to keep its expectation, else 0; `rate` as drawn, from 16 bits."""
    return arithmetic.drop(x, mask, rate)


def _drop_forward(x: Array, mask: Array, rate: float) -> tuple[Array, Array]:
    return drop(x, mask, rate), save_for_backward(mask)


def _drop_backward(rate: float, mask: Array, cotangent: Array) -> tuple[Array, None]:
    return drop(cotangent, mask, rate), None


drop.defvjp(_drop_forward, _drop_backward)
