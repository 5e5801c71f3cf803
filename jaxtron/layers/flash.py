"""Attention's core by a kernel: scores are never whole, and a sequence may lie on several devices."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtron.config import Config
from jaxtron.kernels.attention import Mask, choose
from jaxtron.kernels.attention.choose import Implementation
from jaxtron.layers import context_parallel
from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.keep import kept
from jaxtron.sharding import constrain, current
from jaxtron.typing import Array, Float

# sequences up to which whole scores are affordable where no kernel is at hand
SHORT = 4096


class AttentionConfig(Config):
    """Who computes attention's core."""

    implementation: Implementation = "auto"
    """auto: the fastest that can do what is asked on the mesh's devices; mosaic (Hopper), cudnn, xla (anywhere, memory
    linear in the sequence), reference (plain mathematics). Whole scores where probabilities are dropped."""


# one device's part is [batch, sequence, heads, dim] with its heads; statistics are [batch, heads, sequence]
HEADS, STATISTICS = PartitionSpec(None, None, "tensor"), PartitionSpec(None, "tensor")


def is_whole(implementation: Implementation, rate: float, length: int) -> bool:
    """Whether scores are formed whole: where they are dropped, and where `auto` has short sequences."""
    return bool(rate) or (implementation == "auto" and current().context_size == 1 and length <= SHORT)


def core(
    query: Float[Array, "B S H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    slopes: tuple[float, ...] | None,
    inputs: LayerInputs,
    *,
    implementation: Implementation,
) -> Float[Array, "B S H D"]:
    """Causal attention by an implementation of `kernels/attention`, over the whole sequence wherever it lies."""
    per_head = None if slopes is None else constrain(jnp.asarray(slopes, jnp.float32), "heads")
    query, key, value = (constrain(x, "batch", "full_seq", "heads", "head_dim") for x in (query, key, value))
    return mix(query, key, value, per_head, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def mix(
    query: Float[Array, "B S H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    slopes: Float[Array, "H"] | None,
    implementation: Implementation,
) -> Float[Array, "B S H D"]:
    """Values mixed by the causal softmax; beside its inputs the backward keeps the output and the log-sum-exp."""
    return _mix(query, key, value, slopes, implementation)[0]


def _mix(
    query: Array, key: Array, value: Array, slopes: Array | None, implementation: Implementation
) -> tuple[Array, Array]:
    def local(query: Array, key: Array, value: Array, slopes: Array | None) -> tuple[Array, Array]:
        mask, rules = Mask(slopes=slopes), current()
        run = choose(implementation, (query, key, value), mask, _device_kind()).module
        if rules.context_size == 1:
            return run.forward(query, key, value, mask)
        return context_parallel.forward(query, key, value, mask, run, rules.context, rules.context_size)

    return _over_heads(local, (HEADS, STATISTICS))(query, key, value, slopes)


def _forward(
    query: Array, key: Array, value: Array, slopes: Array | None, implementation: Implementation
) -> tuple[Array, tuple]:
    out, lse = _mix(query, key, value, slopes, implementation)
    return out, (query, key, value, slopes, kept(out), kept(lse))


def _backward(implementation: Implementation, residuals: tuple, cotangent: Array) -> tuple[Array, Array, Array, None]:
    def local(
        query: Array, key: Array, value: Array, slopes: Array | None, out: Array, lse: Array, cotangent: Array
    ) -> tuple[Array, Array, Array]:
        mask, rules = Mask(slopes=slopes), current()
        run = choose(implementation, (query, key, value), mask, _device_kind()).module
        delta = jnp.swapaxes(jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), -1), 1, 2)
        parts = (query, key, value, lse, delta, cotangent, mask)
        if rules.context_size == 1:
            return run.backward(*parts)
        return context_parallel.backward(*parts, run, rules.context, rules.context_size)

    dquery, dkey, dvalue = _over_heads(local, (HEADS, HEADS, HEADS))(*residuals, cotangent)
    return dquery, dkey, dvalue, None


mix.defvjp(_forward, _backward)


def _over_heads(local, out_specs):
    """`local` on each device's heads; a residual of None has no spec."""

    def run(query, key, value, slopes, *rest):
        specs = (HEADS, HEADS, HEADS, None if slopes is None else PartitionSpec("tensor"))
        # of the backward: output, log-sum-exp, cotangent
        specs += (HEADS, STATISTICS, HEADS)[: len(rest)]
        region = jax.shard_map(local, in_specs=specs, out_specs=out_specs, axis_names={"tensor"})
        return region(query, key, value, slopes, *rest)

    return run


def _device_kind() -> str:
    return current().mesh.devices.flat[0].device_kind
