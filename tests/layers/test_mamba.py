"""State-space layers go on from what they remember, and their documents are sequences of their own.

That they compute what transformers does is tests/hugging_face; that they do on every mesh, tests/conformance.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtron.checkpoint.names import parts
from jaxtron.config import UserError
from jaxtron.kernels.gated_delta import xla as delta_xla
from jaxtron.kernels.selective_scan import xla as selective_xla
from jaxtron.kernels.ssd import xla as ssd_xla
from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.ssm.config import DeltaConfig, MambaConfig
from jaxtron.layers.ssm.delta import GatedDeltaNet
from jaxtron.layers.ssm.mamba1 import Mamba1
from jaxtron.layers.ssm.mamba2 import Mamba2
from jaxtron.layers.ssm.recurrences import delta_rule, duality, selective_scan
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.program import choices
from jaxtron.models.program import whole
from jaxtron.optim.config import OptimizerConfig
from jaxtron.optim.optimizer import decay_mask
from jaxtron.sharding.config import ContextConfig
from jaxtron.sharding.parameters import working_dtype
from jaxtron.sharding.rules import use

EMBED, HEADS, ROWS, LENGTH = 16, 4, 2, 11
CLOSE = {"rtol": 0, "atol": 1e-5}


def make_layer(kind: str = "M", groups: int = 2, **changes: Any) -> Mamba1 | Mamba2 | GatedDeltaNet:
    """Of a pattern's symbol, of all but Mamba with so many groups of heads."""
    config = MambaConfig(num_heads=HEADS, head_dim=8, state_size=6, num_groups=groups, dt_range=(0.1, 1), **changes)
    shared: dict[str, Any] = {"std": 0.5, "output_std": 0.5, "dropout": 0.0, "rngs": nnx.Rngs(0)}
    if kind == "G":
        sizes = {"linear_num_key_heads": groups, "linear_num_value_heads": HEADS, "linear_key_head_dim": 6}
        delta = DeltaConfig(**sizes, linear_value_head_dim=8)
        # a norm that does not scale rounding of small outputs up
        return whole(GatedDeltaNet(EMBED, delta, epsilon=0.1, **shared), jnp.float32)
    if kind == "M":
        return whole(Mamba2(EMBED, HEADS, config, epsilon=1e-5, **shared), jnp.float32)
    # it has no norm that takes sizes back
    return whole(Mamba1(EMBED, 2 * EMBED, 3, config, epsilon=0.1, **{**shared, "std": 0.3}), jnp.float32)


def by_name(layer: nnx.Module) -> dict[str, nnx.Param]:
    """Its parameters."""
    leaves = jax.tree.leaves_with_path(layer, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    return {"/".join(parts(path)): leaf for path, leaf in leaves}


def tokens(length: int = LENGTH) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (ROWS, length, EMBED))


@pytest.mark.parametrize(
    ("kind", "tensor", "groups"),
    [
        ("M", 2, 2),
        ("m", 2, 2),
        ("G", 2, 2),
        *(pytest.param("M", *sizes, marks=pytest.mark.slow) for sizes in ((1, 2), (4, 1))),
        *(pytest.param("G", *sizes, marks=pytest.mark.slow) for sizes in ((1, 2), (4, 1))),
    ],
)
def test_in_parts_it_computes_what_it_does_at_once(rules_for, kind: str, tensor: int, groups: int):
    with use(rules_for(tensor=tensor)):
        layer, x = make_layer(kind, groups), tokens(12)
        at_once = jax.jit(layer)(x, LayerInputs())
        found, state = [], None
        # first parts are shorter than what the convolution sees
        for start, end in ((0, 1), (1, 3), (3, 4), (4, 12)):
            y, state = jax.jit(layer.advance)(x[:, start:end], state, LayerInputs())
            found.append(np.asarray(y))
        np.testing.assert_allclose(np.concatenate(found, 1), np.asarray(at_once), **CLOSE)
        assert np.abs(np.asarray(at_once)).max() > 0.5


@pytest.mark.parametrize("kind", "MmG")
def test_a_document_is_a_sequence_of_its_own(rules_for, kind: str):
    with use(rules_for()):
        layer, x = jax.jit(make_layer(kind)), tokens()
        cuts = (0, 2, 4, 6, LENGTH)
        segments = jnp.broadcast_to(np.repeat(np.arange(4), np.diff(cuts)), (ROWS, LENGTH))
        packed = layer(x, LayerInputs(segments=segments))
        alone = [layer(x[:, start:end], LayerInputs()) for start, end in zip(cuts, cuts[1:], strict=False)]
        np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), **CLOSE)
        assert np.abs(np.asarray(packed - layer(x, LayerInputs()))).max() > 0.01


def test_first_values_are_those_of_the_paper(rules_for):
    with use(rules_for()):
        layer = Mamba2(
            EMBED, 512, MambaConfig(dt_floor=0.002), std=0.02, output_std=0.02, epsilon=1e-5, dropout=0.0,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        steps = np.asarray(jax.nn.softplus(layer.dt_bias[...]))
        assert steps.min() == pytest.approx(0.002, rel=1e-3) and 0.09 < steps.max() <= 0.1001
        # log-uniform between 0.001 and 0.1
        assert np.mean(steps < 0.01) == pytest.approx(0.5, abs=0.1)
        rates = np.exp(np.asarray(layer.A_log[...]))
        assert (
            1 <= rates.min() < 1.2 and 15.8 < rates.max() <= 16 and np.mean(rates < 8.5) == pytest.approx(0.5, abs=0.1)
        )
        assert (np.asarray(layer.D[...]) == 1).all()


def test_first_values_of_mamba_are_those_of_its_paper(rules_for):
    with use(rules_for()):
        config = MambaConfig(state_size=16)
        layer = Mamba1(EMBED, 512, 16, config, epsilon=1e-5, std=0.02, output_std=0.02, dropout=0.0, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(np.exp(layer.A_log[...]), np.tile(np.arange(1.0, 17), (512, 1)), rtol=1e-6)
        assert (np.asarray(layer.D[...]) == 1).all()
        steps, weights = np.asarray(jax.nn.softplus(layer.dt_bias[...])), np.asarray(layer.dt_proj[...])
        assert 0.001 <= steps.min() < 0.0012 and 0.09 < steps.max() <= 0.1001
        assert 0.24 < np.abs(weights).max() <= 16**-0.5 and np.std(weights) == pytest.approx(0.25 / 3**0.5, rel=0.03)
        # float32 and without weight decay
        roles = [getattr(layer, name).get_metadata("spec").role for name in ("A_log", "D", "dt_bias", "dt_proj")]
        assert roles == ["state", "state", "state", "kernel"]


def test_first_values_of_a_delta_net_are_those_of_megatron(rules_for):
    sizes = {"linear_num_key_heads": 256, "linear_num_value_heads": 512, "linear_key_head_dim": 2}
    with use(rules_for()):
        shared = {"std": 0.02, "output_std": 0.01, "epsilon": 1e-5, "dropout": 0.0, "rngs": nnx.Rngs(0)}
        layer = GatedDeltaNet(EMBED, DeltaConfig(**sizes, linear_value_head_dim=4), **shared)
        rates = np.exp(np.asarray(layer.A_log[...]))
        assert 1 <= rates.min() < 1.2 and 15.8 < rates.max() <= 16
        assert np.mean(rates < 8.5) == pytest.approx(0.5, abs=0.1)
        for ones in (layer.dt_bias, layer.norm.scale):
            assert (np.asarray(ones[...]) == 1).all()
        # a convolution of 4 positions begins as PyTorch's; products as all of a model's
        for taps in (layer.conv_q, layer.conv_k, layer.conv_v):
            assert 0.49 < np.abs(taps[...]).max() <= 0.5 and np.std(taps[...]) == pytest.approx(0.5 / 3**0.5, rel=0.05)
        for product in (layer.q, layer.k, layer.v, layer.z, layer.b, layer.a):
            assert np.std(product.kernel[...]) == pytest.approx(0.02, rel=0.05)
        assert np.std(layer.output.kernel[...]) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("kind", "MmG")
def test_decays_and_steps_stay_float32_and_do_not_decay(rules_for, kind: str):
    config = OptimizerConfig(weight_decay=0.1)
    with use(rules_for()):
        found = {}
        for name, weights in by_name(make_layer(kind)).items():
            role = weights.get_metadata("spec").role
            found[name] = working_dtype(role, jnp.dtype("bfloat16")), decay_mask(config, role)
    kept = {name for name, (dtype, decays) in found.items() if dtype == jnp.float32 and not decays}
    others = {"M": {"D", "norm/scale", "conv_x/bias", "conv_B/bias", "conv_C/bias"}, "m": {"D", "conv/bias"}}
    assert kept == {"A_log", "dt_bias"} | others.get(kind, {"norm/scale"})
    assert {found[name] for name in found.keys() - kept} == {(jnp.dtype("bfloat16"), True)}


def test_what_a_piece_does_to_a_state_is_as_many_numbers_as_the_docs_say():
    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((ROWS, LENGTH, *sizes), jnp.float32)

    def by_head(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    heads, groups, steps, channels = shape(HEADS, 8), shape(2, 6), shape(HEADS), shape(32)
    scan = duality(ssd_xla), (heads, steps, by_head(HEADS), groups, groups, by_head(HEADS))
    selective = selective_scan(selective_xla), (channels, channels, by_head(32, 6), *(shape(1, 6),) * 2, by_head(32))
    rule = delta_rule(delta_xla), (groups, groups, heads, steps, steps)
    for (recurrence, arrays), numbers in (
        (scan, HEADS * (6 * 8 + 1)),
        (selective, 2 * 32 * 6),
        (rule, HEADS * 6 * (8 + 6)),
    ):
        state = jax.ShapeDtypeStruct(recurrence.shape(*arrays), jnp.float32)
        left = jax.eval_shape(lambda *given, of=recurrence: of.through(*given, None), *arrays)
        added = jax.eval_shape(lambda *given, of=recurrence: of.final_state(*given, None), *arrays, state)
        assert left.size + added.size == ROWS * numbers and {left.dtype, added.dtype} == {jnp.dtype("float32")}


def plainly(weights: dict[str, jax.Array], x: jax.Array, limit: jax.Array) -> jax.Array:
    """What a layer with one group of heads and steps cut to a limit computes of parameters by name, token by token."""
    is_second = "z/kernel" in weights

    def product(name: str, to: str, x: jax.Array = x, of: str = "bse,e") -> jax.Array:
        return jnp.einsum(f"{of}{to}->bs{to}", x, weights[name])

    def convolved(x: jax.Array, name: str) -> jax.Array:
        kernel = weights[f"{name}/kernel"]
        wide = jnp.pad(x, ((0, 0), (len(kernel) - 1, 0), *((0, 0),) * (x.ndim - 2)))
        parts = (wide[:, tap : tap + x.shape[1]] * kernel[tap] for tap in range(len(kernel)))
        return jax.nn.silu(sum(parts) + weights[f"{name}/bias"])

    A, D = -jnp.exp(weights["A_log"]), weights["D"]
    if is_second:
        z, dt = product("z/kernel", "hp"), product("dt/kernel", "h")
        inner, B, C = (convolved(product(f"{name}/kernel", to), f"conv_{name}") for name, to in (
            ("x", "hp"), ("B", "gn"), ("C", "gn")
        ))  # fmt: skip
        B, C, A, D = B[:, :, 0, None, None], C[:, :, 0, None, None], A[:, None, None], D[:, None]
    else:
        x, z = jnp.moveaxis(product("input/kernel", "gc"), 2, 0)
        inner = convolved(x, "conv")
        rank, size = len(weights["dt_proj"]), A.shape[-1]
        steps, B, C = jnp.split(product("x_proj/kernel", "l", inner, "bsc,c"), (rank, rank + size), -1)
        dt = product("dt_proj", "c", steps, "bsl,l")
        B, C = B[:, :, None], C[:, :, None]
    dt = jax.nn.softplus(dt + weights["dt_bias"])
    dt = jnp.where(dt < limit[0], limit[0], jnp.where(dt > limit[1], limit[1], dt))
    steps = dt[..., None] if is_second else dt
    state, found = 0.0, []
    for t in range(x.shape[1]):
        step, own = steps[:, t, ..., None], inner[:, t, ..., None]
        state = state * jnp.exp(step * A) + step * own * B[:, t]
        found.append((state * C[:, t]).sum(-1) + D * inner[:, t])
    y = jnp.stack(found, 1) * jax.nn.silu(z)
    if not is_second:
        return product("output/kernel", "e", y, "bsc,c")
    y = y * jax.lax.rsqrt(jnp.square(y).mean((2, 3), keepdims=True) + 1e-5) * weights["norm/scale"]
    return product("output/kernel", "e", y, "bshp,hp")


@pytest.mark.parametrize("kind", "Mm")
def test_gradients_of_steps_that_are_cut_are_those_of_plain_differentiation(rules_for, in_region, kind: str):
    """Of a step that `dt_limit` cuts nothing reaches what it was made of; others pass it on."""
    x, limit = tokens(6), (0.4, 0.9)
    asked = jax.random.normal(jax.random.key(2), x.shape)
    with use(rules_for()):
        layer = make_layer(kind, 1, dt_limit=limit)
        run = jax.grad(lambda layer, x: jnp.sum(asked * layer(x, LayerInputs())), (0, 1))
        of_layer, of_input = in_region(run)(layer, x)
    made, values = (
        {name: np.asarray(value[...]) for name, value in by_name(tree).items()} for tree in (of_layer, layer)
    )
    gradients = jax.jit(jax.grad(lambda *given: jnp.sum(asked * plainly(*given)), (0, 1)))
    expected, of_plain_input = gradients(values, x, jnp.asarray(limit))
    assert made.keys() == expected.keys()
    for name, array in (expected | {"": of_plain_input}).items():
        found = made[name] if name else of_input
        np.testing.assert_allclose(found, array, rtol=0, atol=1e-5 * float(np.abs(array).max()), err_msg=name)
    # few channels have all steps cut, and cuts change most of what is asked of the others
    cut, uncut = expected["dt_bias"], gradients(values, x, jnp.asarray((0.0, np.inf)))[0]["dt_bias"]
    assert np.mean(cut != 0) > 0.5 and np.mean(np.abs(cut - uncut) > 0.1 * np.abs(uncut)) > 0.5


@pytest.mark.parametrize(
    ("pattern", "name"), [("M", "mamba.conv_width"), ("m", "mamba.conv_width"), ("G", "delta.linear_conv_kernel_dim")]
)
def test_a_convolution_that_sees_more_than_a_piece_is_refused(pattern, name):
    model = ModelConfig(pattern=pattern, hidden_size=512, position="none")
    model.check({"tensor": 1, "context": 4}, 24, ContextConfig())
    message = f"^model.{name} 4 needs the 3 positions before .* pieces have 2 with data.sequence_length 16 and mesh.co"
    with pytest.raises(UserError, match=message):
        model.check({"tensor": 1, "context": 4}, 16, ContextConfig())


@pytest.mark.parametrize(
    ("pattern", "changes", "message"),
    [
        ("M", {"head_dim": 24}, "model.mamba.expand 2 x model.hidden_size 64 = 128 is not a multiple of .*head_dim 24"),
        (
            "M",
            {"num_groups": 3},
            r"heads of Mamba-2 .model.mamba.num_heads. 2 is not a multiple of model.mamba.num_groups 3; change one",
        ),
        ("M", {"num_groups": 1, "norm_groups": 5}, "2 is not a multiple of model.mamba.norm_groups 5"),
        (
            "M",
            {"dt_range": (0.1, 0.01)},
            "model.mamba.dt_range 0.1 0.01 must be two numbers above 0, the smaller first",
        ),
        (
            "M",
            {"dt_limit": (0.5, 0.1)},
            "model.mamba.dt_limit 0.5 0.1 must be a number of 0 or more, and a larger one or none",
        ),
        ("M", {"conv_width": 1}, "greater than or equal to 2"),
        ("M", {"dt_rank": 3}, r"model.mamba.dt_rank 3 has no effect .* add Mamba \(m\) to the pattern"),
        ("m", {}, r"model.mamba.num_groups 2 has no effect with model.pattern m: .* add Mamba-2 \(M\)"),
        ("m", {"num_groups": 8, "expand": 1.01}, "expand 1.01 x model.hidden_size 64 = 64.64 is no whole number"),
        ("m", {"num_groups": 8, "implementation": "mosaic"}, "mosaic: Mamba .m. has no such kernel; use auto"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(pattern, changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(pattern=pattern, hidden_size=64, position="none", mamba={"num_groups": 2, **changes})


def test_what_computes_scans_is_told_before_what_multiplies_experts(rules_for):
    config = ModelConfig(
        pattern="MmGE", num_layers=2, hidden_size=64, position="none", bias=False, mamba={"num_groups": 2}
    )
    with use(rules_for()):
        scans, selective, delta, experts, *_ = choices(config, jnp.bfloat16, ROWS, 64)
        assert scans.startswith("state-space duality: xla, the fastest that runs on cpu; not mosaic: its kernels are")
        assert selective == "selective scan: xla, the fastest that runs on cpu"
        assert delta == "gated delta rule: xla, the fastest that runs on cpu"
        assert experts.startswith("experts: 8 on a device")
        asked = config.model_copy(update={"pattern": "G", "delta": DeltaConfig(implementation="reference")})
        assert choices(asked, jnp.bfloat16, ROWS, 64) == ("gated delta rule: reference, as asked",)
        named = config.model_copy(update={"mamba": MambaConfig(num_groups=2, implementation="mosaic")})
        with pytest.raises(UserError, match="model.mamba.implementation mosaic cannot: its kernels are for Hopper"):
            choices(named, jnp.bfloat16, ROWS, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "m", "mamba": {"expand": 1.5}}, "x model.hidden_size. 9 is not a multiple of mesh.tensor 2"),
        (
            {"pattern": "G", "delta": {"linear_num_key_heads": 1, "linear_num_value_heads": 9}},
            "model.delta.linear_num_value_heads 9 is not a multiple of mesh.tensor 2",
        ),
        (
            {"pattern": "G", "delta": {"linear_num_key_heads": 3, "linear_num_value_heads": 6}},
            "linear_num_key_heads 3 and mesh.tensor 2: neither is a multiple of the other",
        ),
    ],
    ids=str,
)
def test_what_does_not_split_is_refused(settings, message):
    model = ModelConfig(hidden_size=6, position="none", **settings)
    with pytest.raises(UserError, match=message):
        model.check({"tensor": 2, "context": 1}, 8, ContextConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_num_value_heads": 24}, "value_heads 24 is not a multiple of model.delta.linear_num_key_heads 16"),
        ({"decay_range": (0, 1)}, "model.delta.decay_range 0 1 must be two numbers above 0"),
        ({"implementation": "mosaic"}, "auto.*xla.*reference"),
    ],
    ids=str,
)
def test_settings_of_a_delta_net_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(pattern="G", hidden_size=64, position="none", delta=changes)
