"""Two halves of a microbatch that go through layers side by side, so that what one sends over `mesh.tensor` travels
while the other multiplies (Domino, 2409.15241, which splits rows; of a single row the positions are split).

Halves of positions have every second run of each tensor part's own, so that neither splitting nor joining them sends
anything.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.sharding.collectives import manual_axes
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float

# what is split: rows where there is an even number of them
Split = Literal["rows", "positions"]
# of a half; smaller products lose more than collectives beside them save
LEAST_TOKENS = 2048


def split_of(x: Float[Array, "B S E"]) -> Split | None:
    """What of the residual stream to split; None where it stays whole."""
    return split_of_size(*x.shape[:2]) if manual_axes() else None


def split_of_size(rows: int, length: int) -> Split | None:
    """The same for so many rows and positions of a device, inside the step's region."""
    rules = current()
    parts = rules.parts("tensor")
    if parts == 1 or rules.overlap_tensor is False:
        return None
    if rules.overlap_tensor is None and (rules.device_kind == "cpu" or rows * length < 2 * LEAST_TOKENS):
        return None
    if rows % 2 == 0:
        return "rows"
    return "positions" if length % (2 * parts) == 0 else None


def halve(x: Array, split: Split) -> tuple[Array, Array]:
    """The two halves of [B, S, ...]; of rows, of [B, ...]."""
    rows = x.shape[0]
    if split == "rows":
        return x[: rows // 2], x[rows // 2 :]
    length = x.shape[1]
    layout = jax.typeof(x).sharding.spec
    parts, rest = current().parts("tensor"), x.shape[2:]
    runs = (rows, parts, 2, length // parts // 2, *rest)
    runs = jnp.reshape(x, runs, out_sharding=PartitionSpec(*layout[:2], None, None, *layout[2:]))
    first, second = (
        jnp.reshape(runs[:, :, half], (rows, length // 2, *rest), out_sharding=layout) for half in range(2)
    )
    return first, second


def join(first: Array, second: Array, split: Split) -> Array:
    """What `halve` split."""
    if split == "rows":
        return jnp.concatenate([first, second])
    layout = jax.typeof(first).sharding.spec
    rows, length = first.shape[:2]
    parts, rest = current().parts("tensor"), first.shape[2:]
    runs = (rows, parts, 1, length // parts, *rest)
    spread = PartitionSpec(*layout[:2], None, None, *layout[2:])
    both = jnp.concatenate([jnp.reshape(half, runs, out_sharding=spread) for half in (first, second)], 2)
    return jnp.reshape(both, (rows, 2 * length, *rest), out_sharding=layout)
