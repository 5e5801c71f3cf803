"""Attention's core by a kernel: scores are never whole, and a sequence may lie on several devices."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.kernels.attention.attention import with_sinks
from jaxtron.kernels.attention.choose import Choice, Shapes, choose
from jaxtron.kernels.attention.mask import Mask
from jaxtron.layers import context_parallel
from jaxtron.layers.config import AttentionConfig
from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.keep import kept
from jaxtron.sharding.regions import over_tensor
from jaxtron.sharding.rules import constrain, current
from jaxtron.typing import Array, Float, Int

# sequences up to which whole scores are affordable where no kernel is at hand
SHORT = 4096


def chosen(config: AttentionConfig, mask: Mask, rate: float, shapes: Shapes, *, kind: str, parts: int) -> Choice | None:
    """Who computes the core for queries, keys and values of these `shapes`; None: whole scores.

    Those are for probabilities dropped at `rate`, and for short sequences where `auto` has no kernel. `kind` is that of
    the devices (`jax.Device.device_kind`), `parts` how many a sequence lies on. `UserError` where the implementation
    asked for cannot.
    """
    if rate:
        return None
    choice = choose(
        config.implementation,
        shapes,
        mask,
        kind,
        needs_lse=parts > 1 or config.sinks,
        deterministic=config.deterministic,
    )
    is_plain = parts == 1 and shapes[0].shape[1] <= SHORT and not config.sinks and config.soft_cap is None
    return None if config.implementation == "auto" and choice.name == "xla" and is_plain else choice


def core(
    query: Float[Array, "B S H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    slopes: Float[Array, "H"] | None,
    sinks: Float[Array, "H"] | None,
    inputs: LayerInputs,
    *,
    mask: Mask,
    choice: Choice,
) -> Float[Array, "B S H D"]:
    """Causal attention by an implementation of `kernels/attention`, over the whole sequence wherever it lies."""
    query, key, value = (constrain(x, "batch", "full_seq", "heads", "head_dim") for x in (query, key, value))
    if not choice.has_lse:
        attended: Array = attend(query, key, value, mask, choice)
        return attended
    mixed: tuple[Array, Array] = mix(query, key, value, slopes, inputs.segments, mask, choice)
    out, lse = mixed
    return out if sinks is None else with_sinks(out, lse, sinks)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def mix(
    query: Float[Array, "B S H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    slopes: Float[Array, "H"] | None,
    segments: Int[Array, "B S"] | None,
    mask: Mask,
    choice: Choice,
) -> tuple[Float[Array, "B S H D"], Float[Array, "B H S"]]:
    """Values mixed by the causal softmax, and the log-sum-exp; the backward keeps both beside its inputs."""
    return _mix(query, key, value, slopes, segments, mask, choice)


def _mix(
    query: Array,
    key: Array,
    value: Array,
    slopes: Array | None,
    segments: Array | None,
    mask: Mask,
    choice: Choice,
) -> tuple[Array, Array]:
    def local(query: Array, key: Array, value: Array, slopes: Array | None, segments: Array | None) -> tuple:
        own, rules = _with_arrays(mask, slopes, segments), current()
        if rules.parts("context") == 1:
            return choice.forward(query, key, value, own)
        return context_parallel.forward(query, key, value, own, choice, rules.context, rules.parts("context"))

    return _over_heads(local, (_heads(), _statistics()))(query, key, value, slopes, segments)


def _forward(
    query: Array, key: Array, value: Array, slopes: Array | None, segments: Array | None, mask: Mask, choice: Choice
) -> tuple[tuple[Array, Array], tuple]:
    out, lse = _mix(query, key, value, slopes, segments, mask, choice)
    out, lse = kept(out), kept(lse)
    return (out, lse), (query, key, value, slopes, segments, out, lse)


def _backward(
    mask: Mask, choice: Choice, residuals: tuple, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None, None]:
    def local(
        query: Array,
        key: Array,
        value: Array,
        slopes: Array | None,
        segments: Array | None,
        out: Array,
        lse: Array,
        dout: Array,
        dlse: Array,
    ) -> tuple[Array, Array, Array]:
        own, rules = _with_arrays(mask, slopes, segments), current()
        delta = jnp.swapaxes(jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1), 1, 2) - dlse
        parts = (query, key, value, lse, delta, dout, own)
        if rules.parts("context") == 1:
            return choice.backward(*parts)
        return context_parallel.backward(*parts, choice, rules.context, rules.parts("context"))

    dquery, dkey, dvalue = _over_heads(local, (_heads(),) * 3)(*residuals, *cotangents)
    return dquery, dkey, dvalue, None, None


mix.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend(
    query: Float[Array, "B S H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    mask: Mask,
    choice: Choice,
) -> Float[Array, "B S H D"]:
    """As `mix` by an implementation that tells no log-sum-exp: its own derivative, and so its forward once more."""

    def local(query: Array, key: Array, value: Array, *_: None) -> Array:
        return choice.module.attend(query, key, value, mask)

    return _over_heads(local, _heads())(query, key, value, None, None)


def _attend_forward(
    query: Array, key: Array, value: Array, mask: Mask, choice: Choice
) -> tuple[Array, tuple[Array, Array, Array]]:
    return attend(query, key, value, mask, choice), (query, key, value)


def _attend_backward(mask: Mask, choice: Choice, residuals: tuple, cotangent: Array) -> tuple[Array, Array, Array]:
    # inside one region: of what a derivative across regions keeps, JAX would name axes that are manual already
    def local(query: Array, key: Array, value: Array, _slopes: None, _segments: None, cotangent: Array) -> tuple:
        return jax.vjp(lambda *heads: choice.module.attend(*heads, mask), query, key, value)[1](cotangent)

    return _over_heads(local, (_heads(),) * 3)(*residuals, None, None, cotangent)


attend.defvjp(_attend_forward, _attend_backward)


def _with_arrays(mask: Mask, slopes: Array | None, segments: Array | None) -> Mask:
    return replace(mask, slopes=slopes, q_segments=segments, kv_segments=segments)


def _over_heads(local, out_specs):
    """`local` on each device's heads; what is None has no spec."""

    def run(query, key, value, slopes, segments, *rest):
        heads, statistics = _heads(), _statistics()
        per_head = None if slopes is None else PartitionSpec(current().axes("tensor"))
        specs = (heads, heads, heads, per_head, None if segments is None else PartitionSpec())
        # of backwards: output, log-sum-exp and their cotangents, or the output's cotangent alone
        specs += (heads,) if len(rest) == 1 else (heads, statistics, heads, statistics)[: len(rest)]
        return over_tensor(local, specs, out_specs)(query, key, value, slopes, segments, *rest)

    return run


def _heads() -> PartitionSpec:
    """Of one device's [batch, sequence, heads, dim], with its heads."""
    return PartitionSpec(None, None, current().axes("tensor"))


def _statistics() -> PartitionSpec:
    """Of its [batch, heads, sequence]."""
    return PartitionSpec(None, current().axes("tensor"))
