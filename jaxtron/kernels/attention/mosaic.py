"""`mosaic`: flash attention for Hopper GPUs (sm_90a), forward and backward, in Pallas on Mosaic GPU.

Sequences are padded to whole tiles and head dims to the next of `HEAD_DIMS`; what was padded leaves no trace. Under
`vmap` and inside `jax.shard_map` over batch and heads the kernels run as they are; elsewhere the partitioner would
gather their inputs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxtron.kernels.attention import mosaic_backward, mosaic_forward, mosaic_queries
from jaxtron.kernels.attention.dropout import ALIGNMENT
from jaxtron.kernels.attention.mosaic_backward import Wanted
from jaxtron.kernels.attention.mosaic_tiles import LOG2_E
from jaxtron.kernels.attention.spec import AttentionSpec, Feature, Heads
from jaxtron.kernels.dropout import scale
from jaxtron.kernels.mosaic import Target, not_hopper
from jaxtron.typing import Array, Float

HEAD_DIMS = (64, 96, 128, 192, 256)
# a multiple of every tile of the backward kernels
_BACKWARD_BLOCK = 128


features: frozenset[Feature] = frozenset(
    {"segments", "soft_cap", "alibi", "offsets", "deterministic", "dropout", "log_sum_exp"}
)


def unsupported_reason(q: Heads, k: Heads, v: Heads, spec: AttentionSpec, device_kind: str) -> str | None:
    """Why these kernels cannot compute arrays of such sizes and types on such devices, or None if they can."""
    if (reason := not_hopper(device_kind)) is not None:
        return reason
    if jnp.dtype(q.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"its kernels take bfloat16 and float16, not {q.dtype}"
    widest = max(q.shape[3], v.shape[3])
    if widest > HEAD_DIMS[-1]:
        return f"its kernels take head dims up to {HEAD_DIMS[-1]}, not {widest}"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "its kernels take no empty arrays"
    for offset in (spec.q_offset, spec.kv_offset):
        if spec.dropout_rate and isinstance(offset, int) and offset % ALIGNMENT:
            return f"where it drops, pieces of a sequence start at multiples of {ALIGNMENT}, not at {offset}"
    return None


def forward(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    spec: AttentionSpec,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"]]:
    """Output and natural log-sum-exp; `interpret` takes `InterpretGPUParams` to run on a CPU."""
    queries, keys, value_dim = q.shape[1], k.shape[1], v.shape[3]
    scale = spec.scale(q.shape[3])
    head_dim, wide_value = _head_dims(q, v)
    shape = mosaic_forward.Shape.of(head_dim, wide_value, keys, spec)
    q = _pad(q, shape.block_queries, head_dim)
    k, v = _pad(k, shape.block_keys, head_dim), _pad(v, shape.block_keys, wide_value)
    spec = _pad_segments(spec, q.shape[1], k.shape[1])
    out, lse = mosaic_forward.forward(q, k, v, spec, keys, queries, scale, Target(interpret))
    return out[:, :queries, :, :value_dim], lse[:, :, :queries]


def backward(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    lse: Float[Array, "B H S"],
    delta: Float[Array, "B H S"],
    dout: Float[Array, "B S H V"],
    spec: AttentionSpec,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "B S H D"], Float[Array, "B T K D"], Float[Array, "B T K V"]]:
    """dq, dk, dv; `delta` is rowsum(dout * out) less the gradient of `lse`. `interpret` is as in `forward`, but Pallas'
    interpreter has to be taught copies that add (tests/kernels/tensor_cores.py).

    Head dims up to 128 take one kernel of five products that adds up dq in any order. A deterministic one
    takes two (seven products), as larger heads always do, or three (eight) where dk and dv do not fit into the
    registers together.
    """
    widths, target = (q.shape[3], v.shape[3]), Target(interpret)
    sizes, score_scale = (q.shape[1], k.shape[1]), spec.scale(q.shape[3])
    head_dim, value_dim = _head_dims(q, v)
    # halves of 96 columns are no whole tiles of any swizzle
    head_dim = 128 if head_dim == 96 else head_dim
    q, dout = _pad(q, _BACKWARD_BLOCK, head_dim), _pad(dout, _BACKWARD_BLOCK, value_dim)
    k, v = _pad(k, _BACKWARD_BLOCK, head_dim), _pad(v, _BACKWARD_BLOCK, value_dim)
    missing = ((0, 0), (0, 0), (0, q.shape[1] - sizes[0]))
    # a weight is exp2(score - lse): 0 of a query that attends to nothing, and of padding
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E)
    lse, delta = jnp.pad(lse, missing, constant_values=jnp.inf), jnp.pad(delta, missing)
    if spec.dropout_seeds is not None:
        # the kernels' last factor, for their sums over weights that stay, is not for delta
        delta = delta / scale(spec.dropout_rate)
    spec = _pad_segments(spec, q.shape[1], k.shape[1])
    given = (q, k, v, dout, lse, delta, spec, sizes, score_scale)
    dq, dk, dv = _gradients(given, spec.deterministic or max(head_dim, value_dim) > 128, target)
    return (
        dq[:, : sizes[0], :, : widths[0]].astype(q.dtype),
        dk[:, : sizes[1], :, : widths[0]],
        dv[:, : sizes[1], :, : widths[1]],
    )


def _gradients(given: tuple, separate: bool, target: Target) -> tuple[Array, Array, Array]:
    """dq, dk, dv of padded inputs; `separate`: dq by a kernel of its own."""
    by_keys = functools.partial(mosaic_backward.backward, *given, target=target)
    # before JAX 0.11 a kernel cannot add to a buffer that it is given
    if not separate and jax.__version_info__ >= (0, 11):
        dq, dk, dv = by_keys(wanted=Wanted(dq=True, dk=True, dv=True))
    else:
        dq = mosaic_queries.backward(*given, target=target)
        if given[0].shape[3] + given[2].shape[3] <= 256:
            _, dk, dv = by_keys(wanted=Wanted(dq=False, dk=True, dv=True))
        else:
            _, dk, _ = by_keys(wanted=Wanted(dq=False, dk=True, dv=False))
            _, _, dv = by_keys(wanted=Wanted(dq=False, dk=False, dv=True))
    assert dq is not None and dk is not None and dv is not None, "these are the gradients that were wanted"
    return dq, dk, dv


def _head_dims(q: Array, v: Array) -> tuple[int, int]:
    """Head and value dim of the kernels that fit these."""
    head_dim, value_dim = (next(dim for dim in HEAD_DIMS if dim >= array.shape[3]) for array in (q, v))
    return head_dim, value_dim


def _pad(array: Array, block: int, width: int) -> Array:
    """[B, S, H, D] with zeros to whole blocks of positions and to `width`; as it is where it fits."""
    missing = ((0, 0), (0, -array.shape[1] % block), (0, 0), (0, width - array.shape[3]))
    return jnp.pad(array, missing) if any(after for _, after in missing) else array


def _pad_segments(spec: AttentionSpec, queries: int, keys: int) -> AttentionSpec:
    """Keys of the padding are of a segment that no query has, queries of the last one's."""
    if spec.q_segment_ids is None or spec.kv_segment_ids is None:
        return spec
    q_segments, kv_segments = (array.astype(jnp.int32) for array in (spec.q_segment_ids, spec.kv_segment_ids))
    missing = ((0, 0), (0, keys - kv_segments.shape[1]))
    return dataclasses.replace(
        spec,
        q_segment_ids=jnp.pad(q_segments, ((0, 0), (0, queries - q_segments.shape[1])), mode="edge"),
        kv_segment_ids=jnp.pad(kv_segments, missing, constant_values=q_segments.max() + 1),
    )
