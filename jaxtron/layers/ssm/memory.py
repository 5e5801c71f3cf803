"""What a layer remembers of a sequence so far, from which generation goes on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.layers.cache import Growth
from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import spec
from jaxtron.typing import Array, Float, Int


class LayerMemory(NamedTuple):
    """Of one layer."""

    inputs: tuple[Float[Array, "B W ..."], ...]
    """The last positions of what is convolved: one fewer than the convolution sees."""
    state: Float[Array, "B ..."]


def with_before(
    memory: LayerMemory | None, convolved: tuple[Float[Array, "B S ..."], ...], width: int
) -> list[Float[Array, "B T ..."]]:
    """What is convolved with the `width` positions before it: zeros where nothing came before."""
    if memory is None:
        return [jnp.pad(new, ((0, 0), (width, 0), *((0, 0),) * (new.ndim - 2))) for new in convolved]
    return [jnp.concatenate([old, new], 1) for old, new in zip(memory.inputs, convolved, strict=True)]


def remembered(
    wide: list[Float[Array, "B T ..."]], width: int, state: Float[Array, "B ..."], growth: Growth | None
) -> LayerMemory:
    """After these, or those of them that are no padding."""
    if growth is None:
        return LayerMemory(tuple(part[:, part.shape[1] - width :] for part in wide), state)
    index = growth.counts[:, None] + jnp.arange(width)
    return LayerMemory(tuple(_at(part, index) for part in wide), state)


def _at(wide: Float[Array, "B T ..."], index: Int[Array, "B W"]) -> Float[Array, "B W ..."]:
    """The positions of each row that its index names."""
    layout = jax.typeof(wide).sharding.spec

    def local(wide: Array, index: Array) -> Array:
        return jnp.take_along_axis(wide, index.reshape(*index.shape, *(1,) * (wide.ndim - 2)), 1)

    return on_each_device(local, (layout, spec("batch", None)), layout)(wide, index)


def without_padding(steps: Float[Array, "B S ..."], growth: Growth | None) -> Float[Array, "B S ..."]:
    """Steps of a recurrence that are zero, and leave its state as it is, where a position is padding."""
    if growth is None:
        return steps
    is_new = growth.is_new(steps.shape[1]).reshape(*steps.shape[:2], *(1,) * (steps.ndim - 2))
    return jnp.where(is_new, steps, 0)
