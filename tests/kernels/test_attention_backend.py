"""The backend of attention: what was named or an error, else the fastest that can."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxtron.config import UserError
from jaxtron.kernels.attention import chunked, cudnn, materialized, mosaic, reference
from jaxtron.kernels.attention.attention import Implementation, attention
from jaxtron.kernels.attention.backend import IMPLEMENTATIONS, SHORT, select_backend
from jaxtron.kernels.attention.spec import AttentionSpec

CPU, AMPERE, HOPPER = "cpu", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"


def shapes(dim=128, value_dim=None, dtype="bfloat16", queries=512, keys=512, heads=8, kv_heads=2):
    return (
        jax.ShapeDtypeStruct((2, queries, heads, dim), dtype),
        jax.ShapeDtypeStruct((2, keys, kv_heads, dim), dtype),
        jax.ShapeDtypeStruct((2, keys, kv_heads, value_dim or dim), dtype),
    )


@pytest.fixture
def installed(monkeypatch):
    """JAX is told that there is a cuDNN, of version 9.10."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


class Kernels:
    """A stand-in for our kernels, which takes Hopper and 16 bits alone."""

    features = mosaic.features
    forward = backward = staticmethod(pytest.fail)

    @staticmethod
    def unsupported_reason(q, k, v, spec, device_kind):
        return None if "H100" in device_kind and q.dtype != jnp.float32 else "it needs Hopper and 16 bits"


@pytest.fixture
def kernels(monkeypatch, installed):
    monkeypatch.setitem(IMPLEMENTATIONS, "mosaic", Kernels)
    return Kernels


def select(name, heads, spec, device_kind, needs_log_sum_exp=False):
    return select_backend(name, *heads, spec, device_kind, needs_log_sum_exp=needs_log_sum_exp)


LONG = {"queries": 2 * SHORT, "keys": 2 * SHORT}


def test_auto_takes_the_fastest_that_can(kernels):
    assert select("auto", shapes(), AttentionSpec(), HOPPER).implementation is kernels
    assert select("auto", shapes(), AttentionSpec(), AMPERE).implementation is cudnn
    assert select("auto", shapes(), AttentionSpec(), CPU).implementation is materialized
    assert select("auto", shapes(**LONG), AttentionSpec(), CPU).implementation is chunked
    assert select("auto", shapes(dtype="float32", **LONG), AttentionSpec(), HOPPER).implementation is chunked


def test_all_but_cudnn_drop_probabilities(kernels):
    drops = AttentionSpec(dropout_rate=0.1)
    assert select("auto", shapes(), drops, HOPPER).implementation is kernels
    assert select("auto", shapes(**LONG), drops, AMPERE).implementation is chunked
    assert select("auto", shapes(), drops, CPU, needs_log_sum_exp=True).implementation is chunked
    assert select("auto", shapes(), drops, AMPERE).reason == (
        f"attention: materialized (short sequences, and no kernel for {AMPERE} that drops probabilities)"
    )
    with pytest.raises(UserError, match="implementation cudnn cannot: it drops no probabilities; use auto"):
        select("cudnn", shapes(), drops, HOPPER)


def test_kernels_drop_where_pieces_start_at_whole_calls():
    """Positions of a thread's numbers: others would be drawn by two threads."""
    for start, refused in ((32, False), (24, True)):
        spec = AttentionSpec(dropout_rate=0.1, q_offset=start)
        assert bool(mosaic.unsupported_reason(*shapes(), spec, HOPPER)) == refused
    assert mosaic.unsupported_reason(*shapes(), AttentionSpec(q_offset=24), HOPPER) is None
    with pytest.raises(UserError, match="mosaic cannot: where it drops, .* multiples of 16, not at 24"):
        select("mosaic", shapes(), AttentionSpec(dropout_rate=0.1, q_offset=24), HOPPER)


def test_a_bias_by_distance_is_for_plain_jax_alone(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "features", mosaic.features)
    spec = AttentionSpec(causal=False, distance_bias=jnp.zeros((8, 257)))
    assert select("auto", shapes(), spec, HOPPER).reason == (
        f"attention: materialized (short sequences, and no kernel for {HOPPER} that knows biases by distance)"
    )
    long = select("auto", shapes(**LONG), spec, HOPPER)
    assert long.implementation is chunked and "not mosaic: it knows no bias by distance (T5)" in long.reason
    for name in ("mosaic", "cudnn"):
        with pytest.raises(UserError, match=f"implementation {name} cannot: .*no bias by distance .T5.; use auto"):
            select(name, shapes(), spec, HOPPER)


REFUSED_BY_CUDNN = {
    "soft cap": AttentionSpec(logits_soft_cap=30.0),
    "slopes": AttentionSpec(alibi_slopes=jnp.ones(8)),
    "an offset": AttentionSpec(q_offset=1),
}


@pytest.mark.parametrize("name", REFUSED_BY_CUDNN)
def test_auto_honours_what_the_faster_ones_refuse(name, installed):
    assert select("auto", shapes(**LONG), REFUSED_BY_CUDNN[name], AMPERE).implementation is chunked


def test_cudnn_serves_only_where_no_log_sum_exp_is_asked_for(installed):
    assert select("auto", shapes(), AttentionSpec(), AMPERE, needs_log_sum_exp=True).implementation is chunked
    with pytest.raises(UserError, match="cudnn cannot: it returns no log-sum-exp"):
        select("cudnn", shapes(), AttentionSpec(), AMPERE, needs_log_sum_exp=True)


def test_the_reason_is_one_line_that_says_what_was_passed_over(kernels):
    backend = select("auto", shapes(), AttentionSpec(logits_soft_cap=30.0), AMPERE)
    assert backend.implementation is chunked and "\n" not in backend.reason
    assert backend.reason == (
        f"attention: xla, the fastest that runs on {AMPERE}; "
        "not mosaic: it needs Hopper and 16 bits; not cudnn: it knows no soft cap; "
        "not materialized: it knows no soft cap"
    )
    assert select("auto", shapes(), AttentionSpec(), CPU).reason == (
        "attention: materialized (short sequences, and no kernel for cpu)"
    )
    assert select("reference", shapes(), AttentionSpec(), CPU).reason == "attention: reference, as asked"
    assert select("materialized", shapes(**LONG), AttentionSpec(), CPU).reason == "attention: materialized, as asked"


def test_a_named_one_is_taken_or_refused():
    assert select("xla", shapes(), AttentionSpec(), HOPPER).implementation is chunked
    assert select("reference", shapes(), AttentionSpec(), HOPPER).implementation is reference
    with pytest.raises(UserError, match="cudnn cannot: it needs an NVIDIA GPU since Ampere, not cpu; use auto"):
        select("cudnn", shapes(), AttentionSpec(), CPU)
    with pytest.raises(UserError, match="materialized cannot: it knows no soft cap; use auto"):
        select("materialized", shapes(), AttentionSpec(logits_soft_cap=1.0), CPU)
    known = "flash is not known to attention: use one of auto, .*cudnn, xla, materialized, reference"
    with pytest.raises(UserError, match=known):
        select("flash", shapes(), AttentionSpec(), CPU)


def test_every_implementation_is_one():
    for name, implementation in IMPLEMENTATIONS.items():
        assert isinstance(implementation, Implementation), name


SEGMENTS = jnp.zeros((2, 512), jnp.int32)
REFUSED = {
    "an older GPU": (AttentionSpec(), {}, "Tesla V100-SXM2-16GB", "since Ampere, not Tesla V100"),
    "float32": (AttentionSpec(), {"dtype": "float32"}, HOPPER, "not float32"),
    "wide heads": (AttentionSpec(), {"dim": 256}, AMPERE, "at most 128"),
    "wider heads": (AttentionSpec(), {"dim": 264}, HOPPER, "at most 256"),
    "odd heads": (AttentionSpec(), {"dim": 100}, HOPPER, "multiple of 8, not 100"),
    "other values": (AttentionSpec(), {"dim": 192, "value_dim": 128}, HOPPER, "192, not 128"),
    "segments": (AttentionSpec(q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS), {}, HOPPER, "segments"),
    "soft cap": (AttentionSpec(logits_soft_cap=1.0), {}, HOPPER, "soft cap"),
    "slopes": (AttentionSpec(alibi_slopes=jnp.ones(8)), {}, HOPPER, "slopes"),
    "an offset": (AttentionSpec(q_offset=8), {}, HOPPER, "offsets"),
    "a traced offset": (AttentionSpec(kv_offset=jnp.int32(0)), {}, HOPPER, "offsets"),
    "a full window": (AttentionSpec(causal=False, window=8), {}, HOPPER, "windows are causal"),
    "queries past the keys": (AttentionSpec(window=8), {"keys": 256}, HOPPER, "not 256 keys"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_cudnn_refuses(name, installed):
    spec, sizes, device_kind, why = REFUSED[name]
    with pytest.raises(UserError, match=f"implementation cudnn cannot: .*{why}"):
        select("cudnn", shapes(**sizes), spec, device_kind)


ACCEPTED = {"causal": {}, "full": {"causal": False}, "window": {"window": 128}, "scale": {"logits_scale": 0.5}}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_cudnn_accepts(name, dim, installed):
    assert select("cudnn", shapes(dim), AttentionSpec(**ACCEPTED[name]), HOPPER).implementation is cudnn


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN is here")
def test_cudnn_missing_is_said():
    """The device was said to be a GPU, but no cuDNN is installed here."""
    with pytest.raises(UserError, match="implementation cudnn cannot: JAX cannot use it here: cuDNN not found"):
        select("cudnn", shapes(), AttentionSpec(), HOPPER)
    backend = select("auto", shapes(**LONG), AttentionSpec(), AMPERE)
    assert backend.implementation is chunked and "not cudnn: JAX cannot use it here" in backend.reason


def test_deterministic_gradients(installed):
    spec = AttentionSpec(deterministic=True)
    assert select("auto", shapes(), spec, HOPPER).name == "mosaic"
    assert select("auto", shapes(**LONG), spec, AMPERE).implementation is chunked
    with pytest.raises(UserError, match="cudnn cannot: its backward adds up in any order"):
        select("cudnn", shapes(), spec, AMPERE)


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_reaches_the_kernels(monkeypatch, deterministic):
    asked = []

    def gradients(given, separate, target):
        asked.append(separate)
        return given[0].astype(jnp.float32), given[1], given[2]

    monkeypatch.setattr(mosaic, "_gradients", gradients)
    spec, lse = AttentionSpec(deterministic=deterministic), jax.ShapeDtypeStruct((2, 8, 512), jnp.float32)
    q, k, v = shapes()
    jax.eval_shape(lambda *arrays: mosaic.backward(*arrays, spec), q, k, v, lse, lse, q)
    assert asked == [deterministic]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (AttentionSpec(), ("CAUSAL", 0)),
        (AttentionSpec(causal=False), ("NO_MASK", 0)),
        (AttentionSpec(window=128), ("CAUSAL", 128)),
    ],
    ids=["causal", "full", "window"],
)
def test_cudnn_is_told_the_mask(installed, spec, said):
    """What is lowered for a GPU."""

    def loss(q, k, v):
        out, _ = attention(q, k, v, spec, cudnn)
        return jnp.sum(out.astype(jnp.float32))

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes()).lower(lowering_platforms=("cuda",)).as_text()
    plain = text.replace("\\22", '"').replace(" ", "")
    for call in ("__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("):
        assert f"@{call}" in plain
    specs, windows = (set(re.findall(rf'"{name}":"?(\w+)', plain)) for name in ("mask_type", "sliding_window_length"))
    assert (specs, windows) == ({said[0]}, {str(said[1])})


def test_the_log_sum_exp_is_returned_where_it_can_be_told():
    q, k, v = (jnp.ones(shape.shape, jnp.float32) for shape in shapes(dim=8, queries=5, keys=5))
    assert attention(q, k, v, AttentionSpec(), materialized)[1] is None
    assert attention(q, k, v, AttentionSpec(), chunked)[1].shape == (2, 8, 5)


BAD = {
    "heads": ({"heads": 5}, {}, "H a multiple of K"),
    "window": ({}, {"window": 0}, "window 0 must be at least 1"),
    "soft cap": ({}, {"logits_soft_cap": -1.0}, "logits_soft_cap -1.0 must be above 0"),
    "slopes": ({}, {"alibi_slopes": jnp.ones(3)}, r"slopes are \(3,\) and must be \(8,\)"),
    "distances": ({}, {"distance_bias": jnp.ones((3, 9))}, r"distance_bias is \(3, 9\) and must be \(8, distances\)"),
    "segments": ({}, {"q_segment_ids": SEGMENTS}, "given together"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    sizes, spec, why = BAD[name]
    q, k, v = (jnp.zeros(shape.shape, shape.dtype) for shape in shapes(**sizes))
    with pytest.raises(UserError, match=why):
        attention(q, k, v, AttentionSpec(**spec), chunked)
