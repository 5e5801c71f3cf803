"""Multi-head latent attention: keys and values of all heads are made of one narrow latent (DeepSeek-V2, 2405.04434).

Each device makes the latents of its own part of the sequence, and only these travel: they are narrower than the stream.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.attention import Core, CoreFunction
from jaxtron.layers.cache import HEADS, KeyValues
from jaxtron.layers.config import LatentConfig, Scaling
from jaxtron.layers.inputs import LayerInputs, RotaryKey, dropout
from jaxtron.layers.linear import Linear
from jaxtron.layers.norm import Norm
from jaxtron.layers.positions import rotate
from jaxtron.sharding.rules import constrain, current, spec
from jaxtron.typing import Array, DTypeLike, Float

LATENT = ("batch", "full_seq", "latent")


class LatentAttention(nnx.Module):
    """Causal self-attention whose heads are made of latents; a part of each key is rotated, and the same in all heads.

    `rotated` says by which of the inputs' tables positions turn it (none: they do not).
    """

    def __init__(
        self,
        embed: int,
        config: LatentConfig,
        *,
        num_heads: int,
        rotated: RotaryKey | None,
        bias: bool,
        norm: Callable[[int], Norm],
        core: CoreFunction,
        std: float,
        output_std: float,
        dropout: float,
        rngs: nnx.Rngs,
        scaling: Scaling = "none",
    ) -> None:
        self.rank, self.plain, self.rotated = config.kv_lora_rank, config.qk_nope_head_dim, rotated
        self.core = core
        self.dropout = dropout
        queries = config.q_lora_rank
        given: Any = {"std": std, "rngs": rngs, "scaling": scaling}
        stream, heads = {"embed": embed}, {"heads": num_heads}
        self.query_down = Linear(stream, {"latent": queries}, bias=bias, **given) if queries else None
        self.query_norm = norm(queries) if queries else None
        # as of other matrices, what ZeRO shares of those from latents is their input
        self.query = Linear({"embed": queries or embed}, {**heads, "head_dim": config.key_dim}, bias=False, **given)
        self.down = Linear(stream, {"latent": self.rank + config.qk_rope_head_dim}, bias=bias, **given)
        self.norm = norm(self.rank)
        both = self.plain + config.v_head_dim
        self.up = Linear({"embed": self.rank}, {**heads, "head_dim": both}, bias=False, **given)
        self.output = Linear(
            {**heads, "head_dim": config.v_head_dim}, stream, bias=bias, std=output_std, rngs=rngs, scaling=scaling
        )

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        # on one tensor part a sequence that is not named as split is multiplied as one matrix
        part = "seq" if current().parts("tensor") > 1 else "full_seq"
        attended = self.core(*self._heads(x, inputs, part), None, None, inputs)
        y = self.output(attended, "batch", "seq", "embed", inputs=inputs)
        return dropout(y, self.dropout, inputs, "batch", "seq", "embed")

    def start(self, rows: int, room: int, most: int, dtype: DTypeLike) -> KeyValues:
        """As `Attention.start`: keys and values of all heads are remembered, and not the latents."""
        assert isinstance(self.core, Core)
        num_heads, dim = self.query.kernel[...].shape[1:]
        dims = (dim, self.up.kernel[...].shape[2] - self.plain)
        return self.core.empty(rows, num_heads, room, most, dims, dtype)

    def advance(
        self, x: Float[Array, "B S E"], memory: KeyValues, inputs: LayerInputs
    ) -> tuple[Float[Array, "B S E"], KeyValues]:
        """As `Attention.advance`."""
        assert isinstance(self.core, Core)
        attended, memory = self.core.advance(*self._heads(x, inputs, "full_seq"), None, None, memory, inputs)
        return self.output(attended, "batch", "full_seq", "embed", inputs=inputs), memory

    def _heads(
        self, x: Float[Array, "B S E"], inputs: LayerInputs, part: str
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B S H D"], Float[Array, "B S H V"]]:
        """Queries, keys and values; latents are made of positions that lie as `part` says."""
        queries = x = constrain(x, "batch", part, "embed")
        if self.query_down is not None and self.query_norm is not None:
            queries = self.query_norm(self.query_down(x, "batch", part, "latent", inputs=inputs))
        query = self.query(constrain(queries, *LATENT), *HEADS, inputs=inputs)
        down = self.down(x, "batch", part, "latent", inputs=inputs)
        both = self.up(constrain(self.norm(down[..., : self.rank]), *LATENT), *HEADS, inputs=inputs)
        shared = constrain(down[..., self.rank :], *LATENT)[:, :, None]
        turned = query[..., self.plain :]
        if self.rotated is not None:
            tables = inputs.rotary[self.rotated]
            turned, shared = rotate(turned, tables), rotate(shared, tables)
        # its layout is given: the gradient is then summed over a device's heads, and not gathered before that
        shared = jnp.broadcast_to(shared, turned.shape, out_sharding=spec(*HEADS))
        query = jnp.concatenate([query[..., : self.plain], turned], -1)
        key = jnp.concatenate([both[..., : self.plain], shared], -1)
        return query, key, both[..., self.plain :]
