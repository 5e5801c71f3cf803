"""Each kind of MLP against its formula."""

import math

import numpy as np
import pytest
from flax import nnx

from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.mlp import Mlp
from jaxtron.sharding.rules import use

EMBED, WIDTH = 6, 10


def erf_gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


PLAIN = {
    "gelu": erf_gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "squared_relu": lambda x: np.maximum(x, 0) ** 2,
}
GATED = {
    "swiglu": lambda gate, up: gate / (1 + np.exp(-gate)) * up,
    "geglu": lambda gate, up: erf_gelu(gate) * up,
    "geglu_tanh": lambda gate, up: PLAIN["gelu_tanh"](gate) * up,
    # 2508.10925: both are cut off at 7, the gate from above alone, and what is gated is one more than it was
    "clamped_swiglu": lambda gate, up: (
        np.minimum(gate, 7) / (1 + np.exp(-1.702 * np.minimum(gate, 7))) * (np.clip(up, -7, 7) + 1)
    ),
}


def make_mlp(activation, bias):
    module = Mlp(EMBED, WIDTH, activation=activation, bias=bias, std=0.8, output_std=0.8, dropout=0.0, rngs=nnx.Rngs(0))
    if bias:
        for layer in (module.up, module.down):
            layer.bias[...] = layer.bias[...] + np.linspace(-1, 1, layer.bias[...].size).reshape(layer.bias[...].shape)
    return module


def read(layer):
    bias = 0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    return np.asarray(layer.kernel[...], np.float64), bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [*PLAIN, *GATED])
def test_activations(rules_for, activation, bias):
    # so large that what is cut off is
    x = 3 * np.random.default_rng(0).normal(size=(2, 5, EMBED)).astype(np.float32)
    with use(rules_for(data=1)):
        module = make_mlp(activation, bias)
        y = module(x, LayerInputs())
        (up, up_bias), (down, down_bias) = read(module.up), read(module.down)
    if activation in GATED:
        both = np.einsum("bse,egf->bsgf", x, up) + up_bias
        assert (both > 7).any((0, 1, 3)).all() and (both < -7).any((0, 1, 3)).all()
        hidden = GATED[activation](both[:, :, 0], both[:, :, 1])
    else:
        hidden = PLAIN[activation](x @ up + up_bias)
    np.testing.assert_allclose(y, hidden @ down + down_bias, rtol=1e-4, atol=1e-5)
