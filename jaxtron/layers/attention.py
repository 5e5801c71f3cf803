"""Self-attention with multi-head, grouped and multi-query heads."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtron.layers.inputs import LayerInputs, dropout
from jaxtron.layers.linear import Linear, project
from jaxtron.layers.norm import Norm
from jaxtron.layers.positions import alibi_slopes, rotate
from jaxtron.sharding import constrain, current, spec
from jaxtron.typing import Array, Float

Core = Callable[..., Float[Array, "B S H D"]]


class Attention(nnx.Module):
    """Causal self-attention: projections to heads, the core, and the projection back.

    Queries and keys/values are stored apart, so that a checkpoint does not depend on the mesh; where key/value heads
    are split like query heads, the weights are joined by group and one product serves all three.
    """

    def __init__(
        self,
        embed: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        output_bias: bool,
        qk_norm: Callable[[int], Norm] | None,
        alibi: bool,
        core: Core,
        std: float,
        output_std: float,
        dropout: float,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_groups = num_heads // num_kv_heads
        self.core = core
        self.dropout = dropout
        self.slopes = tuple(float(slope) for slope in alibi_slopes(num_heads)) if alibi else None
        heads, kv_heads = {"heads": num_heads}, {"kv_heads": num_kv_heads}
        dims = {"head_dim": head_dim}
        self.query = Linear({"embed": embed}, {**heads, **dims}, bias=qkv_bias, std=std, rngs=rngs)
        self.key = Linear({"embed": embed}, {**kv_heads, **dims}, bias=qkv_bias, std=std, rngs=rngs)
        self.value = Linear({"embed": embed}, {**kv_heads, **dims}, bias=qkv_bias, std=std, rngs=rngs)
        self.output = Linear({**heads, **dims}, {"embed": embed}, bias=output_bias, std=output_std, rngs=rngs)
        self.query_norm = qk_norm(head_dim) if qk_norm else None
        self.key_norm = qk_norm(head_dim) if qk_norm else None

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        x = constrain(x, "batch", "full_seq", "embed")
        query, key, value = self._project(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if inputs.rotary is not None:
            query, key = rotate(query, inputs.rotary), rotate(key, inputs.rotary)
        mixed = self.core(query, key, value, self.slopes, inputs)
        y = self.output(mixed, "batch", "seq", "embed")
        return dropout(y, self.dropout, inputs, "batch", "seq", "embed")

    def _project(
        self, x: Float[Array, "B S E"]
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
        num_kv_heads = self.key.kernel[...].shape[1]
        if not current().splits("kv_heads", num_kv_heads):
            return self._project_shared(x)
        groups = self.num_groups
        joined = project(x, self._join("kernel"), ("batch", "full_seq", "kv_heads", "gate", "head_dim"))
        if self.query.bias is not None:
            joined = joined + self._join("bias").astype(joined.dtype)
        query = joined[:, :, :, :groups]
        query = query.reshape(*query.shape[:2], num_kv_heads * groups, query.shape[-1])
        return query, joined[:, :, :, groups], joined[:, :, :, groups + 1]

    def _join(self, name: str) -> Array:
        """Weights as [..., key/value head, queries of its group then key then value, head dim] (Megatron's order)."""
        query, key, value = (getattr(layer, name)[...] for layer in (self.query, self.key, self.value))
        key, value = jnp.expand_dims(key, -2), jnp.expand_dims(value, -2)
        shape = (*key.shape[:-2], self.num_groups, key.shape[-1])
        # told where to lie: a split of the heads into one group would name the mesh axis on the queries instead
        query = jnp.reshape(query, shape, out_sharding=jax.typeof(key).sharding.spec)
        return jnp.concatenate([query, key, value], -2)

    def _project_shared(
        self, x: Float[Array, "B S E"]
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B S H D"], Float[Array, "B S H D"]]:
        """Fewer key/value heads than tensor parts: all are computed everywhere, and each part takes what it needs."""
        query = self.query(x, "batch", "full_seq", "heads", "head_dim")
        heads = []
        for layer in (self.key, self.value):
            shared = layer(x, "batch", "full_seq", None, "head_dim")
            copies = jnp.repeat(
                shared, self.num_groups, axis=2, out_sharding=spec("batch", "full_seq", None, "head_dim")
            )
            heads.append(constrain(copies, "batch", "full_seq", "heads", "head_dim"))
        return query, heads[0], heads[1]


def attention_core(rate: float) -> Core:
    """Plain causal attention with float32 softmax; `rate` is the dropout of the probabilities.

    Memory is quadratic in the sequence; the scores of one layer live until its backward unless recomputed.
    """

    def core(
        query: Float[Array, "B S H D"],
        key: Float[Array, "B S K D"],
        value: Float[Array, "B S K D"],
        slopes: tuple[float, ...] | None,
        inputs: LayerInputs,
    ) -> Float[Array, "B S H D"]:
        rows, length, num_heads, head_dim = query.shape
        num_kv_heads = key.shape[2]
        grouped = query.reshape(rows, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
        grouped = grouped * jnp.asarray(head_dim**-0.5, grouped.dtype)
        scores_spec = spec("batch", "kv_heads", None, "full_seq", "full_seq")
        scores = jnp.einsum(
            "bskgd,btkd->bkgst", grouped, key, preferred_element_type=jnp.float32, out_sharding=scores_spec
        )
        queries, keys = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
        if slopes is not None:
            per_head = constrain(jnp.asarray(slopes, jnp.float32).reshape(num_kv_heads, -1), "kv_heads", None)
            scores = scores - per_head[:, :, None, None] * (queries - keys).astype(jnp.float32)
        scores = jnp.where(keys <= queries, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, -1).astype(value.dtype)
        weights = dropout(weights, rate, inputs.fold(1), "batch", "kv_heads", "gate", "full_seq", "full_seq")
        mixed_spec = spec("batch", "full_seq", "kv_heads", None, "head_dim")
        mixed = jnp.einsum("bkgst,btkd->bskgd", weights, value, out_sharding=mixed_spec)
        return mixed.reshape(rows, length, num_heads, head_dim)

    return core
