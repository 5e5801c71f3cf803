"""Self-attention with multi-head, grouped and multi-query heads: projections, and the core on every device's part.

Its settings are `layers.config.AttentionConfig`, apart because reading a configuration imports no JAX.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.sharding import PartitionSpec

from jaxtron.kernels.attention.attention import Implementation, attention
from jaxtron.kernels.attention.spec import AttentionSpec, Feature, Heads
from jaxtron.layers import context_parallel
from jaxtron.layers.cache import CACHED, HEADS, KeyValues, attend, remember, room_for
from jaxtron.layers.config import Scaling
from jaxtron.layers.inputs import LayerInputs, RotaryKey, dropout, random_bits
from jaxtron.layers.linear import Linear, project, whole_sequence
from jaxtron.layers.norm import HeadNorm, Norm
from jaxtron.layers.positions import alibi_slopes, rotate
from jaxtron.layers.saved import checkpoint_inputs, save_for_backward
from jaxtron.sharding.collectives import manual_axes
from jaxtron.sharding.halves import halve, join
from jaxtron.sharding.layout import Layout
from jaxtron.sharding.parameters import ParameterSpec, parameter
from jaxtron.sharding.regions import on_each_device
from jaxtron.sharding.rules import constrain, current, spec
from jaxtron.typing import Array, DTypeLike, Float, PyTree, UInt32

# from queries, keys, values, slopes, sinks and the layer's inputs to the sum of values
CoreFunction = Callable[..., Float[Array, "B S H V"]]
# what splits the arrays that an implementation is given and makes, by name; offsets are one number for all
AXES = {
    **dict.fromkeys(("q", "k", "v", "dout"), HEADS),
    **dict.fromkeys(("statistics", "delta", "dropout_seeds"), ("batch", "heads")),
    **dict.fromkeys(("q_segment_ids", "kv_segment_ids"), ("batch", "full_seq")),
    "alibi_slopes": ("heads",),
    "distance_bias": ("heads",),
}


class Attention(nnx.Module):
    """Self-attention: projections to heads, the core (`Core`), and the projection back.

    Queries and keys/values are stored apart, so that a checkpoint does not depend on the mesh; where key/value heads
    are split like query heads, the weights are joined by group and one product serves all three. A step joins them once
    (`join_weights`); a module that nobody told to joins them where it runs.
    """

    def __init__(
        self,
        embed: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        output_bias: bool,
        qk_norm: Callable[[dict[str, int]], Norm | HeadNorm] | None,
        rotated: RotaryKey | None,
        alibi: bool,
        sinks: bool,
        core: CoreFunction,
        std: float,
        output_std: float,
        dropout: float,
        rngs: nnx.Rngs,
        scaling: Scaling = "none",
        gate: bool = False,
        query_std: float | None = None,
    ) -> None:
        self.num_groups, self.num_kv_heads, self.head_dim = num_heads // num_kv_heads, num_kv_heads, head_dim
        self.joined_kernel: nnx.Param | None = nnx.data(None)
        self.joined_bias: nnx.Param | None = nnx.data(None)
        self.core = core
        self.rotated = rotated
        self.dropout = dropout
        self.slopes = tuple(float(slope) for slope in alibi_slopes(num_heads)) if alibi else None
        self.sinks = parameter(rngs, initializers.zeros, (num_heads,), axes=("heads",), role="bias") if sinks else None
        heads, kv_heads = {"heads": num_heads}, {"kv_heads": num_kv_heads}
        dims = {"head_dim": head_dim}
        given: Any = {"std": std, "rngs": rngs, "scaling": scaling}
        # of scores that are not scaled, queries are drawn small instead
        of_query = given if query_std is None else {**given, "std": query_std}
        self.query = Linear({"embed": embed}, {**heads, **dims}, bias=qkv_bias, **of_query)
        self.key = Linear({"embed": embed}, {**kv_heads, **dims}, bias=qkv_bias, **given)
        self.value = Linear({"embed": embed}, {**kv_heads, **dims}, bias=qkv_bias, **given)
        self.output = Linear(
            {**heads, **dims}, {"embed": embed}, bias=output_bias, std=output_std, rngs=rngs, scaling=scaling
        )
        self.query_norm = qk_norm(heads) if qk_norm else None
        self.key_norm = qk_norm(kv_heads) if qk_norm else None
        self.gate = Linear({"embed": embed}, {**heads, **dims}, bias=qkv_bias, **given) if gate else None

    def __call__(self, x: Float[Array, "B S E"], inputs: LayerInputs) -> Float[Array, "B S E"]:
        attended = self.core(*self._heads(x, inputs), *self._per_head(), inputs)
        return self._leave(attended, x, inputs)

    def halves_of_positions(
        self, halves: Sequence[Float[Array, "B S E"]], inputs: LayerInputs
    ) -> tuple[Float[Array, "B S E"], ...]:
        """The same for a sequence whose positions are split (`sharding.halves`): only the core sees it whole."""
        projected = zip(*map(self._project, halves, inputs.halves("positions")), strict=True)
        query, key, value = (join(first, second, "positions") for first, second in projected)
        attended = self.core(*self._turn(query, key, inputs), value, *self._per_head(), inputs)
        parts = zip(halve(attended, "positions"), halves, inputs.halves("positions"), strict=True)
        return tuple(self._leave(*part) for part in parts)

    def _leave(
        self, attended: Float[Array, "B S H D"], x: Float[Array, "B S E"], inputs: LayerInputs
    ) -> Float[Array, "B S E"]:
        """From the heads back to the stream, of which `x` is the layer's input."""
        y = self.output(self._gated(attended, x, inputs), "batch", "seq", "embed", inputs=inputs)
        return dropout(y, self.dropout, inputs, "batch", "seq", "embed")

    def _gated(
        self, attended: Float[Array, "B S H D"], x: Float[Array, "B S E"], inputs: LayerInputs
    ) -> Float[Array, "B S H D"]:
        """Times the sigmoid of the gate, where there is one; the backward keeps both alone."""
        if self.gate is None:
            return attended
        gate = self.gate(whole_sequence(x, self.output.scaling), *HEADS, inputs=inputs)
        return checkpoint_inputs(lambda x, gate: x * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(x.dtype))(
            attended, gate
        )

    def start(self, rows: int, room: int, most: int, dtype: DTypeLike) -> KeyValues:
        """What is remembered of sequences that begin, with room for so many positions, at most so many at a time."""
        assert isinstance(self.core, Core)
        # where parts of tensor share heads, each has that of its own queries
        heads = self.num_kv_heads if current().splits("kv_heads", self.num_kv_heads) else current().parts("tensor")
        return self.core.empty(rows, heads, room, most, (self.head_dim, self.head_dim), dtype)

    def advance(
        self, x: Float[Array, "B S E"], memory: KeyValues, inputs: LayerInputs
    ) -> tuple[Float[Array, "B S E"], KeyValues]:
        """The same for what follows positions of which this is the memory, which has room for it."""
        assert isinstance(self.core, Core)
        attended, memory = self.core.advance(*self._heads(x, inputs), *self._per_head(), memory, inputs)
        return self.output(self._gated(attended, x, inputs), "batch", "full_seq", "embed", inputs=inputs), memory

    def _heads(
        self, x: Float[Array, "B S E"], inputs: LayerInputs
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
        """Queries, keys and values."""
        query, key, value = self._project(x, inputs)
        return *self._turn(query, key, inputs), value

    def _turn(
        self, query: Float[Array, "B S H D"], key: Float[Array, "B S K D"], inputs: LayerInputs
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B S K D"]]:
        """Normed and rotated, where the model does."""
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotated is not None:
            tables = inputs.rotary[self.rotated]
            query, key = rotate(query, tables), rotate(key, tables)
        return query, key

    def _per_head(self) -> tuple[Float[Array, "H"] | None, Float[Array, "H"] | None]:
        """Slopes and sinks."""
        slopes = None if self.slopes is None else jnp.asarray(self.slopes, jnp.float32)
        return slopes, None if self.sinks is None else constrain(self.sinks[...], "heads")

    def _project(
        self, x: Float[Array, "B S E"], inputs: LayerInputs
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
        own, x = x, whole_sequence(x, self.output.scaling)
        if not current().splits("kv_heads", self.num_kv_heads):
            return self._project_shared(x, own, inputs)
        groups = self.num_groups
        logical = ("batch", "full_seq", "kv_heads", "group", "head_dim")
        kernel = self._join("kernel") if self.joined_kernel is None else self.joined_kernel[...]
        joined = project(x, kernel, logical, self.query.scaling)
        if self.joined_bias is not None:
            joined = joined + self.joined_bias[...].astype(joined.dtype)
        elif self.query.bias is not None:
            joined = joined + self._join("bias").astype(joined.dtype)
        # whose gradients are put together again, where those of slices would be padded with zeros and added
        query, key, value = jax.lax.split(joined, (groups, 1, 1), axis=3)
        query = query.reshape(*query.shape[:2], self.num_kv_heads * groups, query.shape[-1])
        key, value = key.squeeze(3), value.squeeze(3)
        return (
            self.query.adapted(query, own, "batch", "full_seq", "heads", "head_dim", inputs=inputs),
            self.key.adapted(key, own, "batch", "full_seq", "kv_heads", "head_dim", inputs=inputs),
            self.value.adapted(value, own, "batch", "full_seq", "kv_heads", "head_dim", inputs=inputs),
        )

    def _join(self, name: str) -> Array:
        """Weights as [..., key/value head, queries of its group then key then value, head dim] (Megatron's order)."""
        query, key, value = (getattr(layer, name)[...] for layer in (self.query, self.key, self.value))
        key, value = jnp.expand_dims(key, -2), jnp.expand_dims(value, -2)
        shape = (*key.shape[:-2], self.num_groups, key.shape[-1])
        # its layout is given: a split of the heads into one group would name the mesh axis on the queries instead
        query = jnp.reshape(query, shape, out_sharding=jax.typeof(key).sharding.spec)
        return jnp.concatenate([query, key, value], -2)

    @property
    def has_joined(self) -> bool:
        """Whether its weights are joined."""
        return self.joined_kernel is not None

    def weights_to_join(self) -> tuple[ParameterSpec, ...]:
        """What `join_weights` makes one array of each kind of; none where they are not multiplied as one."""
        if not current().splits("kv_heads", self.num_kv_heads):
            return ()
        return tuple(
            getattr(layer, name).get_metadata("spec")
            for layer in (self.query, self.key, self.value)
            for name in self._names()
        )

    def join_weights(self) -> None:
        """Puts `joined_kernel` and `joined_bias` in the place of the weights of queries, keys and values.

        These may be stacked, with layers in front.
        """
        for name in self._names():
            spec = getattr(self.key, name).get_metadata("spec")
            shape, lies = list(spec.shape), list(spec.layout.used)
            shape.insert(-1, self.num_groups + 2)
            lies.insert(-1, None)
            layout = Layout(PartitionSpec(*lies), PartitionSpec(*lies), tuple(shape), tuple(shape))
            spec = replace(spec, axes=(*spec.axes[:-1], "group", spec.axes[-1]), layout=layout)
            setattr(self, f"joined_{name}", nnx.Param(self._join(name), spec=spec))
            for layer in (self.query, self.key, self.value):
                setattr(layer, name, None)

    def part_weights(self) -> None:
        """The inverse of `join_weights`, of weights or what is like them: only values count in what it makes."""
        for name in ("kernel", "bias"):
            if (joined := getattr(self, f"joined_{name}")) is None:
                continue
            parts = joined[...]
            key, value = (parts[..., self.num_groups + place, :] for place in range(2))
            shape = (*key.shape[:-2], self.num_kv_heads * self.num_groups, key.shape[-1])
            query = jnp.reshape(parts[..., : self.num_groups, :], shape, out_sharding=jax.typeof(key).sharding.spec)
            for layer, part in ((self.query, query), (self.key, key), (self.value, value)):
                setattr(layer, name, nnx.Param(part))
            setattr(self, f"joined_{name}", None)

    def _names(self) -> tuple[str, ...]:
        return ("kernel",) if self.query.bias is None else ("kernel", "bias")

    def _project_shared(
        self, x: Float[Array, "B S E"], own: Float[Array, "B S E"], inputs: LayerInputs
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B S H D"], Float[Array, "B S H D"]]:
        """Fewer key/value heads than tensor parts: all are computed everywhere, and each part takes what it needs."""
        query = self.query(x, "batch", "full_seq", "heads", "head_dim", inputs=inputs, own=own)
        heads = []
        for layer in (self.key, self.value):
            shared = layer(x, "batch", "full_seq", None, "head_dim", inputs=inputs, own=own)
            rows, length, num_heads, head_dim = shared.shape
            # plain shapes: inside `jnp.repeat` axes are of another kind, which `pipeline/split.py` would cut into
            copies = jnp.broadcast_to(shared[:, :, :, None], (rows, length, num_heads, self.num_groups, head_dim))
            copies = copies.reshape(rows, length, -1, head_dim)
            heads.append(constrain(copies, "batch", "full_seq", "heads", "head_dim"))
        return query, heads[0], heads[1]


@dataclass(frozen=True)
class Core:
    """Attention from heads to heads, by an implementation selected before; `spec` without what is an array."""

    implementation: Implementation
    spec: AttentionSpec = AttentionSpec()

    def __call__(
        self,
        query: Float[Array, "B S H D"],
        key: Float[Array, "B T K D"],
        value: Float[Array, "B T K V"],
        slopes: Float[Array, "H"] | None,
        sinks: Float[Array, "H"] | None,
        inputs: LayerInputs,
    ) -> Float[Array, "B S H V"]:
        query, key, value = (constrain(x, *HEADS) for x in (query, key, value))
        crosses = self.spec.crosses
        given = replace(
            self.spec,
            alibi_slopes=_constrained(slopes, "heads"),
            distance_bias=None if crosses else _constrained(inputs.distance_bias, "heads"),
            q_segment_ids=_constrained(inputs.segments, "batch", "full_seq"),
            kv_segment_ids=_constrained(inputs.memory_segments if crosses else inputs.segments, "batch", "full_seq"),
            dropout_seeds=self._seeds(query, inputs),
        )
        attended = attention(query, key, value, given, Sharded(self.implementation), sinks=sinks)[0]
        # once: what has a log-sum-exp keeps its result for its own backward
        is_kept = "log_sum_exp" in self.implementation.features and sinks is None
        return attended if is_kept else save_for_backward(attended)

    def _seeds(self, query: Float[Array, "B S H D"], inputs: LayerInputs) -> UInt32[Array, "B H 2"] | None:
        """Two words for each head of each row, which say what is dropped; none where nothing is."""
        if inputs.keys is None or not self.spec.dropout_rate:
            return None
        shape = (query.shape[0], query.shape[2], 2)
        return random_bits(shape, inputs.fold(1), "batch", "heads", None, dtype=jnp.uint32)

    def advance(
        self,
        query: Float[Array, "B S H D"],
        key: Float[Array, "B S K D"],
        value: Float[Array, "B S K V"],
        slopes: Float[Array, "H"] | None,
        sinks: Float[Array, "H"] | None,
        memory: KeyValues,
        inputs: LayerInputs,
    ) -> tuple[Float[Array, "B S H V"], KeyValues]:
        """What new positions attend to, and the memory with them.

        Where sequences begin the implementation computes it, as in training; else queries are few and keys many, and
        scores are in memory.
        """
        growth = inputs.growth
        assert growth is not None
        query, key, value = (constrain(x, *HEADS) for x in (query, key, value))
        # as it lies: a change of shape inside of what writes to it makes XLA copy it first
        memory = remember(jax.lax.optimization_barrier(memory), key, value, growth)
        if growth.begins:
            return self(query, key, value, slopes, sinks, inputs), memory
        # one value: XLA writes it once for each of its readers otherwise, and copies what it writes to
        memory = jax.lax.optimization_barrier(memory)
        bias = _constrained(inputs.distance_bias, "heads")
        return attend(query, memory, self.spec, slopes, sinks, growth, bias), memory

    def empty(self, rows: int, heads: int, room: int, most: int, dims: tuple[int, int], dtype: DTypeLike) -> KeyValues:
        """The memory of sequences that begin: of so many heads, of keys and values of these widths."""
        places = room_for(room, self.spec.window, most)
        return KeyValues(*(constrain(jnp.zeros((rows, heads, places, dim), dtype), *CACHED) for dim in dims))


@dataclass(frozen=True)
class Sharded:
    """An implementation on every device's rows, heads and part of the sequence; outside, arrays are whole along tensor.

    One that can run under Explicit axes does, as if there were one device.
    """

    implementation: Implementation

    @property
    def features(self) -> frozenset[Feature]:
        """Those of the implementation."""
        return self.implementation.features

    def unsupported_reason(self, q: Heads, k: Heads, v: Heads, spec: AttentionSpec, device_kind: str) -> str | None:
        """That of the implementation."""
        return self.implementation.unsupported_reason(q, k, v, spec, device_kind)

    def forward(
        self, q: Float[Array, "B S H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K V"], spec: AttentionSpec
    ) -> tuple[Float[Array, "B S H V"], PyTree]:
        """As `Implementation.forward`."""
        if "explicit_sharding" in self.features:
            return self.implementation.forward(q, k, v, spec)
        known, arrays = spec.split()

        def local(q: Array, k: Array, v: Array, **arrays: Array) -> tuple[Array, PyTree]:
            own, rules = known.with_arrays(arrays), current()
            if rules.parts("context") == 1:
                return self.implementation.forward(q, k, v, own)
            return context_parallel.forward(q, k, v, own, self.implementation, rules.context, rules.parts("context"))

        return _over_heads(local, {"q": q, "k": k, "v": v, **arrays}, ("q", "statistics"))

    def backward(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K V"],
        statistics: PyTree,
        delta: Any,
        dout: Float[Array, "B S H V"],
        spec: AttentionSpec,
    ) -> tuple[Array, ...]:
        """As `Implementation.backward`."""
        if "explicit_sharding" in self.features:
            return self.implementation.backward(q, k, v, statistics, delta, dout, spec)
        known, arrays = spec.split()

        def local(
            q: Array, k: Array, v: Array, dout: Array, statistics: PyTree = None, delta: Any = None,
            **arrays: Array,
        ) -> tuple[Array, ...]:  # fmt: skip
            own, rules = known.with_arrays(arrays), current()
            given = (q, k, v, statistics, delta, dout, own)
            if rules.parts("context") == 1:
                found = self.implementation.backward(*given)
            else:
                found = context_parallel.backward(*given, self.implementation, rules.context, rules.parts("context"))
            # a table is one for all rows, of which each device has some
            return *found[:3], *(jax.lax.psum(table, over) for table in found[3:])

        # rows that are split inside of what is differentiated alone: those of the step's region are its own
        over = tuple(axis for axis in current().batch if axis not in manual_axes())
        named = {"q": q, "k": k, "v": v, "statistics": statistics, "delta": delta, "dout": dout, **arrays}
        return _over_heads(local, named, ("q", "k", "v", *(("distance_bias",) if "distance_bias" in arrays else ())))


def _constrained(array: Array | None, *logical: str) -> Array | None:
    return None if array is None else constrain(array, *logical)


def _over_heads(local: Callable[..., PyTree], arrays: dict[str, PyTree], results: tuple[str, ...]) -> PyTree:
    """`local` on each device's part of arrays by name (none: not there); its results lie as those of these names."""
    assert current().parts("context") == 1 or manual_axes(), "a sequence is split inside the train step's region alone"
    arrays = {name: array for name, array in arrays.items() if array is not None}
    run = on_each_device(
        lambda arrays: local(**arrays),
        in_specs=({name: spec(*AXES.get(name, ())) for name in arrays},),
        out_specs=tuple(spec(*AXES[name]) for name in results),
    )
    return run(arrays)
