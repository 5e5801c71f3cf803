"""State-space layers go on from what they remember, and their documents are sequences of their own.

That they compute what transformers does is tests/hugging_face; that they do on every mesh, tests/conformance.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtron.config import UserError
from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.ssm.config import DeltaConfig, MambaConfig
from jaxtron.layers.ssm.delta import GatedDeltaNet
from jaxtron.layers.ssm.mamba1 import Mamba1
from jaxtron.layers.ssm.mamba2 import Mamba2
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.program import choices
from jaxtron.models.program import whole
from jaxtron.sharding.config import ContextConfig
from jaxtron.sharding.rules import use

EMBED, HEADS, ROWS, LENGTH = 16, 4, 2, 11
CLOSE = {"rtol": 0, "atol": 1e-5}


def make_layer(kind: str = "M", groups: int = 2) -> Mamba1 | Mamba2 | GatedDeltaNet:
    """Of a pattern's symbol, of all but Mamba with so many groups of heads."""
    config = MambaConfig(num_heads=HEADS, head_dim=8, state_size=6, num_groups=groups, dt_range=(0.1, 1))
    shared: dict[str, Any] = {"std": 0.5, "output_std": 0.5, "dropout": 0.0, "rngs": nnx.Rngs(0)}
    if kind == "G":
        sizes = {"linear_num_key_heads": groups, "linear_num_value_heads": HEADS, "linear_key_head_dim": 6}
        delta = DeltaConfig(**sizes, linear_value_head_dim=8)
        # a norm that does not scale rounding of small outputs up
        return whole(GatedDeltaNet(EMBED, delta, epsilon=0.1, **shared), jnp.float32)
    if kind == "M":
        return whole(Mamba2(EMBED, HEADS, config, epsilon=1e-5, **shared), jnp.float32)
    # it has no norm that takes sizes back
    return whole(Mamba1(EMBED, 2 * EMBED, 3, config, **{**shared, "std": 0.3}), jnp.float32)


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
        layer = Mamba1(EMBED, 512, 16, config, std=0.02, output_std=0.02, dropout=0.0, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(np.exp(layer.A_log[...]), np.tile(np.arange(1.0, 17), (512, 1)), rtol=1e-6)
        assert (np.asarray(layer.D[...]) == 1).all()
        steps, weights = np.asarray(jax.nn.softplus(layer.dt_bias[...])), np.asarray(layer.dt_proj[...])
        assert 0.001 <= steps.min() < 0.0012 and 0.09 < steps.max() <= 0.1001
        assert 0.24 < np.abs(weights).max() <= 16**-0.5 and np.std(weights) == pytest.approx(0.25 / 3**0.5, rel=0.03)
        # float32 and without weight decay
        roles = [getattr(layer, name).get_metadata("spec").role for name in ("A_log", "D", "dt_bias", "dt_proj")]
        assert roles == ["state", "state", "state", "kernel"]


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
