"""Our attention kernels on a Hopper GPU against `reference` in float32: numbers, repeats, padding, a training step.

Elsewhere `JAXTRON_TEST_ATTENTION=xla` runs the same checks of plain JAX, to test the tests.
"""

import functools
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from test_attention_implementations import DEVICE_KIND, FEATURES, UNITS, check, make_case, widened

from jaxtron.data.batch import TokenBatch
from jaxtron.data.config import DataConfig
from jaxtron.kernels.attention.attention import attention
from jaxtron.kernels.attention.backend import IMPLEMENTATIONS
from jaxtron.kernels.attention.spec import AttentionSpec
from jaxtron.models.decoder.attention_backends import attention_backends
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.run.configuration import Configuration, TrainConfig
from jaxtron.run.session import make_trainer
from jaxtron.run.step import batch_sharding, jit_step
from jaxtron.sharding.config import MeshConfig, ShardingConfig
from jaxtron.sharding.mesh import build_mesh
from jaxtron.sharding.rules import make_rules, use

IMPLEMENTATION = os.environ.get("JAXTRON_TEST_ATTENTION", "mosaic")
_PLAIN = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
_REFUSAL = IMPLEMENTATIONS[IMPLEMENTATION].unsupported_reason(_PLAIN, _PLAIN, _PLAIN, AttentionSpec(), DEVICE_KIND)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REFUSAL is not None, reason=str(_REFUSAL))]

# the reference is to be right, not fast: trying out its products would take most of the time
QUICK = (
    {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    if jax.default_backend() == "gpu"
    else {"xla_backend_optimization_level": 0}
)
# float32 throughout, of scores up to 10
LSE_ERROR = 1e-4
# the GPU's approximate tanh, of which the soft cap is a multiple
TANH_ERROR = 2.0**-10

GROUPED = {"heads": (4, 2), "dims": (128, 128)}
# every head dim, every feature, every length, groups of heads; each case compiles some four kernels
CASES = (
    {f"{dims}": {"dims": dims} for dims in ((64, 64), (96, 96), (192, 128), (256, 256), (40, 24))}
    | {name: {**GROUPED, **feature} for name, feature in FEATURES.items() if name != "scale"}
    | {f"{name}, 64": FEATURES[name] for name in ("full", "window", "full_segments", "soft_cap", "all")}
    | {f"{name}, 256": {"dims": (256, 256), **FEATURES[name]} for name in ("full", "segments", "all")}
    | {f"all, {dims}": {"dims": dims, **FEATURES["all"]} for dims in ((96, 96), (192, 128))}
    | {
        f"float16, {dims}": {"dims": dims, "dtype": "float16", **FEATURES[feature]}
        for dims, feature in (
            ((64, 64), "causal"), ((96, 96), "segments"), ((128, 128), "all"), ((192, 128), "window"),
            ((256, 256), "causal"),
        )
    }
    | {f"{size} positions": {**GROUPED, "sizes": (size, size)} for size in (1, 63, 1000, 4096)}
    | {f"all, {size} positions": {**GROUPED, "sizes": (size, size), **FEATURES["all"]} for size in (1, 63, 1000)}
    | {
        "full, 64, 4096 positions": {"sizes": (4096, 4096), "causal": False},
        "segments, 4096 positions": {**GROUPED, "sizes": (4096, 4096), **FEATURES["segments"]},
        "256, 4096 positions": {"sizes": (4096, 4096), "dims": (256, 256), "heads": (2, 1)},
    }
    | {f"{sizes}": {**GROUPED, "sizes": sizes, **FEATURES["all"]} for sizes in ((1, 500), (63, 500), (500, 63))}
    | {
        "multi-head": {"heads": (4, 4), "dims": (128, 128)},
        "multi-query": {"heads": (4, 1), "dims": (128, 128), **FEATURES["all"]},
        "groups of three, 64": {"heads": (6, 2)},
    }
)  # fmt: skip


def results(inputs, spec, cotangents, *, implementation=IMPLEMENTATION, deterministic=False):
    """Output, log-sum-exp and the gradient of every input, by name."""

    def run(inputs):
        heads, sinks = [inputs[name] for name in "qkv"], inputs.get("sinks")
        asked = replace(spec, deterministic=deterministic)
        return attention(*heads, asked, IMPLEMENTATIONS[implementation], sinks=sinks)

    (out, lse), pull = jax.vjp(run, inputs)
    return {"out": out, "lse": lse, **{f"d{name}": array for name, array in pull(cotangents)[0].items()}}


@functools.partial(jax.jit, compiler_options=QUICK)
def both(inputs, spec, cotangents):
    """With the fast and with the deterministic backward."""
    return [results(inputs, spec, cotangents, deterministic=deterministic) for deterministic in (False, True)]


@functools.partial(jax.jit, compiler_options=QUICK)
def _expected(inputs, spec, cotangents):
    return results(inputs, spec, cotangents, implementation="reference")


def expected(inputs, spec, cotangents):
    """What the reference makes of the same numbers in float32."""
    return _expected(widened(inputs), spec, widened(cotangents))


def check_lse(got, want, soft_cap=None):
    """It is of float32 whatever the inputs are: 16 bits' bound would hide much."""
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    error = np.abs(got[np.isfinite(want)] - want[np.isfinite(want)]).max(initial=0)
    assert error <= LSE_ERROR + (soft_cap or 0) * TANH_ERROR, f"lse: off by {error}"


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name):
    case = {"sizes": (500, 500), "dtype": "bfloat16", **CASES[name]}
    inputs, spec, cotangents = make_case(**case)
    want = expected(inputs, spec, cotangents)
    # of one key's weight, 1, no gradient is left but the rounding of two sums over the values' dimensions
    unit = UNITS[case["dtype"]] * (inputs["v"].shape[-1] ** 0.5 if inputs["k"].shape[1] == 1 else 1)
    made = both(inputs, spec, cotangents)
    for got in made:
        assert all(got[f"d{name}"].dtype == array.dtype for name, array in inputs.items())
        check_lse(got["lse"], want["lse"], spec.logits_soft_cap)
        check(got, want, unit)
    # the forward is one kernel for both
    for part in ("out", "lse"):
        np.testing.assert_array_equal(*(np.asarray(got[part]) for got in made), err_msg=part)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_padding_leaves_no_trace(dims, dtype):
    """Documents of huge numbers after the real ones change nothing before them, and get no gradient."""
    real, padded = 130, 300
    inputs, _, cotangents = make_case((padded, padded), dtype=dtype, dims=dims)
    after = jnp.arange(padded) >= real
    segments = jnp.broadcast_to(after.astype(jnp.int32), (2, padded))
    # sums of products stay finite: a weight of 0 times infinity is no number in any kernel that multiplies whole tiles
    huge = {"q": 0, "k": 3e4 if dtype == "float16" else 1e30, "v": 6e4 if dtype == "float16" else 1e30}
    poisoned = {name: jnp.where(after[:, None, None], jnp.asarray(huge[name], dtype), x) for name, x in inputs.items()}
    spec = AttentionSpec(causal=False, q_segment_ids=0 * segments, kv_segment_ids=segments)
    alone = {"q": poisoned["q"], **{name: inputs[name][:, :real] for name in "kv"}}
    want = expected(alone, AttentionSpec(causal=False), cotangents)
    for got in both(poisoned, spec, cotangents):
        for name in ("dk", "dv"):
            assert not np.asarray(got[name][:, real:], np.float32).any(), name
            got[name] = got[name][:, :real]
        check_lse(got["lse"], want["lse"])
        check(got, want, UNITS[dtype])


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_the_same_bits_every_time(dims):
    """Of the deterministic backward all, of the fast one all but dq, whose parts are added as they come.

    A product that reads shared memory while the next copy fills it would show here: no interpreter finds that.
    """
    inputs, spec, cotangents = make_case((1000, 1000), heads=(8, 2), dims=dims, dtype="bfloat16")

    @jax.jit
    def differences(first, again):
        return jax.tree.map(lambda a, b: jnp.sum(a != b), first, again)

    first = both(inputs, spec, cotangents)
    for _ in range(50):
        fast, deterministic = differences(first, both(inputs, spec, cotangents))
        fast.pop("dq")
        assert not any(jax.tree.leaves((fast, deterministic))), (fast, deterministic)


def test_inside_shard_map_with_traced_offsets():
    """Over all devices' rows, as the layers call it, and with positions that ring attention knows only then."""
    count = len(jax.devices())
    inputs, spec, cotangents = make_case((300, 300), rows=2 * count, dtype="bfloat16", window=200, kv_offset=30)
    mesh, rows = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data")

    def body(inputs, cotangents, offset):
        return results(inputs, replace(spec, q_offset=offset), cotangents)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=rows)
    got = jax.jit(mapped, compiler_options=QUICK)(inputs, cotangents, jnp.int32(80))
    want = expected(inputs, replace(spec, q_offset=80), cotangents)
    check_lse(got["lse"], want["lse"])
    check(got, want, UNITS["bfloat16"])


MODEL = ModelConfig(
    num_layers=2, hidden_size=256, num_heads=4, num_kv_heads=2, vocab_size=250, position="rotary", activation="swiglu",
    norm="rms_norm", bias=False,
)  # fmt: skip
ROWS, LENGTH = 4, 300


def train(implementation, precision):
    """Loss and gradients of the first step, and the losses of two."""
    chosen = MODEL.attention.model_copy(update={"implementation": implementation})
    model = MODEL.model_copy(update={"attention": chosen})
    config = TrainConfig(global_batch=ROWS, precision=precision)
    generator = np.random.default_rng(0)
    tokens = generator.integers(model.vocab_size, size=(ROWS, LENGTH + 1), dtype=np.int32)
    mesh = build_mesh(MeshConfig(data=1), jax.devices()[:1])
    with use(make_rules(mesh, ShardingConfig())), jax.default_matmul_precision("highest"):
        run = Configuration(model=model, train=config, data=DataConfig(sequence_length=LENGTH), seed=3)
        trainer = make_trainer(run)
        state = trainer.initial_state()
        batch = TokenBatch(tokens[:, :-1], tokens[:, 1:], np.ones((ROWS, LENGTH), np.float32))
        batch = jax.device_put(batch, batch_sharding())
        compute = jax.jit(trainer.loss_and_gradients, compiler_options=QUICK)
        _, gradients = jax.device_get(compute(state.params, batch, state.step, jnp.float32(1.0)))
        step = jit_step(trainer).lower(state, batch).compile(QUICK)
        losses = []
        for _ in range(2):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(gradients)}
    return leaves, losses


def test_a_training_step_by_our_own_choice():
    """A decoder in bfloat16 is as near to float32 with the kernels as with plain JAX, weight for weight."""
    kind = jax.devices()[0].device_kind
    backend = attention_backends(MODEL, jnp.bfloat16, device_kind=kind, length=LENGTH, packed=False)["*"]
    assert IMPLEMENTATION != "mosaic" or backend.name == "mosaic"
    exact, exact_losses = train("xla", "fp32")
    plain, plain_losses = train("xla", "bf16")
    made, losses = train("auto", "bf16")
    # each rounds at its own places: an error of a bfloat16's size either way
    np.testing.assert_allclose(losses, plain_losses, rtol=2.0**-8)
    np.testing.assert_allclose(losses, exact_losses, rtol=2.0**-7)
    total = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in exact.values()))
    for name, leaf in exact.items():
        ours, theirs = (np.linalg.norm(gradients[name] - leaf) for gradients in (made, plain))
        # half as much again: two samples of the same rounding
        assert ours <= 1.5 * theirs + 1e-4 * total, f"{name}: {ours} from float32, plain JAX {theirs}"
