"""Attention by cuDNN's fused kernels, which XLA calls: plain causal or full attention on NVIDIA GPUs since Ampere.

JAX's public function does not return the log-sum-exp in float32, and takes no cotangent of it: so this one has no
`forward` and `backward` pair but `attend`, differentiated by JAX's own rule, for callers that need the output alone.
"""

import functools
import re

import jax

from jaxtron.config import UserError
from jaxtron.kernels.attention.mask import Mask
from jaxtron.typing import Array, Float

NVIDIA = re.compile(r"nvidia|tesla|geforce|quadro", re.IGNORECASE)
# Pascal, Volta, Turing: before the fused kernels
OLDER = re.compile(r"\b(P100|P40|P4|V100|T4|TITAN|RTX 20\d\d|GTX)\b|Quadro RTX", re.IGNORECASE)
# Hopper and Blackwell compute with heads up to 256
WIDER = re.compile(r"\b(H100|H200|H800|H20|GH200|B100|B200|B300|GB200|GB300)\b", re.IGNORECASE)


def refusal(q: Array, k: Array, v: Array, mask: Mask, device_kind: str) -> str | None:
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
    return _refusal_of_mask(q.shape[1], k.shape[1], mask) or _missing()


def _refusal_of_mask(num_queries: int, num_keys: int, mask: Mask) -> str | None:
    given = {
        "segments (packed documents)": mask.q_segments is not None or mask.kv_segments is not None,
        "soft cap": mask.soft_cap is not None,
        "slopes (ALiBi)": mask.slopes is not None,
    }
    for name, present in given.items():
        if present:
            return f"it knows no {name}"
    # traced ones too: their values are unknown here
    if not all(isinstance(offset, int) and offset == 0 for offset in (mask.q_offset, mask.kv_offset)):
        return "its positions start at 0: it knows no offsets of queries and keys"
    if mask.window is not None and not mask.causal:
        return "its windows are causal"
    if mask.window is not None and num_queries > num_keys:
        return f"its windows need a key at each of the {num_queries} queries' positions, not {num_keys} keys"
    return None


def _missing() -> str | None:
    """That JAX finds no cuDNN on this machine, in its words; its public function looks when it is traced."""
    heads = jax.ShapeDtypeStruct((1, 64, 1, 64), "bfloat16")
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), heads, heads, heads)
    except RuntimeError as error:
        return f"JAX cannot use it here: {' '.join(str(error).split())}"
    return None


def attend(
    q: Float[Array, "B S H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], mask: Mask
) -> Float[Array, "B S H D"]:
    """What is attended to; `UserError` with JAX's words where the installed cuDNN cannot."""
    try:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=mask.factor(q.shape[-1]),
            is_causal=mask.causal,
            # keys at distances up to this one, to the left
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
            implementation="cudnn",
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"attention by cudnn failed: {text}; set model.attention.implementation to auto") from error
