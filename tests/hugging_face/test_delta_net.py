"""A gated delta net computes what Qwen3-Next's layer of transformers does with the same weights.

The whole model has more that no layer here has: gated attention, norms whose scale is stored less 1.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtron.layers.inputs import LayerInputs
from jaxtron.layers.ssm.config import DeltaConfig
from jaxtron.layers.ssm.delta import GatedDeltaNet
from jaxtron.models.program import whole
from jaxtron.sharding.rules import use
from tests.hugging_face.fixtures import FOLDER, STEP


def values_of(weights: dict[str, np.ndarray], config: DeltaConfig, hidden: int) -> dict[str, np.ndarray]:
    """By name: rows of the first product are a key head's q and k, and v and z of the value heads that read it."""
    keys, size = config.linear_num_key_heads, config.linear_key_head_dim
    heads, width = config.linear_num_value_heads, config.linear_value_head_dim
    each = heads // keys
    found = {}
    by_key = weights.pop("in_proj_qkvz.weight").T.reshape(hidden, keys, -1)
    q, k, v, z = np.split(by_key, np.cumsum([size, size, each * width]), -1)
    b, a = np.split(weights.pop("in_proj_ba.weight").T.reshape(hidden, keys, -1), [each], -1)
    for name, kernel in {"q": q, "k": k}.items():
        found[f"{name}.kernel"] = kernel
    for name, kernel in {"v": v, "z": z}.items():
        found[f"{name}.kernel"] = kernel.reshape(hidden, heads, width)
    for name, kernel in {"b": b, "a": a}.items():
        found[f"{name}.kernel"] = kernel.reshape(hidden, heads)
    taps = np.split(weights.pop("conv1d.weight")[:, 0].T, [keys * size, 2 * keys * size], -1)
    for name, kernel, shape in zip("qkv", taps, ((keys, size), (keys, size), (heads, width)), strict=True):
        found[f"conv_{name}"] = kernel.reshape(-1, *shape)
    found |= {name: weights.pop(name) for name in ("A_log", "dt_bias")}
    found["norm.scale"] = weights.pop("norm.weight")
    found["output.kernel"] = weights.pop("out_proj.weight").T.reshape(heads, width, hidden)
    assert not weights, list(weights)
    return found


# key heads split, and on every device
@pytest.mark.parametrize("tensor", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 6))])
def test_outputs_are_those_of_transformers(rules_for, tensor: int) -> None:
    with np.load(FOLDER / "layers" / "qwen3_next_delta_net.npz") as file:
        given = dict(file)
    config, x, y = (given.pop(name) for name in ("config", "x", "y"))
    delta, hidden = DeltaConfig(**json.loads(str(config))), x.shape[-1]
    weights = {name.removeprefix("weights/"): array * np.float32(STEP) for name, array in given.items()}
    with use(rules_for(tensor=tensor)):
        layer = GatedDeltaNet(hidden, delta, std=1, output_std=1, epsilon=1e-5, dropout=0.0, rngs=nnx.Rngs(0))
        values = values_of(weights, delta, hidden)
        graph, state = nnx.split(layer)
        for path, variable in nnx.to_flat_state(state):
            value = values.pop(".".join(map(str, path)))
            assert value.shape == variable[...].shape
            variable[...] = jax.device_put(value, variable[...].sharding)
        assert not values
        found = jax.jit(whole(nnx.merge(graph, state), jnp.float32))(x, LayerInputs())
    assert np.abs(y).max() > 1
    np.testing.assert_allclose(np.asarray(found), y, rtol=0, atol=2e-5)
