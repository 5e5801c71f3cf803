"""Every implementation of attention against `reference` in float32, and `reference` against its definition.

One suite for all: an implementation that refuses a case on this device says why, any other must compute it."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxtron.config import UserError
from jaxtron.kernels.attention import chunked, reference
from jaxtron.kernels.attention.attention import attention, missing_feature
from jaxtron.kernels.attention.backend import IMPLEMENTATIONS
from jaxtron.kernels.attention.dropout import kept as kept_of
from jaxtron.kernels.attention.spec import AttentionSpec

DEVICE_KIND = jax.devices()[0].device_kind
_PLAIN = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
# those that compute here, with their derivative
HERE = [
    name
    for name, module in IMPLEMENTATIONS.items()
    if module is not reference
    and "log_sum_exp" in module.features
    and module.unsupported_reason(_PLAIN, _PLAIN, _PLAIN, AttentionSpec(), DEVICE_KIND) is None
]
# root mean square of the relative error: long sums for float32; in 16 bits three roundings (the output, of which the
# backward makes delta; weights and scores' gradients for the products; the result), each of up to 2^-8 or 2^-11
UNITS = {"float32": 2e-6, "bfloat16": 1.5 * 2.0**-8, "float16": 1.5 * 2.0**-11}
# compiling is most of the suite's time, and what LLVM makes faster is not what is tested
OPTIONS = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
LARGEST_TILES = chunked.MOST_QUERIES, chunked.MOST_KEYS

FEATURES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 70},
    "full_window": {"causal": False, "window": 70},
    "scale": {"logits_scale": 0.3},
    "soft_cap": {"logits_soft_cap": 2.0},
    "slopes": {"slopes": True},
    "full_slopes": {"causal": False, "slopes": True},
    # far less than the sequences, so that most distances read its ends
    "distances": {"distances": 41},
    "full_distances": {"causal": False, "distances": 40, "logits_soft_cap": 2.0, "slopes": True, "segments": True},
    "segments": {"segments": True},
    "full_segments": {"causal": False, "segments": True},
    "sinks": {"sinks": True},
    "dropout": {"dropout": 0.3},
    "later_queries": {"q_offset": 90, "kv_offset": 30},
    # the first 40 queries come before every key
    "later_keys": {"q_offset": 60, "kv_offset": 100, "sinks": True},
    "later_distances": {"causal": False, "distances": 301, "q_offset": 60, "kv_offset": 100, "sinks": True},
    "all": {
        "window": 200,
        "logits_soft_cap": 2.0,
        "logits_scale": 0.2,
        "slopes": True,
        "segments": True,
        "sinks": True,
        "dropout": 0.1,
        "q_offset": 32,
        "kv_offset": 48,
    },
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles at the suite's sizes."""
    monkeypatch.setattr(chunked, "MOST_QUERIES", 128)
    monkeypatch.setattr(chunked, "MOST_KEYS", 192)


def documents(length, rows, seed):
    """Documents of random lengths, different in each row."""
    generator = np.random.default_rng(seed)
    return jnp.asarray(np.sort(generator.integers(0, 5, size=(rows, length)), 1), jnp.int32)


def make_case(
    sizes,
    heads=(4, 2),
    dims=(64, 64),
    dtype="float32",
    rows=2,
    segments=False,
    slopes=False,
    sinks=False,
    distances=0,
    dropout=0.0,
    **spec,
):
    """Inputs by name, their spec, and cotangents of output and log-sum-exp."""
    (queries, keys), (num_heads, num_kv_heads), (dim, value_dim) = sizes, heads, dims
    generator = np.random.default_rng(queries + 7 * keys)

    def normal(*shape):
        return jnp.asarray(generator.normal(size=shape), dtype)

    inputs = {
        "q": normal(rows, queries, num_heads, dim),
        "k": normal(rows, keys, num_kv_heads, dim),
        "v": normal(rows, keys, num_kv_heads, value_dim),
    }
    if sinks:
        inputs["sinks"] = normal(num_heads).astype(jnp.float32)
    if distances:
        inputs["distance_bias"] = normal(num_heads, distances).astype(jnp.float32)
    if segments:
        spec["q_segment_ids"], spec["kv_segment_ids"] = documents(queries, rows, 0), documents(keys, rows, 1)
    if slopes:
        spec["alibi_slopes"] = jnp.asarray(2.0 ** (-8 * np.arange(1, num_heads + 1) / num_heads), jnp.float32)
    if dropout:
        seeds = generator.integers(0, 1 << 32, (rows, num_heads, 2), dtype=np.uint32)
        spec |= {"dropout_rate": dropout, "dropout_seeds": jnp.asarray(seeds)}
    cotangents = normal(rows, queries, num_heads, value_dim), normal(rows, num_heads, queries).astype(jnp.float32)
    return inputs, AttentionSpec(**spec), cotangents


def attend(implementation, inputs, spec):
    heads = (inputs[name] for name in "qkv")
    spec = dataclasses.replace(spec, distance_bias=inputs.get("distance_bias"))
    return attention(*heads, spec, IMPLEMENTATIONS[implementation], sinks=inputs.get("sinks"))


def gradients(implementation, inputs, spec, cotangents):
    """Output, log-sum-exp and the gradient of every input, by name."""
    (out, lse), pull = jax.vjp(lambda inputs: attend(implementation, inputs, spec), inputs)
    (pulled,) = pull(cotangents if lse is not None else (cotangents[0], None))
    told = {} if lse is None else {"lse": lse}
    return {"out": out, **told, **{f"d{name}": gradient for name, gradient in pulled.items()}}


run = jax.jit(gradients, static_argnums=0, compiler_options=OPTIONS)


def expected(inputs, spec, cotangents):
    """`run` of the reference, from the same numbers in float32."""
    return run("reference", widened(inputs), spec, widened(cotangents))


def widened(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def check(got, want, unit):
    """Each array within `unit` of the root mean square, and within 4 units of the largest at every element."""
    assert got.keys() == want.keys()
    scores = np.asarray(want.get("lse", 0.0), np.float64)
    # an exponential is relatively as wrong as its argument is absolutely: half the last place of the largest score
    unit = unit + 2.0**-24 * np.abs(scores[np.isfinite(scores)]).max(initial=0)
    for name in want:
        ours, theirs = (np.asarray(x, np.float64) for x in (got[name], want[name]))
        assert ours.shape == theirs.shape, name
        finite = np.isfinite(theirs)
        np.testing.assert_array_equal(ours[~finite], theirs[~finite], err_msg=name)
        ours, theirs = ours[finite], theirs[finite]
        if not theirs.size or not np.abs(theirs).max():
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
            continue
        error = np.abs(ours - theirs)
        assert error.max() <= 4 * unit * np.abs(theirs).max(), f"{name}: off by {error.max()}"
        # of a few numbers, each a sum over all rows, the mean says nothing
        few = error.size < 100
        # and those of distances are sums over rows of what each was rounded by, where XLA fuses no products with it
        wide = 2 if name == "ddistance_bias" else 1
        mean, bound = np.sqrt(np.mean(error**2)), wide * unit * np.sqrt(np.mean(theirs**2))
        assert few or mean <= bound, f"{name}: off everywhere"


def compare(implementation, dtype="float32", **case):
    inputs, spec, cotangents = make_case(dtype=dtype, **case)
    module = IMPLEMENTATIONS[implementation]
    asked = dataclasses.replace(spec, distance_bias=inputs.get("distance_bias"))
    why = module.unsupported_reason(inputs["q"], inputs["k"], inputs["v"], asked, DEVICE_KIND)
    why = why or missing_feature(module, asked, needs_log_sum_exp=True)
    if why is not None:
        pytest.skip(f"{implementation} refuses: {why}")
    got = run(implementation, inputs, spec, cotangents)
    for name, array in inputs.items():
        assert got[f"d{name}"].dtype == array.dtype
    assert got["out"].dtype == inputs["q"].dtype and got["lse"].dtype == jnp.float32
    # of one key's weight, 1, no gradient is left but the rounding of two sums over the values' dimensions
    left = math.sqrt(inputs["v"].shape[-1]) if inputs["k"].shape[1] == 1 else 1
    check(got, expected(inputs, spec, cotangents), UNITS[dtype] * left)


# the grid has these too
@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in ("scale", "slopes", "full_segments")])
@pytest.mark.parametrize("implementation", HERE)
def test_features(implementation, feature):
    compare(implementation, sizes=(500, 500), **FEATURES[feature])


@pytest.mark.parametrize(
    "sizes",
    [
        *((63, 63), (1, 500), (500, 63)),
        *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((1, 1), (1000, 1000), (63, 500))),
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", HERE)
def test_sizes(implementation, sizes):
    compare(implementation, sizes=sizes, **FEATURES["all"])


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("implementation", HERE)
def test_sizes_of_plain_attention(implementation, size):
    compare(implementation, sizes=(size, size))


# others are in the grid
@pytest.mark.parametrize("heads", [(6, 2)], ids=["grouped"])
@pytest.mark.parametrize("implementation", HERE)
def test_heads(implementation, heads):
    compare(implementation, sizes=(150, 150), heads=heads, **FEATURES["all"])


@pytest.mark.parametrize("dims", [(96, 96), (192, 128), pytest.param((256, 256), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("implementation", HERE)
def test_dims(implementation, dims):
    compare(implementation, sizes=(150, 150), dims=dims)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", HERE)
def test_types(implementation, dtype):
    compare(implementation, dtype=dtype, sizes=(500, 500), **FEATURES["all"])


# of no features that it lacks, the last with all that it has
MATERIALIZED = {name: case for name, case in FEATURES.items() if not case.keys() & {"logits_soft_cap", "sinks"}} | {
    "late_keys": {"q_offset": 60, "kv_offset": 100},
    "most": {**FEATURES["all"], "logits_soft_cap": None, "sinks": False},
}


@pytest.mark.parametrize("feature", MATERIALIZED)
def test_materialized_features(feature):
    compare_materialized(sizes=(150, 170), **MATERIALIZED[feature])


@pytest.mark.parametrize("sizes", [(1, 1), (1, 500), (63, 20)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["multi_head", "multi_query"])
def test_materialized_sizes(sizes, heads):
    """As many keys as there are, whatever the number of queries: a token against a cache, for one."""
    compare_materialized(sizes=sizes, heads=heads, dims=(24, 40), **MATERIALIZED["most"])


def compare_materialized(**case):
    inputs, spec, (cotangent, dlse) = make_case(**case)
    want = expected(inputs, spec, (cotangent, jnp.zeros_like(dlse)))
    want.pop("lse")
    check(run("materialized", inputs, spec, (cotangent, None)), want, UNITS["float32"])


def test_the_last_query_of_a_cache_is_the_last_row_of_the_whole():
    """One query at its offset, traced as decoding's is, against all keys."""
    inputs, spec, _ = make_case((40, 40), dims=(16, 16), window=17, slopes=True)
    whole, _ = attend("materialized", inputs, spec)

    @jax.jit
    def last(inputs, offset):
        return attend("materialized", {**inputs, "q": inputs["q"][:, -1:]}, dataclasses.replace(spec, q_offset=offset))

    np.testing.assert_allclose(last(inputs, jnp.int32(39))[0], whole[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["materialized", "reference"])
def test_dropped_probabilities_are_those_of_plain_mathematics(implementation):
    sizes, rate = (20, 30), 0.25
    inputs, spec, (cotangent, _) = make_case(sizes, dims=(16, 16), dropout=rate)
    kept = kept_of(spec, *sizes) / (1 - rate)

    def plain(inputs):
        q, (k, v) = inputs["q"], (jnp.repeat(inputs[name], 2, 2) for name in "kv")
        logits = jnp.einsum("bshd,bthd->bhst", q, k) / 4
        logits = jnp.where(jnp.arange(sizes[0])[:, None] >= jnp.arange(sizes[1]), logits, -jnp.inf)
        return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(logits, -1) * kept, v)

    out, pull = jax.vjp(plain, inputs)
    want = {"out": out, **{f"d{name}": array for name, array in pull(cotangent)[0].items()}}
    dlse = None if implementation == "materialized" else jnp.zeros((2, 4, sizes[0]))
    got = run(implementation, inputs, spec, (cotangent, dlse))
    got.pop("lse", None)
    check(got, want, UNITS["float32"])
    # without seeds, as in evaluation, nothing is dropped
    whole = attend(implementation, inputs, dataclasses.replace(spec, dropout_seeds=None))[0]
    without = dataclasses.replace(spec, dropout_rate=0.0, dropout_seeds=None)
    np.testing.assert_array_equal(whole, attend(implementation, inputs, without)[0])


@pytest.mark.parametrize(
    ("name", "spec", "sinks"),
    [
        ("cudnn", {"dropout": 0.5}, False), ("materialized", {"logits_soft_cap": 2.0}, False),
        ("materialized", {}, True), ("cudnn", {"q_offset": 3}, False),
    ],
)  # fmt: skip
def test_what_an_implementation_lacks_is_refused_where_it_is_called(name, spec, sinks):
    inputs, spec, _ = make_case((8, 8), sinks=sinks, **spec)
    with pytest.raises(UserError, match="this implementation of attention cannot: it"):
        attend(name, inputs, spec)


GRID = [
    pytest.param(feature, size, heads, dims, dtype, id=f"{feature}-{size}-{heads}-{dims}-{dtype}")
    for feature, size, (heads, dims), dtype in itertools.product(
        FEATURES,
        (1, 63, 500, 1000),
        [((4, 4), (64, 64)), ((4, 2), (192, 128)), ((4, 1), (128, 128))],
        ("float32", "bfloat16"),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("feature", "size", "heads", "dims", "dtype"), GRID)
@pytest.mark.parametrize("implementation", HERE)
def test_grid(implementation, feature, size, heads, dims, dtype):
    compare(implementation, dtype=dtype, sizes=(size, size), heads=heads, dims=dims, **FEATURES[feature])


def definition(inputs, spec):
    """Output and log-sum-exp by loops over rows, heads and queries in float64."""
    q, k, v = (np.asarray(inputs[name], np.float64) for name in "qkv")
    rows, queries, heads, _ = q.shape
    out, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.full((rows, heads, queries), -np.inf)
    if spec.dropout_rate:
        # which ones: tests/kernels/test_attention_dropout.py
        mask = np.asarray(kept_of(spec, queries, k.shape[1])) / (1 - round(spec.dropout_rate * 65536) / 65536)
    for row, head, i in np.ndindex(rows, heads, queries):
        kv_head = head // (heads // k.shape[2])
        distance = (spec.q_offset + i) - (spec.kv_offset + np.arange(k.shape[1]))
        seen = np.ones(k.shape[1], bool)
        if spec.causal:
            seen &= distance >= 0
        if spec.window is not None:
            seen &= (distance < spec.window) & (distance > -spec.window)
        if spec.q_segment_ids is not None:
            seen &= np.asarray(spec.q_segment_ids[row, i] == spec.kv_segment_ids[row])
        scores = k[row, :, kv_head] @ q[row, i, head] * spec.scale(q.shape[-1])
        if spec.logits_soft_cap is not None:
            scores = spec.logits_soft_cap * np.tanh(scores / spec.logits_soft_cap)
        if spec.alibi_slopes is not None:
            scores = scores - float(spec.alibi_slopes[head]) * distance
        if "distance_bias" in inputs:
            table = np.asarray(inputs["distance_bias"][head], np.float64)
            scores = scores + table[np.clip(len(table) // 2 - distance, 0, len(table) - 1)]
        weights = np.exp(scores[seen])
        sink = np.exp(float(inputs["sinks"][head])) if "sinks" in inputs else 0.0
        kept = mask[row, head, i, seen] if spec.dropout_rate else np.ones(seen.sum())
        if weights.sum() + sink:
            out[row, i, head] = (weights * kept) @ v[row, seen, kv_head] / (weights.sum() + sink)
            lse[row, head, i] = np.log(weights.sum() + sink)
    return {"out": out, "lse": lse}


@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_is_the_definition(feature):
    inputs, spec, cotangents = make_case((70, 90), dims=(8, 16), **FEATURES[feature])
    got = run("reference", inputs, spec, cotangents)
    check({name: got[name] for name in ("out", "lse")}, definition(inputs, spec), UNITS["float32"])


@pytest.mark.parametrize("feature", ["causal", "full_window", "later_distances", "all"])
def test_gradients_of_the_reference_are_differences_of_its_values(feature):
    """Along random directions: every row attends to something, for the log-sum-exp to have a derivative."""
    case = {**FEATURES[feature], "segments": False, "q_offset": 60, "kv_offset": 45}
    inputs, spec, cotangents = make_case((30, 40), dims=(8, 16), **case)
    got = run("reference", inputs, spec, cotangents)

    def value(inputs):
        parts = definition(inputs, spec)
        return sum(np.vdot(parts[name], np.asarray(x)) for name, x in zip(("out", "lse"), cotangents, strict=True))

    generator = np.random.default_rng(0)
    for name, array in inputs.items():
        along = generator.normal(size=array.shape)
        step = 1e-4
        moved = [value({**inputs, name: np.asarray(array, np.float64) + sign * step * along}) for sign in (1, -1)]
        want = (moved[0] - moved[1]) / (2 * step)
        # float32 gradients summed along the direction
        np.testing.assert_allclose(np.vdot(np.asarray(got[f"d{name}"], np.float64), along), want, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("feature", ["causal", "full", "window", "scale"])
def test_cudnn_on_a_gpu(feature):
    """Beside the suite, as it returns no log-sum-exp."""
    inputs, spec, (cotangent, _) = make_case((512, 512), dims=(128, 128), dtype="bfloat16", **FEATURES[feature])

    want = expected(inputs, spec, (cotangent, jnp.zeros((2, 4, 512))))
    want.pop("lse")
    check(gradients("cudnn", inputs, spec, (cotangent, None)), want, UNITS["bfloat16"])


@pytest.mark.parametrize("implementation", [*HERE, "reference"])
def test_rows_that_attend_to_nothing(implementation):
    """By position, by window and by document."""
    segments = jnp.asarray([[0] * 40 + [7] * 60], jnp.int32), jnp.asarray([[0] * 100], jnp.int32)
    specs = {
        20: AttentionSpec(kv_offset=20),
        30: AttentionSpec(q_offset=-30),
        100: AttentionSpec(kv_offset=1000, causal=False, window=10),
        -60: AttentionSpec(causal=False, q_segment_ids=segments[0], kv_segment_ids=segments[1]),
    }
    inputs, _, cotangents = make_case((100, 100), rows=1)
    for count, spec in specs.items():
        got = run(implementation, inputs, spec, cotangents)
        empty = np.zeros(100, bool)
        empty[slice(count) if count > 0 else slice(count, None)] = True
        assert not np.asarray(got["out"])[:, empty].any() and not np.asarray(got["dq"])[:, empty].any()
        np.testing.assert_array_equal(np.isneginf(got["lse"][0, 0]), empty)
        assert all(np.isfinite(got[name]).all() for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("implementation", HERE)
def test_padding_leaves_no_trace(implementation, dtype):
    """Documents of huge numbers after the real ones change nothing before them, and get no gradient."""
    real, padded = 130, 300
    inputs, _, cotangents = make_case((padded, padded), dtype=dtype, dims=(64, 64))
    after = jnp.arange(padded) >= real
    segments = jnp.broadcast_to(after.astype(jnp.int32), (2, padded))
    # values that nobody reads are the largest of the type, so that their products overflow; keys leave scores finite
    huge = {"q": 0, "k": 3e4 if dtype == "float16" else 1e30, "v": float(jnp.finfo(dtype).max)}
    poisoned = {name: jnp.where(after[:, None, None], jnp.asarray(huge[name], dtype), x) for name, x in inputs.items()}
    spec = AttentionSpec(causal=False, q_segment_ids=0 * segments, kv_segment_ids=segments)
    got = run(implementation, poisoned, spec, cotangents)
    want = run(
        implementation, {**inputs, **{name: inputs[name][:, :real] for name in "kv"}, "q": poisoned["q"]},
        AttentionSpec(causal=False), cotangents,
    )  # fmt: skip
    for name in ("dk", "dv"):
        assert not np.asarray(got[name][:, real:], np.float32).any()
        got[name] = got[name][:, :real]
    check(got, want, UNITS[dtype])


@pytest.mark.parametrize("implementation", HERE)
def test_parts_of_the_keys_join_by_their_log_sum_exp(implementation):
    """As ring attention does, with traced offsets, and each part drops what the whole does."""
    inputs, spec, cotangents = make_case((200, 576), q_offset=400, window=350, dropout=0.2)
    whole = expected(inputs, spec, cotangents)

    def by_parts(inputs, cotangents, starts):
        def joined(inputs):
            parts = []
            for part in range(3):
                here = slice(192 * part, 192 * (part + 1))
                piece = {"q": inputs["q"], "k": inputs["k"][:, here], "v": inputs["v"][:, here]}
                parts.append(attend(implementation, piece, dataclasses.replace(spec, kv_offset=starts[part])))
            lse = functools.reduce(jnp.logaddexp, [lse for _, lse in parts])
            return sum(out * jnp.exp(part - lse).swapaxes(1, 2)[..., None] for out, part in parts), lse

        (out, lse), pull = jax.vjp(joined, inputs)
        return {"out": out, "lse": lse, **{f"d{name}": x for name, x in pull(cotangents)[0].items()}}

    got = jax.jit(by_parts, compiler_options=OPTIONS)(inputs, cotangents, jnp.asarray([0, 192, 384]))
    # three roundings for one
    check(got, whole, 2 * UNITS["float32"])


@pytest.mark.parametrize("implementation", HERE)
def test_vmap(implementation):
    """Over everything that is an array: inputs, offsets, documents, slopes, seeds."""
    case = {"rows": 1, "segments": True, "slopes": True, "dropout": 0.2}
    cases = [make_case((150, 150), q_offset=offset, **case) for offset in (0, 48)]
    stacked = jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x) for x in xs]), *cases)
    got = jax.jit(jax.vmap(functools.partial(gradients, implementation)), compiler_options=OPTIONS)(*stacked)
    for index, case in enumerate(cases):
        check({name: array[index] for name, array in got.items()}, expected(*case), UNITS["float32"])


def test_the_backward_keeps_what_a_policy_names():
    """With output and log-sum-exp kept, nothing of the forward is computed again."""
    inputs, spec, _ = make_case((256, 256), rows=1)

    def loops(policy):
        def loss(inputs):
            return jnp.sum(jax.checkpoint(lambda inputs: attend("xla", inputs, spec)[0], policy=policy)(inputs))

        return str(jax.make_jaxpr(jax.grad(loss))(inputs)).count(" scan[")

    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_statistics")
    assert loops(names) == 2 < loops(jax.checkpoint_policies.nothing_saveable)


def place(mesh, specs, arrays):
    return jax.tree.map(lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec)), specs, arrays, is_leaf=is_spec)


def is_spec(leaf):
    return isinstance(leaf, PartitionSpec)


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
EIGHT = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices: one GPU has no mesh")


@EIGHT
@pytest.mark.parametrize("manual", [{"data", "tensor"}, {"data"}], ids=["all_manual", "heads_explicit"])
@pytest.mark.parametrize("implementation", HERE)
def test_shard_map_over_batch_and_heads(implementation, manual):
    """Manual batch, and heads manual or Explicit: the numbers of one device, and no collective."""
    by_distance = not missing_feature(
        IMPLEMENTATIONS[implementation], AttentionSpec(distance_bias=jnp.zeros((8, 1))), needs_log_sum_exp=True
    )
    case = {**FEATURES["all"], "sinks": False, "distances": 41 * by_distance}
    inputs, spec, cotangents = make_case((300, 300), heads=(8, 4), **case)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    whole, heads = PartitionSpec("data", None, "tensor", None), PartitionSpec("data", "tensor", None)
    per_row, per_head = PartitionSpec("data", None), PartitionSpec("tensor")

    def manual_part(spec):
        return PartitionSpec(*(axis if axis in manual else None for axis in spec))

    known, of_spec = spec.split()

    def body(inputs, cotangents, of_spec):
        return gradients(implementation, inputs, known.with_arrays(of_spec), cotangents)

    lies = {"q_segment_ids": per_row, "kv_segment_ids": per_row, "alibi_slopes": per_head, "dropout_seeds": heads}
    names = dict.fromkeys(inputs, whole) | ({"distance_bias": per_head} if by_distance else {})
    specs = (names, (whole, heads), lies)
    outputs = {"out": whole, "lse": heads, **{f"d{name}": spec for name, spec in names.items()}}
    arrays = (inputs, cotangents, of_spec)
    with jax.set_mesh(mesh):
        placed = place(mesh, specs, arrays)
        parts = [jax.tree.map(manual_part, tree, is_leaf=is_spec) for tree in (specs, outputs)]
        mapped = jax.jit(jax.shard_map(body, axis_names=manual, in_specs=parts[0], out_specs=parts[1]))
        compiled = mapped.lower(*placed).compile(OPTIONS)
        got = compiled(*placed)
    lines = [line for line in compiled.as_text().splitlines() if any(f" {name}" in line for name in COLLECTIVES)]
    # of a table that rows share, gradients are summed over them, heads by themselves
    summed = [line for line in lines if by_distance and " all-reduce(" in line]
    assert len(summed) <= 1 and all("f32[2,41]" in line or "f32[8,41]" in line for line in summed), summed
    lines = [line for line in lines if line not in summed]
    # JAX 0.10 gathers what enters and leaves any region on CPUs: those name nothing inside it
    assert not [line for line in lines if '/shard_map"' not in line]
    assert not lines or jax.__version_info__ < (0, 11)
    for name, layout in outputs.items():
        assert got[name].sharding.is_equivalent_to(NamedSharding(mesh, layout), got[name].ndim), name
    check(got, expected(inputs, spec, cotangents), UNITS["float32"])


@EIGHT
@pytest.mark.parametrize("implementation", HERE)
def test_shared_keys_get_the_sum_of_gradients(implementation):
    """In a manual region where queries vary and keys are one for all, as in an all-gather of context."""
    inputs, spec, cotangents = make_case((400, 400), sinks=True)
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Explicit,))
    split, shared, heads = PartitionSpec(None, "context"), PartitionSpec(), PartitionSpec(None, None, "context")

    def body(inputs, cotangents):
        return gradients(
            implementation, inputs, AttentionSpec(q_offset=jax.lax.axis_index("context") * 100), cotangents
        )

    in_specs = ({"q": split, "k": shared, "v": shared, "sinks": shared}, (split, heads))
    out_specs = {"out": split, "lse": heads, "dq": split, "dk": shared, "dv": shared, "dsinks": shared}
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(body, in_specs=in_specs, out_specs=out_specs)
        got = jax.jit(mapped, compiler_options=OPTIONS)(*place(mesh, in_specs, (inputs, cotangents)))
    check(got, expected(inputs, spec, cotangents), UNITS["float32"])


SPECS = {
    "causal": AttentionSpec(),
    "full": AttentionSpec(causal=False),
    "window": AttentionSpec(window=100),
    "full_window": AttentionSpec(causal=False, window=100),
    "offset": AttentionSpec(q_offset=300, kv_offset=50, window=150),
    "nothing": AttentionSpec(kv_offset=5000),
}


@pytest.mark.parametrize("name", SPECS)
def test_xla_visits_the_tiles_where_somebody_attends(name):
    spec, sizes = SPECS[name], (700, 900)
    tiles = chunked.cut(*sizes)
    attends = np.asarray(reference.allowed(spec, *sizes))[0]
    padding = [(0, tiles.num_queries * tiles.query_block - sizes[0]), (0, tiles.num_keys * tiles.key_block - sizes[1])]
    blocks = np.pad(attends, padding).reshape(tiles.num_queries, tiles.query_block, tiles.num_keys, tiles.key_block)
    q = jnp.zeros((1, sizes[0], 1, 8))
    needed = np.asarray(chunked._Scoring.of(q, q, spec, tiles).needed())
    first, last = (np.asarray(x)[:, None] for x in chunked._bounds(jnp.asarray(needed)))
    columns = np.arange(tiles.num_keys)
    np.testing.assert_array_equal((first <= columns) & (columns < last), blocks.any((1, 3)))


def test_xla_skips_other_documents():
    """Between documents of whole tiles, only those of the same document are visited."""
    segments = jnp.asarray(np.repeat(np.arange(4), 128)[None], jnp.int32)
    q = jnp.zeros((1, 512, 1, 8))
    tiles = chunked.Tiles(512, 512, 128, 128)
    spec = AttentionSpec(causal=False, q_segment_ids=segments, kv_segment_ids=segments)
    np.testing.assert_array_equal(chunked._Scoring.of(q, q, spec, tiles).needed(), np.eye(4, dtype=bool))


def test_memory_of_xla_is_linear_in_the_sequence(monkeypatch):
    """Temporaries of forward and backward at 8k, 16k and 32k tokens, with tiles of the usual size."""
    monkeypatch.setattr(chunked, "MOST_QUERIES", LARGEST_TILES[0])
    monkeypatch.setattr(chunked, "MOST_KEYS", LARGEST_TILES[1])

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, AttentionSpec(), chunked)[0])

    temporaries = []
    for length in (8192, 16384, 32768):
        q, k = (jax.ShapeDtypeStruct((1, length, heads, 64), jnp.bfloat16) for heads in (2, 1))
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    for shorter, longer in itertools.pairwise(temporaries):
        assert longer <= 2.1 * shorter
    # the scores of one head alone
    assert temporaries[-1] < 4 * 32768**2 / 32
