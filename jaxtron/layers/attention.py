"""Self-attention with multi-head, grouped and multi-query heads."""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxtron.kernels.attention.mask import Mask, allowed
from jaxtron.layers.inputs import LayerInputs, drop, dropout, dropout_mask
from jaxtron.layers.keep import kept
from jaxtron.layers.linear import Linear, project
from jaxtron.layers.norm import Norm
from jaxtron.layers.positions import alibi_slopes, rotate
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import constrain, current, spec
from jaxtron.typing import Array, Bool, Float

Core = Callable[..., Float[Array, "B S H D"]]

CAUSAL = Mask()

# axes of what the core computes with, query heads by the key/value head that they share
QUERIES = ("batch", "full_seq", "kv_heads", "gate", "head_dim")
KEYS = ("batch", "full_seq", "kv_heads", "head_dim")
SCORES = ("batch", "kv_heads", "gate", "full_seq", "full_seq")


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
        sinks: bool,
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
        self.sinks = parameter(rngs, initializers.zeros, (num_heads,), axes=("heads",), role="bias") if sinks else None
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
        slopes = None if self.slopes is None else constrain(jnp.asarray(self.slopes, jnp.float32), "heads")
        sinks = None if self.sinks is None else constrain(self.sinks[...], "heads")
        mixed = kept(self.core(query, key, value, slopes, sinks, inputs))
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
            rows, length, num_heads, head_dim = shared.shape
            # plain shapes: inside `jnp.repeat` axes are of another kind, which `pipeline/split.py` would cut into
            copies = jnp.broadcast_to(shared[:, :, :, None], (rows, length, num_heads, self.num_groups, head_dim))
            copies = copies.reshape(rows, length, -1, head_dim)
            heads.append(constrain(copies, "batch", "full_seq", "heads", "head_dim"))
        return query, heads[0], heads[1]


def attention_core(rate: float, mask: Mask = CAUSAL) -> Core:
    """Plain attention with float32 softmax; `rate` is the dropout of the probabilities.

    `mask` says who attends to whom, and the scale of scores; it has no soft cap. Memory is quadratic in the sequence:
    the probabilities of one layer live until its backward unless recomputed.
    """

    def core(
        query: Float[Array, "B S H D"],
        key: Float[Array, "B S K D"],
        value: Float[Array, "B S K D"],
        slopes: Float[Array, "H"] | None,
        sinks: None,
        inputs: LayerInputs,
    ) -> Float[Array, "B S H D"]:
        assert sinks is None and mask.soft_cap is None, "whole scores have neither sinks nor a soft cap"
        rows, length, num_heads, head_dim = query.shape
        num_kv_heads = key.shape[2]
        num_groups = num_heads // num_kv_heads
        grouped = query.reshape(rows, length, num_kv_heads, num_groups, head_dim)
        grouped = grouped * jnp.asarray(mask.factor(head_dim), grouped.dtype)
        per_head = None
        if slopes is not None:
            per_head = constrain(slopes.reshape(num_kv_heads, num_groups), "kv_heads", None)
        shape = (rows, num_kv_heads, num_groups, length, length)
        drops = dropout_mask(shape, rate, inputs.fold(1), *SCORES)
        attends = allowed(replace(mask, q_segments=inputs.segments, kv_segments=inputs.segments), length, length)
        # laid out for `mix`, whose backward lays their gradients out so
        grouped, key, value = constrain(grouped, *QUERIES), constrain(key, *KEYS), constrain(value, *KEYS)
        mixed: Array = mix(grouped, key, value, per_head, attends[:, None, None], drops, rate)
        return mixed.reshape(rows, length, num_heads, head_dim)

    return core


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def mix(
    query: Float[Array, "B S K G D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    slopes: Float[Array, "K G"] | None,
    attends: Bool[Array, "#B 1 1 S T"],
    mask: Bool[Array, "B K G S T"] | None,
    rate: float,
) -> Float[Array, "B S K G D"]:
    """Values mixed by the softmax of `query . key` less ALiBi's `slopes` times distance; `mask` is dropout's.

    Beside its inputs the backward keeps the probabilities in the values' precision, the mask as their sign.
    """
    return _mix(query, key, value, slopes, attends, mask, rate)[0]


def _mix(
    query: Array, key: Array, value: Array, slopes: Array | None, attends: Array, mask: Array | None, rate: float
) -> tuple[Array, Array]:
    """What is mixed, and the probabilities, negative where dropped."""
    scores = _score(query, key, jnp.float32)
    if slopes is not None:
        queries, keys = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])[None, :]
        scores = scores - slopes[:, :, None, None] * (queries - keys).astype(jnp.float32)
    scores = jnp.where(attends, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, -1).astype(value.dtype)
    dropped: Array = weights if mask is None else drop(weights, mask, rate)
    return _weigh(dropped, value), weights if mask is None else jnp.where(mask, weights, -weights)


def _score(query: Array, key: Array, dtype: jnp.dtype) -> Array:
    return jnp.einsum("bskgd,btkd->bkgst", query, key, preferred_element_type=dtype, out_sharding=spec(*SCORES))


def _weigh(weights: Array, value: Array) -> Array:
    return jnp.einsum("bkgst,btkd->bskgd", weights, value, out_sharding=spec(*QUERIES))


def _mix_forward(
    query: Array, key: Array, value: Array, slopes: Array | None, attends: Array, mask: Array | None, rate: float
) -> tuple[Array, tuple]:
    mixed, signed = _mix(query, key, value, slopes, attends, mask, rate)
    # an empty tuple stands for a mask: there was one
    return mixed, (query, key, value, kept(signed), None if mask is None else ())


def _mix_backward(rate: float, residuals: tuple, cotangent: Array) -> tuple[Array, Array, Array, None, None, None]:
    query, key, value, signed, masked = residuals
    weights = dropped = signed
    mask = None
    if masked is not None:
        weights, mask = jnp.abs(signed), signed > 0
        dropped = drop(weights, mask, rate)
    # the products' own transposes: those written out as einsums cost a CPU more copies
    pulled: Array
    pulled, dvalue = jax.vjp(_weigh, dropped, value)[1](cotangent)
    if mask is not None:
        pulled = drop(pulled, mask, rate)
    weights, pulled = weights.astype(jnp.float32), pulled.astype(jnp.float32)
    dscores = weights * (pulled - jnp.sum(pulled * weights, -1, keepdims=True))
    score = functools.partial(_score, dtype=query.dtype)
    dquery, dkey = jax.vjp(score, query, key)[1](dscores.astype(query.dtype))
    return dquery, dkey, dvalue, None, None, None


mix.defvjp(_mix_forward, _mix_backward)
