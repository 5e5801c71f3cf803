"""Attention by cuDNN's fused kernels, which XLA calls: plain causal or full attention on NVIDIA GPUs since Ampere.

JAX's public function does not return the log-sum-exp in float32, and takes no cotangent of it: so the backward here
runs the forward once more, and differentiates it by JAX's own rule.
"""

import functools
import re

import jax

from jaxtron.config import UserError
from jaxtron.kernels.attention.spec import AttentionSpec, Feature, Heads
from jaxtron.typing import Array, Float

NVIDIA = re.compile(r"nvidia|tesla|geforce|quadro", re.IGNORECASE)
# Pascal, Volta, Turing: before the fused kernels
OLDER = re.compile(r"\b(P100|P40|P4|V100|T4|TITAN|RTX 20\d\d|GTX)\b|Quadro RTX", re.IGNORECASE)
# Hopper and Blackwell compute with heads up to 256
WIDER = re.compile(r"\b(H100|H200|H800|H20|GH200|B100|B200|B300|GB200|GB300)\b", re.IGNORECASE)

# its backward adds up in any order
features: frozenset[Feature] = frozenset()


def unsupported_reason(q: Heads, k: Heads, v: Heads, spec: AttentionSpec, device_kind: str) -> str | None:
    """What of this cuDNN cannot do on a device of this kind, or none."""
    if not NVIDIA.search(device_kind) or OLDER.search(device_kind):
        return f"it needs an NVIDIA GPU since Ampere, not {device_kind}"
    if str(q.dtype) not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 and float16, not {q.dtype}"
    dim, value_dim = q.shape[-1], v.shape[-1]
    widest = 256 if WIDER.search(device_kind) else 128
    if dim > widest or dim % 8:
        return f"its head dim is at most {widest} on {device_kind} and a multiple of 8, not {dim}"
    if value_dim != dim:
        return f"its values have the head dim of its queries, {dim}, not {value_dim}"
    if spec.window is not None and not spec.causal:
        return "its windows are causal"
    if spec.window is not None and q.shape[1] > k.shape[1]:
        return f"its windows need a key at each of the {q.shape[1]} queries' positions, not {k.shape[1]} keys"
    return _missing()


def _missing() -> str | None:
    """That JAX finds no cuDNN on this machine, in its words; its public function looks when it is traced."""
    heads = jax.ShapeDtypeStruct((1, 64, 1, 64), "bfloat16")
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), heads, heads, heads)
    except RuntimeError as error:
        return f"JAX cannot use it here: {' '.join(str(error).split())}"
    return None


def forward(
    q: Float[Array, "B S H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], spec: AttentionSpec
) -> tuple[Float[Array, "B S H D"], None]:
    """The output, and nothing for the backward; `UserError` with JAX's words where the installed cuDNN cannot."""
    return attend(q, k, v, spec), None


def backward(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    statistics: None,
    delta: None,
    dout: Float[Array, "B S H D"],
    spec: AttentionSpec,
) -> tuple[Float[Array, "B S H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """Gradients of queries, keys and values."""
    return jax.vjp(lambda q, k, v: attend(q, k, v, spec), q, k, v)[1](dout)


def attend(
    q: Float[Array, "B S H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], spec: AttentionSpec
) -> Float[Array, "B S H D"]:
    """The output, differentiable by JAX's own rule, which keeps what its backward needs."""
    try:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=spec.scale(q.shape[-1]),
            is_causal=spec.causal,
            # keys at distances up to this one, to the left
            local_window_size=None if spec.window is None else (spec.window - 1, 0),
            implementation="cudnn",
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"attention by cudnn failed: {text}; set model.attention.implementation to auto") from error
