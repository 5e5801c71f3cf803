"""The backend of each kind of attention in a decoder: selected before anything is traced, or at construction."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxtron.config import UserError
from jaxtron.kernels.attention.backend import IMPLEMENTATIONS, SHORT
from jaxtron.kernels.selection import Backend
from jaxtron.models.decoder import attention_backends as module
from jaxtron.models.decoder.attention_backends import attention_backends, attention_spec
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.model import Decoder
from jaxtron.run.attention import attention_lines
from jaxtron.sharding.rules import use

TINY = ModelConfig(pattern="*W-", num_layers=1, hidden_size=16, num_heads=2, vocab_size=20, attention={"window": 8})
HOPPER = "NVIDIA H100 80GB HBM3"


def select(config, device_kind="cpu", dtype=jnp.bfloat16, **options):
    return {
        name: found.name
        for name, found in attention_backends(config, dtype, device_kind=device_kind, **options).items()
    }


def changed(**fields):
    return ModelConfig.model_validate({**TINY.model_dump(exclude_unset=True), **fields})


def test_by_symbol_for_lengths_devices_and_settings():
    assert select(TINY) == {"*": "materialized", "W": "materialized"}
    assert select(TINY, HOPPER) == {"*": "mosaic", "W": "mosaic"}
    assert select(TINY, length=SHORT + 1)["*"] == "xla"
    # keys and values of other devices meet by the log-sum-exp
    assert select(TINY, parts=2)["*"] == "xla"
    drops = changed(attention_dropout=0.1)
    assert select(drops, HOPPER)["*"] == select(drops, HOPPER, length=256, parts=8)["W"] == "mosaic"
    # the pieces of a sequence start at 8, 16, 24, ...
    assert select(drops, HOPPER, length=128, parts=8)["*"] == "xla"
    assert select(drops)["*"] == "materialized"
    with pytest.raises(UserError, match="cudnn cannot: .*it drops no probabilities|cudnn cannot: JAX cannot use it"):
        select(changed(attention={"window": 8, "implementation": "cudnn"}, attention_dropout=0.1), HOPPER)
    with pytest.raises(UserError, match="materialized cannot: it returns no log-sum-exp"):
        select(changed(attention={"window": 8, "implementation": "materialized"}), parts=2)


def test_a_line_for_each_that_differs():
    assert attention_lines(attention_backends(TINY, jnp.float32, device_kind="cpu")) == (
        "attention: materialized (short sequences, and no kernel for cpu)",
    )


def test_a_layer_asks_for_what_the_settings_say():
    config = changed(attention={"window": 8, "soft_cap": 30.0, "scale": 0.5, "deterministic": True})
    spec = attention_spec(config, "W")
    assert (spec.window, spec.logits_soft_cap, spec.logits_scale, spec.deterministic) == (8, 30.0, 0.5, True)
    assert attention_spec(config, "*").window is None


def implementations(**options):
    decoder = nnx.eval_shape(lambda: Decoder(TINY, rngs=nnx.Rngs(0), **options))
    return [layer.attention.core.implementation for layer in decoder.stack.periods.layers if "attention" in layer.names]


def test_a_model_takes_the_backends_it_is_given_and_selects_none(rules_for, monkeypatch):
    backends = {symbol: Backend(name, IMPLEMENTATIONS[name], "") for symbol, name in (("*", "xla"), ("W", "reference"))}
    with use(rules_for(data=1)):
        # alone it selects for the devices of the rules
        assert implementations() == [IMPLEMENTATIONS["materialized"]] * 2
        monkeypatch.setattr(module, "select_backend", None)
        assert implementations(attention=backends) == [IMPLEMENTATIONS["xla"], IMPLEMENTATIONS["reference"]]


def test_nothing_is_selected_while_a_model_is_traced(rules_for, monkeypatch):
    with use(rules_for(data=1)):
        decoder = Decoder(TINY, rngs=nnx.Rngs(0))
        monkeypatch.setattr(module, "select_backend", None)
        jax.eval_shape(decoder.embed, jax.ShapeDtypeStruct((1, 4), jnp.int32))
        graph, stacked = nnx.split(decoder.stack.periods)
        period = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], stacked))
        x = jax.ShapeDtypeStruct((1, 4, 16), jnp.float32)
        jax.eval_shape(lambda x: period(x, decoder.inputs(4)), x)
