"""Attention over a sequence that lies on several devices, forward and backward, around any implementation's pair.

Runs where `context` and `tensor` are manual: arrays are one device's part, two pieces of the sequence
(`sharding/context.py`). Everyone knows all segment ids, which are small; keys and values travel.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtron.kernels.attention.attention import Implementation
from jaxtron.kernels.attention.spec import AttentionSpec, most_pairs
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.config import ContextConfig
from jaxtron.sharding.rules import current
from jaxtron.typing import Array, Float

Pair = tuple[Array, Array]

# How blocks are named in compiled programs. Behind it is which part of a kernel's pairs of a query and a key attends on
# an average: offsets are known on the device only.
ATTENDS = "attends."


def forward(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    spec: AttentionSpec,
    run: Implementation,
    config: ContextConfig,
    size: int,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"]]:
    """Output and log-sum-exp of this device's positions over the whole sequence (ring: 2310.01889; heads: 2309.14509).

    `spec` has this device's segment ids in both fields, and no offsets. Keys of another sequence than the queries'
    (`spec.crosses`) lie on the devices as these do, in pieces of their own length and with segment ids of their own.
    """
    way = _way(config, size, spec, q.shape[1], k.shape[1])
    if config.method == "all_gather":
        return _forward_gathered(way, q, k, v, run)
    q, k, v = (way.to_heads(x) for x in (q, k, v))
    out, lse = _forward_ring(way, q, k, v, run)
    return way.to_sequence(out), _last(way.to_sequence(_first(lse)))


def backward(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    lse: Float[Array, "B H S"],
    delta: Float[Array, "B H S"],
    dout: Float[Array, "B S H V"],
    spec: AttentionSpec,
    run: Implementation,
    config: ContextConfig,
    size: int,
) -> tuple[Array, ...]:
    """Gradients of this device's queries, keys and values; sums over blocks are in float32, on the way too.

    Where there is a bias by distance, also what this device's pairs add to its gradient, of all heads.
    """
    way = _way(config, size, spec, q.shape[1], k.shape[1])
    if config.method == "all_gather":
        return _backward_gathered(way, q, k, v, lse, delta, dout, run)
    lse, delta = (_last(way.to_heads(_first(x))) for x in (lse, delta))
    query, key, value, cotangent = (way.to_heads(x) for x in (q, k, v, dout))
    *parts, dtable = _backward_ring(way, query, key, value, lse, delta, cotangent, run)
    # complete, so that the way back needs no more than their own precision
    dq, dk, dv = (way.to_sequence(part.astype(q.dtype)) for part in parts)
    return (dq, dk, dv) if dtable is None else (dq, dk, dv, _among_all_heads(way, dtable, q.shape[2]))


@dataclass(frozen=True)
class _Way:
    """Who sends what to whom: `inner` neighbours share heads out, `outer` groups of them are a ring of blocks.

    `half` is the length of a device's piece of queries, `kv_half` of one of keys; a ring member's block is `inner` of
    them.
    """

    config: ContextConfig
    size: int
    spec: AttentionSpec
    half: int
    kv_half: int
    on_cpu: bool

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that split the sequence."""
        return current().axes("context")

    @property
    def inner(self) -> int:
        """Devices that split heads."""
        return self.config.groups(self.size)[0]

    @property
    def outer(self) -> int:
        """Members of the ring."""
        return self.config.groups(self.size)[1]

    @property
    def rank(self) -> Array:
        """This device's place along the axis."""
        return jax.lax.axis_index(self.axes)

    @property
    def member(self) -> Array:
        """Its group's place in the ring."""
        return self.rank // self.inner

    @property
    def block(self) -> int:
        """Queries of a block of the ring."""
        return self.half * self.inner

    @property
    def kv_block(self) -> int:
        """Keys of a block of the ring."""
        return self.kv_half * self.inner

    def starts(self, member: Array | int) -> tuple[Array | int, Array | int]:
        """First positions of a member's two blocks of queries."""
        return member * self.block, (2 * self.outer - 1 - member) * self.block

    def kv_starts(self, member: Array | int) -> tuple[Array | int, Array | int]:
        """Those of its two blocks of keys."""
        return member * self.kv_block, (2 * self.outer - 1 - member) * self.kv_block

    def pass_on(self, *arrays: Array) -> tuple[Array, ...]:
        """What the previous member of the ring holds."""
        pairs = tuple((rank, (rank + self.inner) % self.size) for rank in range(self.size))
        if not self.on_cpu:
            return tuple(jax.lax.ppermute(x, self.axes, pairs) for x in arrays)
        # Simulated devices are threads that wait inside a collective, and two at once can wait for each other for ever;
        # and their permutes mix up messages where stages of a pipeline are in different branches.
        found: list[Array] = []
        for x in arrays:
            x = jax.lax.optimization_barrier((x, *found[-1:]))[0]
            everybody = jax.lax.all_gather(x, self.axes)
            found.append(jax.lax.dynamic_index_in_dim(everybody, (self.rank - self.inner) % self.size, 0, False))
        return tuple(found)

    def to_heads(self, x: Float[Array, "B S H D"]) -> Float[Array, "B T I D"]:
        """The group's whole blocks for a part of the heads, from a part of the blocks for all heads."""
        if self.inner == 1:
            return x
        x = self._exchange(x, split=2, join=1)
        # from every neighbour's two pieces to the two blocks
        pieces = x.reshape(x.shape[0], self.inner, 2, -1, *x.shape[2:])
        return jnp.swapaxes(pieces, 1, 2).reshape(x.shape)

    def to_sequence(self, x: Float[Array, "B T I D"]) -> Float[Array, "B S H D"]:
        """The inverse of `to_heads`."""
        if self.inner == 1:
            return x
        pieces = jnp.swapaxes(x.reshape(x.shape[0], 2, self.inner, -1, *x.shape[2:]), 1, 2)
        return self._exchange(pieces.reshape(x.shape), split=1, join=2)

    def _exchange(self, x: Array, *, split: int, join: int) -> Array:
        groups = [list(range(first, first + self.inner)) for first in range(0, self.size, self.inner)]
        whole = None if self.inner == self.size else groups
        return jax.lax.all_to_all(x, self.axes, split, join, tiled=True, axis_index_groups=whole)

    def in_order(self, x: Array) -> Array:
        """The whole sequence of everybody's two pieces, in order."""
        whole = jax.lax.all_gather(x, self.axes, axis=1, tiled=True)
        pieces = whole.reshape(x.shape[0], self.outer, self.inner, 2, -1, *x.shape[2:])
        ordered = jnp.concatenate([pieces[:, :, :, 0], pieces[:, ::-1, :, 1]], 1)
        return ordered.reshape(whole.shape)

    def out_of_order(self, x: Array) -> Array:
        """Sums over all devices of a whole sequence, each keeping its two pieces: `in_order` transposed, inner 1."""
        pieces = x.reshape(x.shape[0], 2, self.size, -1, *x.shape[2:])
        mixed = jnp.stack([pieces[:, 0], pieces[:, 1, ::-1]], 2).reshape(x.shape)
        return jax.lax.psum_scatter(mixed, self.axes, scatter_dimension=1, tiled=True)


def _way(config: ContextConfig, size: int, spec: AttentionSpec, queries: int, keys: int) -> _Way:
    assert queries == keys or spec.crosses, "a sequence is as long as itself"
    on_cpu = current().mesh.devices.flat[0].platform == "cpu"
    way = _Way(config, size, spec, queries // 2, keys // 2, on_cpu)
    if way.inner > 1:
        spec = replace(
            spec,
            alibi_slopes=_own_heads(way, spec.alibi_slopes, 0),
            distance_bias=_own_heads(way, spec.distance_bias, 0),
            dropout_seeds=_own_heads(way, spec.dropout_seeds, 1),
        )
    if spec.q_segment_ids is None:
        return replace(way, spec=spec)
    segments = kv_segments = way.in_order(spec.q_segment_ids)
    if spec.crosses:
        assert spec.kv_segment_ids is not None
        kv_segments = way.in_order(spec.kv_segment_ids)
    return replace(way, spec=replace(spec, q_segment_ids=segments, kv_segment_ids=kv_segments))


def _own_heads(way: _Way, array: Array | None, axis: int) -> Array | None:
    """The part of an array of all heads that this device has after `to_heads`."""
    if array is None:
        return None
    heads = array.shape[axis] // way.inner
    return jax.lax.dynamic_slice_in_dim(array, way.rank % way.inner * heads, heads, axis)


def _among_all_heads(way: _Way, gradient: Float[Array, "I N"], heads: int) -> Float[Array, "H N"]:
    """The transpose of `_own_heads`: zeros of the heads that others have."""
    if way.inner == 1:
        return gradient
    zeros = vary(jnp.zeros((heads, *gradient.shape[1:]), gradient.dtype))
    return jax.lax.dynamic_update_slice_in_dim(zeros, gradient, way.rank % way.inner * gradient.shape[0], 0)


class _Block(NamedTuple):
    """A half of the queries against a half of a member's keys, and the spec between them."""

    query: int
    key: int
    spec: AttentionSpec


def _pairs(spec: AttentionSpec) -> tuple[tuple[int, int], ...]:
    """Which of a member's blocks of queries may see which of another's keys: in causal order no first a second one."""
    return ((0, 0), (1, 0), (1, 1)) if spec.causal else ((0, 0), (0, 1), (1, 0), (1, 1))


def _blocks(way: _Way, source: Array) -> list[_Block]:
    """What this member computes with the blocks of member `source`."""
    ours, theirs = way.starts(way.member), way.kv_starts(source)
    return [_Block(i, j, _between(way.spec, ours[i], theirs[j], way.block, way.kv_block)) for i, j in _pairs(way.spec)]


def _ring_name(way: _Way) -> AbstractContextManager:
    """How blocks of the ring are named."""
    members = range(way.outer)
    starts, kv_starts = ([of(member) for member in members] for of in (way.starts, way.kv_starts))
    distances = Counter(
        int(starts[one][i]) - int(kv_starts[other][j])
        for one in members
        for other in members
        for i, j in _pairs(way.spec)
    )
    return _named(way, distances, way.block, way.kv_block)


def _row_name(way: _Way, length: int) -> AbstractContextManager:
    """How pieces against the whole sequence are named."""
    assert way.inner == 1
    starts = [int(start) for rank in range(way.size) for start in way.starts(rank)]
    return _named(way, Counter(starts), way.half, length)


def _named(way: _Way, distances: Mapping[int, int], queries: int, keys: int) -> AbstractContextManager:
    """A name with the part of pairs that attend where queries are so far behind keys, so often each."""
    attend = sum(
        count * most_pairs(replace(way.spec, q_offset=distance), queries, keys) for distance, count in distances.items()
    )
    known = most_pairs(replace(way.spec, q_offset=way.rank), queries, keys) * sum(distances.values())
    return nullcontext() if attend == known else jax.named_scope(f"{ATTENDS}{attend / known:.6f}")


def _between(
    spec: AttentionSpec, q_start: Array | int, kv_start: Array | int, q_length: int, kv_length: int
) -> AttentionSpec:
    """The spec of a part of the queries and of the keys, out of that of the whole sequence."""
    if spec.q_segment_ids is not None:
        assert spec.kv_segment_ids is not None
        spec = replace(
            spec,
            q_segment_ids=jax.lax.dynamic_slice_in_dim(spec.q_segment_ids, q_start, q_length, 1),
            kv_segment_ids=jax.lax.dynamic_slice_in_dim(spec.kv_segment_ids, kv_start, kv_length, 1),
        )
    return replace(spec, q_offset=q_start, kv_offset=kv_start)


def _forward_ring(way: _Way, q: Array, k: Array, v: Array, run: Implementation) -> Pair:
    queries = _halves(q, 1)
    rows, heads = q.shape[0], q.shape[2]
    nothing = (
        vary(jnp.zeros((rows, way.block, heads, v.shape[-1]), jnp.float32)),
        vary(jnp.full((rows, heads, way.block), -jnp.inf)),
    )

    def compute(found: tuple[Pair, Pair], source: Array, k: Array, v: Array) -> tuple[Pair, Pair]:
        merged, keys, values = list(found), _halves(k, 1), _halves(v, 1)
        for i, j, spec in _blocks(way, source):
            with _ring_name(way):
                part = run.forward(queries[i], keys[j], values[j], spec)
            merged[i] = _merge(merged[i], part)
        return merged[0], merged[1]

    def step(carry: tuple, number: Array) -> tuple[tuple, None]:
        k, v, found = carry
        # the next block is on its way while this one is computed with
        following = way.pass_on(k, v)
        return (*following, compute(found, (way.member - number) % way.outer, k, v)), None

    found = (nothing, nothing)
    if way.outer > 1:
        (k, v, found), _ = jax.lax.scan(step, (vary(k), vary(v), found), jnp.arange(way.outer - 1))
    found = compute(found, (way.member + 1) % way.outer, k, v)
    out, lse = (jnp.concatenate([part[index] for part in found], axis) for index, axis in ((0, 1), (1, 2)))
    return out.astype(q.dtype), lse


def _backward_ring(
    way: _Way, q: Array, k: Array, v: Array, lse: Array, delta: Array, dout: Array, run: Implementation
) -> tuple[Array, Array, Array, Array | None]:
    queries, cotangents = _halves(q, 1), _halves(dout, 1)
    normalizers, deltas = _halves(lse, 2), _halves(delta, 2)

    def own(source: Array, k: Array, v: Array) -> tuple[Array, Array, Array, Array | None]:
        """Float32 gradients of the queries, of this block's keys, of its values, and of a bias by distance."""
        keys, values = _halves(k, 1), _halves(v, 1)
        dq, dk, dv = ([vary(jnp.zeros(x.shape, jnp.float32)) for x in halves] for halves in (queries, keys, values))
        dtable: Array | None = None
        for i, j, spec in _blocks(way, source):
            with _ring_name(way):
                parts = run.backward(queries[i], keys[j], values[j], normalizers[i], deltas[i], cotangents[i], spec)
            for sums, index, part in zip((dq, dk, dv), (i, j, j), parts[:3], strict=True):
                sums[index] = sums[index] + part.astype(jnp.float32)
            dtable = _sum_of_tables(dtable, parts)
        return jnp.concatenate(dq, 1), jnp.concatenate(dk, 1), jnp.concatenate(dv, 1), dtable

    def add(sums: tuple, source: Array, k: Array, v: Array) -> tuple[Array, Array, Array, Array | None]:
        dq, dk, dv, dtable = own(source, k, v)
        return sums[0] + dq, sums[1] + dk, sums[2] + dv, None if dtable is None else sums[3] + dtable

    def step(carry: tuple, number: Array) -> tuple[tuple, None]:
        k, v, dq, dk, dv, dtable = carry
        # sums for the block that is here now arrive, and the next block, while this member's own part is computed
        *following, dk, dv = way.pass_on(k, v, dk, dv)
        return (*following, *add((dq, dk, dv, dtable), (way.member - number) % way.outer, k, v)), None

    k, v = vary(k), vary(v)
    if way.outer == 1:
        return own(way.member, k, v)
    # by themselves, for there are no sums yet to send
    following = way.pass_on(k, v)
    carry = (*following, *own(way.member, k, v))
    if way.outer > 2:
        carry, _ = jax.lax.scan(step, carry, jnp.arange(1, way.outer - 1))
    k, v, dq, dk, dv, dtable = carry
    dk, dv = way.pass_on(dk, dv)
    dq, dk, dv, dtable = add((dq, dk, dv, dtable), (way.member + 1) % way.outer, k, v)
    # home, to whose block it is, complete
    dk, dv = way.pass_on(dk.astype(k.dtype), dv.astype(v.dtype))
    return dq, dk, dv, dtable


def _sum_of_tables(sums: Array | None, gradients: tuple[Array, ...]) -> Array | None:
    """With what an implementation's backward says of a bias by distance; none where there is none."""
    if len(gradients) == 3:
        return None
    return gradients[3] if sums is None else sums + gradients[3]


def _forward_gathered(way: _Way, q: Array, k: Array, v: Array, run: Implementation) -> Pair:
    k, v = way.in_order(k), way.in_order(v)
    with _row_name(way, k.shape[1]):
        found = [
            run.forward(query, k, v, spec) for query, spec in zip(_halves(q, 1), _rows(way, k.shape[1]), strict=True)
        ]
    return jnp.concatenate([out for out, _ in found], 1), jnp.concatenate([lse for _, lse in found], 2)


def _backward_gathered(
    way: _Way, q: Array, k: Array, v: Array, lse: Array, delta: Array, dout: Array, run: Implementation
) -> tuple[Array, ...]:
    k, v = way.in_order(k), way.in_order(v)
    halves = zip(_halves(q, 1), _halves(lse, 2), _halves(delta, 2), _halves(dout, 1), strict=True)
    masks = _rows(way, k.shape[1])
    with _row_name(way, k.shape[1]):
        found = [
            run.backward(query, k, v, normalizer, shift, cotangent, spec)
            for (query, normalizer, shift, cotangent), spec in zip(halves, masks, strict=True)
        ]
    dq = jnp.concatenate([parts[0] for parts in found], 1)
    first, second = ([part.astype(jnp.float32) for part in parts] for parts in found)
    dk, dv = (way.out_of_order(first[index] + second[index]) for index in (1, 2))
    return (
        dq,
        dk.astype(k.dtype),
        dv.astype(v.dtype),
        *(one + other for one, other in zip(first[3:], second[3:], strict=True)),
    )


def _rows(way: _Way, length: int) -> list[AttentionSpec]:
    """The masks of this device's two pieces of queries against the whole sequence."""
    return [_between(way.spec, start, 0, way.half, length) for start in way.starts(way.rank)]


def _merge(one: Pair, other: Pair) -> Pair:
    """Outputs over two sets of keys as one over both; a part that saw nothing has the log-sum-exp -inf."""
    lse = jnp.logaddexp(one[1], other[1])

    def share(part: Array) -> Array:
        return jnp.where(jnp.isneginf(part), 0.0, jnp.exp(part - jnp.where(jnp.isneginf(lse), 0.0, lse)))

    parts = [x.astype(jnp.float32) * _first(share(part)) for x, part in (one, other)]
    return parts[0] + parts[1], lse


def _halves(x: Array, axis: int) -> Pair:
    first, second = jnp.split(x, 2, axis)
    return first, second


def _first(x: Float[Array, "B H S"]) -> Float[Array, "B S H 1"]:
    return jnp.swapaxes(x, 1, 2)[..., None]


def _last(x: Float[Array, "B S H 1"]) -> Float[Array, "B H S"]:
    return jnp.swapaxes(x[..., 0], 1, 2)
