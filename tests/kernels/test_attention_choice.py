"""Who computes attention: what was named or an error, else the fastest that can."""

import re
import types

import jax
import jax.numpy as jnp
import pytest

from jaxtron.config import UserError
from jaxtron.kernels.attention import chunked, cudnn, reference
from jaxtron.kernels.attention.attention import attention
from jaxtron.kernels.attention.choose import IMPLEMENTATIONS, choose
from jaxtron.kernels.attention.mask import Mask

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


@pytest.fixture
def kernels(monkeypatch, installed):
    """A stand-in for our kernels, which refuses all but Hopper and float32."""

    def refusal(q, k, v, mask, device_kind):
        return None if "H100" in device_kind and q.dtype != jnp.float32 else "it needs Hopper and 16 bits"

    module = types.ModuleType("mosaic")
    module.refusal, module.forward = refusal, None
    monkeypatch.setitem(IMPLEMENTATIONS, "mosaic", module)
    return module


def test_auto_takes_the_fastest_that_can(kernels):
    assert choose("auto", shapes(), Mask(), HOPPER).module is kernels
    assert choose("auto", shapes(), Mask(), AMPERE, needs_lse=False).module is cudnn
    assert choose("auto", shapes(), Mask(), CPU).module is chunked
    assert choose("auto", shapes(dtype="float32"), Mask(), HOPPER).module is chunked


@pytest.mark.parametrize("mask", [Mask(soft_cap=30.0), Mask(slopes=jnp.ones(8)), Mask(q_offset=1)], ids=str)
def test_auto_honours_what_the_faster_ones_refuse(mask):
    assert choose("auto", shapes(), mask, AMPERE, needs_lse=False).module is chunked


def test_cudnn_serves_only_where_no_log_sum_exp_is_asked_for(installed):
    assert choose("auto", shapes(), Mask(), AMPERE).module is chunked
    with pytest.raises(UserError, match="cudnn cannot: it returns no log-sum-exp"):
        choose("cudnn", shapes(), Mask(), AMPERE)


def test_the_reason_is_one_line_that_says_what_was_passed_over(kernels):
    choice = choose("auto", shapes(), Mask(soft_cap=30.0), AMPERE, needs_lse=False)
    assert choice.module is chunked and "\n" not in choice.reason
    assert choice.reason == (
        f"attention: xla, the fastest that runs on {AMPERE}; "
        "not mosaic: it needs Hopper and 16 bits; not cudnn: it knows no soft cap"
    )
    assert choose("reference", shapes(), Mask(), CPU).reason == "attention: reference, as asked"


def test_a_named_one_is_taken_or_refused():
    assert choose("xla", shapes(), Mask(), HOPPER).module is chunked
    assert choose("reference", shapes(), Mask(), HOPPER).module is reference
    with pytest.raises(UserError, match="cudnn cannot: it needs an NVIDIA GPU since Ampere, not cpu; use auto"):
        choose("cudnn", shapes(), Mask(), CPU, needs_lse=False)
    with pytest.raises(UserError, match="implementation flash is not known: use one of auto, .*cudnn, xla, reference"):
        choose("flash", shapes(), Mask(), CPU)


SEGMENTS = jnp.zeros((2, 512), jnp.int32)
REFUSED = {
    "an older GPU": (Mask(), {}, "Tesla V100-SXM2-16GB", "since Ampere, not Tesla V100"),
    "float32": (Mask(), {"dtype": "float32"}, HOPPER, "not float32"),
    "wide heads": (Mask(), {"dim": 256}, AMPERE, "at most 128"),
    "wider heads": (Mask(), {"dim": 264}, HOPPER, "at most 256"),
    "odd heads": (Mask(), {"dim": 100}, HOPPER, "multiple of 8, not 100"),
    "other values": (Mask(), {"dim": 192, "value_dim": 128}, HOPPER, "192, not 128"),
    "segments": (Mask(q_segments=SEGMENTS, kv_segments=SEGMENTS), {}, HOPPER, "segments"),
    "soft cap": (Mask(soft_cap=1.0), {}, HOPPER, "soft cap"),
    "slopes": (Mask(slopes=jnp.ones(8)), {}, HOPPER, "slopes"),
    "an offset": (Mask(q_offset=8), {}, HOPPER, "offsets"),
    "a traced offset": (Mask(kv_offset=jnp.int32(0)), {}, HOPPER, "offsets"),
    "a full window": (Mask(causal=False, window=8), {}, HOPPER, "windows are causal"),
    "queries past the keys": (Mask(window=8), {"keys": 256}, HOPPER, "not 256 keys"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_cudnn_refuses(name):
    mask, sizes, device_kind, why = REFUSED[name]
    assert why in cudnn.refusal(*shapes(**sizes), mask, device_kind)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=128), Mask(scale=0.5)], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_cudnn_accepts(mask, dim, installed):
    assert cudnn.refusal(*shapes(dim), mask, HOPPER) is None


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN is here")
def test_cudnn_missing_is_said():
    """The device was said to be a GPU, but no cuDNN is installed here."""
    q, k, v = (jnp.zeros(shape.shape, shape.dtype) for shape in shapes())
    with pytest.raises(UserError, match="implementation cudnn cannot: JAX cannot use it here: cuDNN not found"):
        attention(q, k, v, Mask(), implementation="cudnn", device_kind=HOPPER, needs_lse=False)
    choice = choose("auto", shapes(), Mask(), AMPERE, needs_lse=False)
    assert choice.module is chunked and "not cudnn: JAX cannot use it here" in choice.reason


def test_deterministic_gradients(installed):
    assert choose("auto", shapes(), Mask(), HOPPER, deterministic=True).name == "mosaic"
    assert choose("auto", shapes(), Mask(), AMPERE, needs_lse=False, deterministic=True).module is chunked
    with pytest.raises(UserError, match="cudnn cannot: its backward adds up in any order"):
        choose("cudnn", shapes(), Mask(), AMPERE, needs_lse=False, deterministic=True)


def test_deterministic_reaches_the_kernels(kernels):
    kernels.backward = lambda *_, **options: options
    parts = (None,) * 6
    for deterministic in (False, True):
        choice = choose("mosaic", shapes(), Mask(), HOPPER, deterministic=deterministic)
        assert choice.backward(*parts, Mask()) == ({"deterministic": True} if deterministic else {})


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Mask(), ("CAUSAL", 0)),
        (Mask(causal=False), ("NO_MASK", 0)),
        (Mask(window=128), ("CAUSAL", 128)),
    ],
    ids=["causal", "full", "window"],
)
def test_cudnn_is_told_the_mask(installed, mask, said):
    """What is lowered for a GPU."""

    def loss(q, k, v):
        out, _ = attention(q, k, v, mask, implementation="cudnn", device_kind=HOPPER, needs_lse=False)
        return jnp.sum(out.astype(jnp.float32))

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes()).lower(lowering_platforms=("cuda",)).as_text()
    plain = text.replace("\\22", '"').replace(" ", "")
    for call in ("__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("):
        assert f"@{call}" in plain
    masks, windows = (set(re.findall(rf'"{name}":"?(\w+)', plain)) for name in ("mask_type", "sliding_window_length"))
    assert (masks, windows) == ({said[0]}, {str(said[1])})


def test_the_log_sum_exp_is_returned_where_it_is_needed():
    q, k, v = (jnp.ones(shape.shape, jnp.float32) for shape in shapes(dim=8, queries=5, keys=5))
    assert attention(q, k, v, Mask(), implementation="xla", needs_lse=False)[1] is None
    assert attention(q, k, v, Mask(), implementation="xla")[1].shape == (2, 8, 5)


BAD = {
    "heads": ({"heads": 5}, {}, "H a multiple of K"),
    "window": ({}, {"window": 0}, "window 0 must be at least 1"),
    "soft cap": ({}, {"soft_cap": -1.0}, "soft cap -1.0 must be above 0"),
    "slopes": ({}, {"slopes": jnp.ones(3)}, r"slopes are \(3,\) and must be \(8,\)"),
    "segments": ({}, {"q_segments": SEGMENTS}, "given together"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    sizes, mask, why = BAD[name]
    q, k, v = (jnp.zeros(shape.shape, shape.dtype) for shape in shapes(**sizes))
    with pytest.raises(UserError, match=why):
        attention(q, k, v, Mask(**mask))
