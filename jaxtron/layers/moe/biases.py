"""Biases of experts on the rows that are theirs: of what enters the activation, and of what leaves an expert.

The second is put on with the router's weight, like all that leaves one. Devices that share an expert's width add up
their parts of its output: the first of them adds the bias, once.
"""

import jax
import jax.numpy as jnp

from jaxtron.kernels.grouped_matmul.spec import TILE
from jaxtron.layers.moe.exchange import Exchange, Turn
from jaxtron.typing import Array, Float


def add_bias(
    exchange: Exchange, turn: Turn, hidden: Float[Array, "*rows G F"], bias: Float[Array, "N G F"] | None
) -> Float[Array, "*rows G F"]:
    """What enters the activation, with its bias."""
    return hidden if bias is None else hidden + _by_row(exchange, turn, bias).astype(hidden.dtype)


def add_output_bias(
    exchange: Exchange,
    turn: Turn,
    out: Float[Array, "*rows E"],
    bias: Float[Array, "N E"] | None,
    weights: Float[Array, "*rows 1"],
) -> Float[Array, "*rows E"]:
    """What leaves the experts, with its bias times the weight of the row."""
    if bias is None:
        return out
    return out + (_by_row(exchange, turn, _of_first(exchange, bias)) * weights).astype(out.dtype)


def add_weight_gradient(
    exchange: Exchange,
    turn: Turn,
    gradient: Float[Array, "*rows 1"],
    bias: Float[Array, "N E"] | None,
    cotangent: Float[Array, "*rows E"],
) -> Float[Array, "*rows 1"]:
    """The gradient of the rows' weights, with what it has of `add_output_bias`."""
    if bias is None:
        return gradient
    products = _by_row(exchange, turn, _of_first(exchange, bias)) * cotangent.astype(jnp.float32)
    return gradient + jnp.sum(products, -1, keepdims=True)


def bias_gradient(exchange: Exchange, turn: Turn, cotangent: Float[Array, "*rows O"]) -> Float[Array, "N O"]:
    """Of the bias of what enters the activation: the sums over an expert's rows, in float32."""
    if turn.groups is None:
        return jnp.sum(cotangent, 1, dtype=jnp.float32)
    tiles = jnp.sum(cotangent.reshape(-1, TILE, cotangent.shape[-1]), 1, dtype=jnp.float32)
    is_own = turn.groups.tile_experts == jnp.arange(exchange.own_experts)[:, None]
    # what empty tiles have is not known, and can be no number
    tiles = jnp.where(is_own.any(0)[:, None], tiles, 0.0)
    return jnp.matmul(is_own.astype(jnp.float32), tiles, precision=jax.lax.Precision.HIGHEST)


def output_bias_gradient(
    exchange: Exchange, turn: Turn, cotangent: Float[Array, "*rows E"], weights: Float[Array, "*rows 1"]
) -> Float[Array, "N E"]:
    """Of the bias of what leaves the experts, in float32."""
    return _of_first(exchange, bias_gradient(exchange, turn, cotangent * weights))


def _by_row(exchange: Exchange, turn: Turn, bias: Float[Array, "N *O"]) -> Float[Array, "*rows"]:
    """The bias of each row's expert, or what broadcasts to it."""
    if turn.groups is None:
        return bias[:, None]
    tiles = bias.at[turn.groups.tile_experts].get(mode="fill", fill_value=0)
    return jnp.broadcast_to(tiles[:, None], (len(tiles), TILE, *bias.shape[1:])).reshape(-1, *bias.shape[1:])


def _of_first(exchange: Exchange, array: Array) -> Array:
    """Zeros on all devices that share experts' width but the first."""
    if not exchange.expert_tensor:
        return array
    return jnp.where(jax.lax.axis_index(exchange.expert_tensor) == 0, array, 0.0)
