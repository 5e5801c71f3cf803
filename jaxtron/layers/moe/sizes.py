"""How a mixture's tokens travel on the mesh in use: rows of a round, and what multiplies them."""

import math

import jax
import jax.numpy as jnp

from jaxtron.kernels.grouped_matmul.backend import has_kernel, select_backend
from jaxtron.kernels.grouped_matmul.grouped_matmul import GroupedProducts
from jaxtron.kernels.grouped_matmul.spec import TILE
from jaxtron.kernels.selection import Backend
from jaxtron.layers.moe.config import MoeConfig
from jaxtron.layers.moe.exchange import Exchange
from jaxtron.sharding.rules import current
from jaxtron.typing import DTypeLike


def select_products(
    config: MoeConfig, parts: int, kernel: tuple[int, int, int], dtype: DTypeLike, device_kind: str
) -> Backend[GroupedProducts] | None:
    """The kernel of grouped products, for experts on `parts` devices, whose kernels are [inputs, gates, outputs].

    None where a bucket is an expert; `buckets` is no `auto`. `UserError` where the one asked for cannot.
    """
    if config.buckets == "expert":
        return None
    rows = jax.ShapeDtypeStruct((TILE, kernel[0]), jnp.dtype(dtype))
    kernels = jax.ShapeDtypeStruct((config.num_experts // parts, kernel[0], kernel[1] * kernel[2]), jnp.dtype(dtype))
    return select_backend(config.implementation, rows, kernels, device_kind)


def exchange_lines(
    config: MoeConfig, shape: tuple[int, int], kernel: tuple[int, int, int], dtype: DTypeLike
) -> tuple[str, ...]:
    """What `make_exchange` chooses, for a reader: what a round has room for, and what multiplies it and why."""
    asked, config = config.buckets, with_buckets(config, shape, dtype)
    exchange, devices = make_exchange(config, shape, kernel, dtype), current().parts("expert", "expert_tensor")
    where = f"{exchange.own_experts:,}" + (f" of {config.num_experts:,}" if exchange.num_devices > 1 else "")
    gathered = f"the tokens of {devices} devices gathered, " if exchange.gathers and devices > 1 else ""
    if config.exchange == "capacity":
        rounds, why = "one round", f"all that model.moe.capacity_factor {config.capacity_factor:g} lets through"
    elif exchange.has_rounds:
        rounds, why = "rounds", f"model.moe.slots {config.slots:g}"
    else:
        rounds, why = "one round", "all that can come"
    of_what = "each" if exchange.of_bucket == 1 else f"all {exchange.of_bucket:,}"
    rows = f"{exchange.rows:,} rows"
    if exchange.pairs != exchange.rows:
        rows = f"{exchange.rows:,} tokens with {exchange.pairs:,} choices"
    line = f"experts: {where} on a device, {gathered}{rounds} of {rows} for {of_what} ({why})"
    lines = (line, _why(config, shape, dtype)) if asked == "auto" else (line,)
    products = select_products(config, exchange.num_devices, kernel, dtype, current().device_kind)
    return lines if products is None else (*lines, products.reason)


def _why(config: MoeConfig, shape: tuple[int, int], dtype: DTypeLike) -> str:
    """Why a bucket is what `with_buckets` made of `auto`."""
    found, kind = f"buckets: {config.buckets}", current().device_kind
    if config.implementation != "auto":
        return f"{found}, for model.moe.implementation {config.implementation}"
    if not has_kernel(dtype, kind):
        return f"{found}, for no kernel of grouped products takes {jnp.dtype(dtype).name} on {kind}"
    other = "expert" if config.buckets == "device" else "device"
    tokens, it, its = _tokens(config, shape), config, config.model_copy(update={"buckets": other})
    rows, others = (round(one.multiplied(*tokens)) for one in (it, its))
    return f"{found}, where load is even {rows:,} rows to multiply on a device, not the {others:,} of {other}"


def with_buckets(config: MoeConfig, shape: tuple[int, int], dtype: DTypeLike) -> MoeConfig:
    """What a bucket is for a device's tokens of [rows, parts of sequences], inside `use(rules)`."""
    rules = current()
    return config.with_buckets(*_tokens(config, shape), has_kernel=has_kernel(dtype, rules.device_kind))


def make_exchange(
    config: MoeConfig, shape: tuple[int, int], kernel: tuple[int, int, int], dtype: DTypeLike
) -> Exchange:
    """For a device's tokens of [rows, parts of sequences], inside `use(rules)`."""
    rules = current()
    axes = {flag: rules.axes(flag) if rules.parts(flag) > 1 else () for flag in ("expert", "expert_tensor")}
    config = with_buckets(config, shape, dtype)
    num_tokens, parts, _, room = _tokens(config, shape)
    backend = select_products(config, parts, kernel, dtype, rules.device_kind)
    found = config.round_of(num_tokens, parts, room)
    return Exchange(
        num_experts=config.num_experts,
        top_k=config.top_k,
        expert=axes["expert"],
        num_devices=parts,
        expert_tensor=axes["expert_tensor"],
        gathers=config.exchange == "all_gather",
        rows=found.rows,
        pairs=found.pairs,
        has_rounds=found.has_rounds,
        grouped=None if backend is None else backend.implementation,
    )


def _tokens(config: MoeConfig, shape: tuple[int, int]) -> tuple[int, int, int, int | None]:
    """Arguments of `MoeConfig.round_of`, and before its last the devices that share an expert's width."""
    rules = current()
    parts, widths = rules.parts("expert"), rules.parts("expert_tensor")
    # of tokens that are gathered a device takes what is its own, as if there were no others
    num_tokens = math.prod(shape) * (parts * widths if config.exchange == "all_gather" else 1)
    length = shape[1] * rules.parts("context", "tensor")
    room = None if config.capacity_factor is None else shape[0] * config.capacity(length)
    return num_tokens, parts, widths, room
