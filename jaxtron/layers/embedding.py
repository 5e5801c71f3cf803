"""Token embedding with a table split over the vocabulary."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxtron.layers.linear import normal
from jaxtron.layers.positions import local_positions
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.regions import over_tensor
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, Float, Int


class Embedding(nnx.Module):
    """Rows of a table by token, times `multiplier`, plus learned positions where there are any."""

    def __init__(
        self,
        vocab: int,
        embed: int,
        *,
        num_positions: int | None,
        std: float,
        rngs: nnx.Rngs,
        multiplier: float = 1.0,
    ) -> None:
        self.multiplier = multiplier
        self.table = parameter(rngs, normal(std), (vocab, embed), axes=("vocab", "embed"), role="embedding")
        self.positions = (
            parameter(rngs, normal(std), (num_positions, embed), axes=("positions", "embed"), role="position")
            if num_positions
            else None
        )

    def __call__(self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"] | None = None) -> Float[Array, "B S E"]:
        x = look_up(self.table[...], tokens)
        if self.multiplier != 1.0:
            x = x * jnp.asarray(self.multiplier, x.dtype)
        if self.positions is None:
            return x
        if positions is not None:
            return x + constrain(self.positions[...][positions], "batch", "seq", "embed")
        return x + constrain(self._at(tokens.shape[1]), "seq", "embed")

    def _at(self, length: int) -> Float[Array, "S E"]:
        """Learned positions of the tokens here."""
        assert self.positions is not None
        table = self.positions[...]
        return table[:length] if current().parts("context") == 1 else table[local_positions(length)]


@jax.custom_vjp
def look_up(table: Float[Array, "V E"], tokens: Int[Array, "B S"]) -> Float[Array, "B S E"]:
    """Rows of a vocabulary-sharded table, sequence-sharded: each part looks up its own tokens, one reduce-scatter adds.

    (Megatron-LM, 1909.08053 sec. 3, with the sequence split of 2205.05198.)
    """
    tensor = current().axes("tensor")
    if current().size(tensor) == 1:
        return table.at[tokens].get(out_sharding=PartitionSpec(None, tensor))

    def local(table: Array, tokens: Array) -> Array:
        index, mine = _local_index(table.shape[0], tokens)
        x = jnp.where(mine[..., None], table[index], jnp.zeros((), table.dtype))
        return jax.lax.psum_scatter(x, tensor, scatter_dimension=1, tiled=True)

    specs = (PartitionSpec(tensor), PartitionSpec())
    return over_tensor(local, specs, PartitionSpec(None, tensor))(table, tokens)


def _forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    # an empty slice carries the table's shape and type without keeping the table
    return look_up(table, tokens), (table[:, :0], tokens)


def _backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    shape, tokens = residuals
    tensor = current().axes("tensor")

    def local(shape: Array, tokens: Array, cotangent: Array) -> Array:
        if current().size(tensor) > 1:
            cotangent = jax.lax.all_gather(cotangent, tensor, axis=1, tiled=True)
        index, mine = _local_index(shape.shape[0], tokens)
        # float32 sums: a frequent token adds up thousands of cotangents
        rows = jnp.where(mine[..., None], cotangent, jnp.zeros((), cotangent.dtype)).astype(jnp.float32)
        zeros = vary(jnp.zeros((shape.shape[0], cotangent.shape[-1]), jnp.float32))
        return zeros.at[index].add(rows).astype(shape.dtype)

    specs = (PartitionSpec(tensor), PartitionSpec(), PartitionSpec(None, tensor))
    return over_tensor(local, specs, PartitionSpec(tensor))(shape, tokens, cotangent), None


look_up.defvjp(_forward, _backward)


def _local_index(size: int, tokens: Array) -> tuple[Array, Array]:
    index = tokens - jax.lax.axis_index(current().axes("tensor")) * size
    mine = (index >= 0) & (index < size)
    return jnp.where(mine, index, 0), mine
