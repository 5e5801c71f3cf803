"""Attention of one sequence to another: queries of a decoder, keys and values of what an encoder left."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.attention import Core, CoreFunction
from jaxtron.layers.cache import HEADS, Growth, KeyValues, attend
from jaxtron.layers.cache import remember as remember_all
from jaxtron.layers.inputs import LayerInputs, dropout
from jaxtron.layers.linear import Linear, whole_sequence
from jaxtron.typing import Array, DTypeLike, Float, Int


class CrossAttention(nnx.Module):
    """Projections to heads, the core (`attention.Core`, of a spec that `crosses`), and the projection back.

    Keys and values are one product of the memory, so that its parts are gathered once along tensor, and their
    gradients added up once. Which of it a query may see `inputs` say: where its `segments` are `memory_segments`.
    """

    def __init__(
        self,
        embed: int,
        *,
        num_heads: int,
        head_dim: int,
        bias: bool,
        core: CoreFunction,
        std: float,
        query_std: float,
        output_std: float,
        dropout: float,
        rngs: nnx.Rngs,
    ) -> None:
        self.core, self.dropout = core, dropout
        self.num_heads, self.head_dim = num_heads, head_dim
        heads = {"heads": num_heads, "head_dim": head_dim}
        self.query = Linear({"embed": embed}, heads, bias=bias, std=query_std, rngs=rngs)
        # keys and values side by side
        self.key_value = Linear({"embed": embed}, {"gate": 2, **heads}, bias=bias, std=std, rngs=rngs)
        self.output = Linear(heads, {"embed": embed}, bias=bias, std=output_std, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S E"], memory: Float[Array, "B T E"], inputs: LayerInputs
    ) -> Float[Array, "B S E"]:
        return self.read(x, *self.remember(memory, inputs), inputs)

    def remember(
        self, memory: Float[Array, "B T E"], inputs: LayerInputs
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"]]:
        """Keys and values."""
        logical = ("batch", "full_seq", "gate", "heads", "head_dim")
        pair = self.key_value(whole_sequence(memory), *logical, inputs=inputs, own=memory)
        # whose gradients are put together again, where those of slices would be padded with zeros and added
        key, value = jax.lax.split(pair, (1, 1), axis=2)
        return key.squeeze(2), value.squeeze(2)

    def read(
        self,
        x: Float[Array, "B S E"],
        key: Float[Array, "B T H D"],
        value: Float[Array, "B T H D"],
        inputs: LayerInputs,
    ) -> Float[Array, "B S E"]:
        """What is attended to, back in the stream."""
        query = self.query(whole_sequence(x), *HEADS, inputs=inputs, own=x)
        attended = self.core(query, key, value, None, None, inputs)
        y = self.output(attended, "batch", "seq", "embed", inputs=inputs)
        return dropout(y, self.dropout, inputs, "batch", "seq", "embed")

    def start(self, rows: int, room: int, dtype: DTypeLike) -> KeyValues:
        """Room for the keys and values of so many rows of a memory, each of so many positions."""
        assert isinstance(self.core, Core)
        return self.core.empty(rows, self.num_heads, room, 1, (self.head_dim, self.head_dim), dtype)

    def keep(self, room: KeyValues, memory: Float[Array, "B T E"], counts: Int[Array, "B"]) -> KeyValues:
        """What `advance` reads of a memory, of which so many positions of each row are no padding; there is room."""
        key, value = self.remember(memory, LayerInputs())
        return remember_all(room, key, value, Growth(jnp.zeros_like(counts), counts, begins=True))

    def advance(self, x: Float[Array, "B S E"], kept: KeyValues, inputs: LayerInputs) -> Float[Array, "B S E"]:
        """The same for few positions, whole on every part of `mesh.tensor`, of a memory that is kept."""
        assert isinstance(self.core, Core) and inputs.memory_counts is not None
        query = self.query(x, *HEADS, inputs=inputs)
        # all of it came before
        growth = Growth(inputs.memory_counts, jnp.zeros_like(inputs.memory_counts))
        attended = attend(query, kept, self.core.spec, None, None, growth)
        return self.output(attended, "batch", "full_seq", "embed", inputs=inputs)
