"""Biases by distance are T5's, and a decoder's attention to another sequence is plain mathematics, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxtron.kernels.attention import chunked, materialized
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.layers.attention import Core
from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.relations.cross import CrossAttention
from jaxtron.layers.relations.distance import DistanceBias, distance_buckets
from jaxtron.plan.compiled import hlo
from jaxtron.plan.compiled.census import census
from jaxtron.plan.compiled.deviceless import gpu_devices
from jaxtron.sharding.config import MeshConfig, ShardingConfig
from jaxtron.sharding.mesh import build_mesh
from jaxtron.sharding.rules import constrain, current, make_rules, use

ROWS, QUERIES, KEYS, EMBED, HEADS, DIM = 2, 16, 32, 24, 4, 5
CROSS = AttentionSpec(causal=False, crosses=True, logits_scale=1.0)


def test_buckets_are_one_for_near_distances_and_shared_by_far_ones():
    """By the paper's rule, a distance at a time in float64; where boundaries are whole, as released models round."""

    def expected(distance: int, causal: bool) -> int:
        first = 0 if causal or distance <= 0 else 16
        far, exact, count = (max(-distance, 0), 16, 32) if causal else (abs(distance), 8, 16)
        if far < exact:
            return first + far
        grown = np.log2(far / exact) / np.log2(128 / exact) * (count - exact)
        return first + min(exact + int(np.floor(grown + 1e-9)), count - 1)

    for causal in (True, False):
        found = distance_buckets(32, 128, causal=causal)
        assert found.tolist() == [expected(distance, causal) for distance in range(-128, 129)]
    # as the release's own code gives them
    assert distance_buckets(32, 128, causal=False)[[0, 64, 112, 120, 127, 128, 129, 136, 137, 144, 256]].tolist() == [
        *(15, 14, 10, 8, 1, 0, 17, 24, 24, 26, 31)
    ]


def test_what_a_head_adds_is_its_bucket_of_the_distance(rules_for):
    with use(rules_for(tensor=2)):
        bias = DistanceBias(HEADS, num_buckets=8, max_distance=20, causal=False, std=1.0, rngs=nnx.Rngs(0))

        graph, state = nnx.split(bias)

        def total(state):
            found = nnx.merge(graph, state)()
            return (found * jnp.arange(found.size).reshape(found.shape)).sum(), found

        table = np.asarray(bias.table[...])
        gradients, found = jax.jit(jax.grad(total, has_aux=True))(state)
        gradient = gradients["table"][...]
    buckets = distance_buckets(8, 20, causal=False)
    np.testing.assert_array_equal(found, table[buckets].T)
    summed = np.zeros_like(table)
    np.add.at(summed, buckets, np.arange(found.size).reshape(found.shape).T)
    np.testing.assert_allclose(gradient, summed)


def made(implementation) -> CrossAttention:
    return CrossAttention(
        EMBED,
        num_heads=HEADS,
        head_dim=DIM,
        bias=True,
        core=Core(implementation, CROSS),
        std=0.3,
        query_std=0.2,
        output_std=0.3,
        dropout=0.0,
        rngs=nnx.Rngs(0),
    )


def arrays() -> tuple[jax.Array, ...]:
    x, memory, cotangent = (
        jax.random.normal(jax.random.key(key), (ROWS, length, EMBED))
        for key, length in ((1, QUERIES), (2, KEYS), (3, QUERIES))
    )
    text = (jnp.arange(length) < jnp.array([[length], [length - 7]]) for length in (QUERIES, KEYS))
    return x, memory, cotangent, *(here.astype(jnp.int32) for here in text)


def pull_of(implementation):
    """A layer's parameters, and what makes of them and arrays the output and gradients of all but segments."""
    graph, state = nnx.split(made(implementation))

    def call(state, x, memory, segments, memory_segments):
        inputs = LayerInputs(segments=segments, memory_segments=memory_segments)
        x, memory = (constrain(array, "batch", "seq", "embed") for array in (x, memory))
        return constrain(nnx.merge(graph, state)(x, memory, inputs), "batch", "seq", "embed")

    def pulled(state, x, memory, cotangent, *segments):
        out, pull = jax.vjp(lambda *given: call(*given, *segments), state, x, memory)
        return out, *pull(constrain(cotangent, "batch", "seq", "embed"))

    return state, pulled


def run(implementation):
    """Output, gradients of what it reads, and those of its weights by name."""
    state, pulled = pull_of(implementation)
    x, memory, cotangent, *segments = arrays()
    whole = [constrain(array, "batch", "seq", "embed") for array in (x, memory, cotangent)]
    rows = [constrain(array, "batch", "full_seq") for array in segments]
    out, weights, *others = jax.jit(pulled)(state, *whole, *rows)
    gradients = {"/".join(map(str, path)): np.asarray(one[...]) for path, one in nnx.to_flat_state(weights)}
    return np.asarray(out), [np.asarray(one) for one in others], gradients


def plain(layer: CrossAttention, x, memory, segments, memory_segments):
    """By its definition, of whole arrays."""
    biases = [one.bias for one in (layer.key_value, layer.query, layer.output)]
    of_pair, of_query, of_output = (bias[...] for bias in biases if bias is not None)
    pair = jnp.einsum("bte,eghd->btghd", memory, layer.key_value.kernel[...]) + of_pair
    query = jnp.einsum("bse,ehd->bshd", x, layer.query.kernel[...]) + of_query
    logits = jnp.einsum("bshd,bthd->bhst", query, pair[:, :, 0])
    sees = segments[:, None, :, None] == memory_segments[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(sees, logits, -jnp.inf), -1)
    attended = jnp.einsum("bhst,bthd->bshd", weights, pair[:, :, 1])
    return jnp.einsum("bshd,hde->bse", attended, layer.output.kernel[...]) + of_output


@pytest.mark.parametrize("implementation", [materialized, chunked], ids=["materialized", "xla"])
def test_attention_to_another_sequence_is_its_definition_on_every_mesh(implementation, rules_for):
    with use(rules_for()):
        x, memory, cotangent, *segments = arrays()
        expected, pull = jax.vjp(lambda x, memory: plain(made(implementation), x, memory, *segments), x, memory)
        gradients = pull(cotangent)
        weights = run(implementation)[2]
    for mesh in ({}, {"data": 2, "tensor": 4}):
        with use(rules_for(**mesh)):
            out, others, own = run(implementation)
        np.testing.assert_allclose(out, expected, atol=2e-5)
        for one, other in zip(others, gradients, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)
        assert own.keys() == weights.keys() and len(own) == 6
        for name, value in weights.items():
            # sums over all positions, in another order
            np.testing.assert_allclose(own[name], value, atol=4e-6 * np.abs(value).max(), err_msg=name)


def is_parameter(node) -> bool:
    return isinstance(node, nnx.Variable)


def as_used(variable: nnx.Variable) -> nnx.Variable:
    """Its shape as it lies where it is used."""
    value, layout = variable.get_value(), variable.get_metadata("spec").layout
    sharding = NamedSharding(current().mesh, layout.used)
    return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))


def test_parts_of_tensor_gather_both_sequences_once_each_way():
    """Sequence parallelism: queries' and keys' sequences are put together before the products and their gradients are
    reduced to parts after them; of the output the reverse. A backward may gather both again for gradients of weights.
    """
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays()]
    mesh = build_mesh(MeshConfig(data=1, tensor=4), gpu_devices("h100", 4))
    with use(make_rules(mesh, ShardingConfig())):
        state = jax.tree.map(as_used, nnx.eval_shape(lambda: pull_of(chunked)[0]), is_leaf=is_parameter)
        compiled = jax.jit(lambda *given: pull_of(chunked)[1](*given)).lower(state, *shapes).compile()
        found = census(hlo.parse(compiled.as_text() or ""), current().sizes)
    moved = {kind: sum(one.bytes for one in found if one.kind == kind) for kind in ("all_gather", "reduce_scatter")}
    stream, memory = (4 * ROWS * length * EMBED for length in (QUERIES, KEYS))
    assert {axis for one in found for axis in one.axes} == {"tensor"}
    assert moved["reduce_scatter"] == stream + (stream + memory)
    # forward, the output's cotangent, and again
    assert stream + memory + stream <= moved["all_gather"] <= 2 * (stream + memory) + stream
    # of biases that all have, sums; nothing as large as a sequence
    assert all(one.bytes <= 4 * EMBED for one in found if one.kind == "all_reduce")
