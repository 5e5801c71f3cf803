"""What a layer remembers of a sequence so far, from which generation goes on."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxtron.typing import Array, Float


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


def remembered(wide: list[Float[Array, "B T ..."]], width: int, state: Float[Array, "B ..."]) -> LayerMemory:
    """After these."""
    return LayerMemory(tuple(part[:, part.shape[1] - width :] for part in wide), state)
