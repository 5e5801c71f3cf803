"""Attention's public function: one derivative for all implementations."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtron.kernels.attention.choose import Choice, choose
from jaxtron.kernels.attention.config import Implementation
from jaxtron.kernels.attention.mask import Mask, check_shapes
from jaxtron.kernels.varying import vary_alike
from jaxtron.typing import Array, Float

# names of what the backward needs beside its inputs, for policies of recomputation
OUT, LSE = "attention_out", "attention_lse"


def attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    mask: Mask,
    *,
    sinks: Float[Array, " H"] | None = None,
    implementation: Implementation = "auto",
    device_kind: str | None = None,
    needs_lse: bool = True,
    deterministic: bool = False,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"] | None]:
    """Values mixed by the softmax of masked scores, and the scores' natural log-sum-exp (none if not needed).

    Query head h reads key/value head h // (H / K). `sinks` are logits that take part in each head's softmax without a
    value (gpt-oss, 2508.10925, section 2.1); the log-sum-exp includes them. A row that may attend to nothing is 0, its
    log-sum-exp -inf. `device_kind` is that of the devices this will run on (none: those of the mesh in use, else
    JAX's default); `deterministic` gradients have the same bits in every run. `UserError` for sizes that do not fit and
    for what the implementation cannot do.
    """
    check_shapes(q, k, v, mask, sinks)
    kind = device_kind or _device_kind()
    needed = {"needs_lse": needs_lse or sinks is not None, "deterministic": deterministic}
    choice = choose(implementation, (q, k, v), mask, kind, **needed)
    if not choice.has_lse:
        return checkpoint_name(choice.module.attend(q, k, v, mask), OUT), None
    # here, where it is differentiated, and not in the implementations: gradients are summed over what did not vary
    (q, k, v), mask, sinks = vary_alike(((q, k, v), mask, sinks))
    attended: tuple[Array, Array] = _attend(choice, q, k, v, mask)
    out, lse = attended
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out, lse if needs_lse else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(choice: Choice, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
    return choice.forward(q, k, v, mask)


def _attend_forward(choice: Choice, q: Array, k: Array, v: Array, mask: Mask) -> tuple[tuple[Array, Array], tuple]:
    out, lse = choice.forward(q, k, v, mask)
    out, lse = checkpoint_name(out, OUT), checkpoint_name(lse, LSE)
    return (out, lse), (q, k, v, out, lse, mask)


def _attend_backward(choice: Choice, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple:
    q, k, v, out, lse, mask = residuals
    dout, dlse = cotangents
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1).swapaxes(1, 2) - dlse
    return *choice.backward(q, k, v, lse, delta, dout, mask), None


_attend.defvjp(_attend_forward, _attend_backward)


def with_sinks(
    out: Float[Array, "B S H V"], lse: Float[Array, "B H S"], sinks: Float[Array, " H"]
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"]]:
    """Softmax with one more logit a head, from the softmax without: its share of the sum is taken off."""
    sinks = sinks.astype(jnp.float32)[:, None]
    share = jax.nn.sigmoid(lse - sinks).swapaxes(1, 2)[..., None]
    return (out.astype(jnp.float32) * share).astype(out.dtype), jnp.logaddexp(lse, sinks)


def _device_kind() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind
