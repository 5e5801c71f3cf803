"""Experts that take so many tokens of a sequence and no more: decided on whole sequences, so the same on every mesh."""

import jax
import jax.numpy as jnp

from jaxtron.layers.moe.config import MoeConfig
from jaxtron.sharding.context import positions
from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import current, spec
from jaxtron.typing import Array, Float, Int, Key

TOKENS = ("batch", "seq", None)


def drop_excess(
    config: MoeConfig, chosen: Int[Array, "B S K"], weights: Float[Array, "B S K"], keys: Key[Array, "B"] | None
) -> Int[Array, "B S K"]:
    """`chosen` with `num_experts` for choices of an expert that is full; without gradient.

    A token's choices are a few numbers, so every device gets those of whole sequences; how tokens travel is another
    matter.
    """
    rules = current()
    tensor, context = rules.axes("tensor"), rules.axes("context")
    parts = rules.parts("context")

    def local(chosen: Array, weights: Array, *keys: Array) -> Array:
        rows, own, _ = chosen.shape
        here = positions(rules.context, parts, own * rules.parts("tensor"))
        part = jax.lax.axis_index(tensor) * own
        place = jnp.broadcast_to(jax.lax.dynamic_slice_in_dim(here, part, own), (rows, own))
        whole, of_whole, places = (_whole(_whole(x, tensor), context) for x in (chosen, weights, place))
        limit = config.capacity(whole.shape[1])
        kept = jax.vmap(lambda *row: _within(config, limit, *row))(whole, of_whole, places, *keys)
        mine = jax.lax.axis_index((*context, *tensor)) * own
        return jnp.where(jax.lax.dynamic_slice_in_dim(kept, mine, own, 1), chosen, config.num_experts)

    layout = spec(*TOKENS)
    given = (chosen, jax.lax.stop_gradient(weights), *(() if keys is None else (keys,)))
    specs = (layout, layout, *(() if keys is None else (spec("batch"),)))
    return on_each_device(local, specs, layout)(*given)


def _whole(x: Array, axes: tuple[str, ...]) -> Array:
    """Of whole sequences, their parts in the order of the devices."""
    return jax.lax.all_gather(x, axes, axis=1, tiled=True)


def _within(
    config: MoeConfig, limit: int, chosen: Array, weights: Array, places: Array, key: Array | None = None
) -> Array:
    """Of one sequence, whether a choice is among those that its expert takes."""
    experts = chosen.reshape(-1)
    by_place = (places[:, None] * config.top_k + jnp.arange(config.top_k)).reshape(-1)
    match config.drop:
        case "position":
            first = by_place
        case "probability":
            first = -weights.reshape(-1)
        case "random":
            # where nothing is drawn, as in validation, by position
            first = by_place if key is None else jax.random.bits(key, by_place.shape)[by_place]
    numbers = jnp.arange(experts.size)
    sorted_experts, _, _, pair = jax.lax.sort((experts, first, by_place, numbers), num_keys=3)
    # a pair's place among those of its expert
    place = numbers - jnp.searchsorted(sorted_experts, sorted_experts, side="left")
    return jnp.zeros(experts.shape, bool).at[pair].set(place < limit).reshape(chosen.shape)
