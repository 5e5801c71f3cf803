"""Weights of queries, keys and values joined once a step: which are, equal gradients, and no joins in loops."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.models.joined import JoinedParts
from jaxtron.run.step import Trainer, batch_sharding
from jaxtron.sharding.rules import use
from tests.support.equivalence import MODELS, by_name, make_batch, make_params, make_trainer, rules_for

JOINED = "['joined_kernel']"
MESH = {"pipe": 2, "data": 2, "tensor": 2}


def joins(trainer: Trainer) -> bool:
    """Whether a step's parameters have joined weights, and then none apart."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(trainer.joined.blueprint.parameters)]
    joined, apart = any(JOINED in path for path in paths), any("['key']" in path for path in paths)
    assert joined != apart
    return joined


@pytest.mark.parametrize(
    ("mesh", "train", "model", "expected"),
    [
        ({"data": 1}, {"precision": "bf16"}, "gpt", True),
        ({"data": 1}, {"precision": "fp32"}, "gpt", False),
        ({"data": 2}, {"precision": "fp32"}, "llama", True),
        ({"fsdp": 2}, {"precision": "bf16"}, "llama", False),
        ({"tensor": 2}, {"precision": "bf16"}, "llama", True),
        ({"tensor": 4}, {"precision": "bf16"}, "llama", False),
        ({"tensor": 2}, {"precision": "bf16", "trainable": ("!*key.kernel",)}, "llama", False),
        ({"tensor": 2}, {"precision": "bf16", "trainable": ("!*query.bias",)}, "gpt", False),
        ({"tensor": 2}, {"precision": "bf16", "trainable": ("!*output.kernel",)}, "gpt", True),
    ],
    ids=["bf16", "used as it lies", "gathered once", "gathered by layers", "tensor", "keys copied", "a frozen kernel",
         "a frozen bias", "another frozen"],
)  # fmt: skip
def test_what_is_copied_anyway_is_joined(mesh: dict[str, int], train: dict[str, Any], model: str, expected: bool):
    with use(rules_for(mesh)):
        assert joins(make_trainer(MODELS[model], **train)) == expected


@pytest.mark.parametrize(
    ("model", "train"),
    [("gpt", {}), pytest.param("gemma", {"trainable": ("!*mlp*",)}, marks=pytest.mark.slow)],
    ids=["all", "some frozen"],
)
def test_gradients_are_those_of_weights_apart(model: str, train: dict[str, Any]):
    found = []
    for joined in (True, False):
        with use(rules_for(MESH)):
            trainer = make_trainer(MODELS[model], precision="fp32", microbatches=2, **train)
            assert joins(trainer)
            if not joined:
                trainer.__dict__["joined"] = JoinedParts(trainer.blueprint, trainer.parts.stacks, trainer.parts)
                assert not joins(trainer)
            batch = jax.device_put(make_batch(), batch_sharding())
            run = jax.jit(trainer.loss_and_gradients)
            metrics, gradients = run(make_params(trainer), batch, jnp.int32(5), jnp.float32(1.0))
            found.append((float(metrics["loss"]), by_name(gradients, trainer)))
    (loss, gradients), (other_loss, others) = found
    assert loss == other_loss and gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, others[name], err_msg=name)
    assert any("query" in name and np.abs(gradient).max() > 0 for name, gradient in gradients.items())


def test_no_layer_joins_weights():
    with use(rules_for({"tensor": 2})):
        trainer = make_trainer(MODELS["llama"], precision="bf16", microbatches=2)
        batch = make_batch()
        arguments = (trainer.blueprint.abstract, batch, jnp.int32(0), jnp.float32(1.0))
        text = str(jax.make_jaxpr(trainer.loss_and_gradients)(*arguments))
        trainer.__dict__["joined"] = JoinedParts(trainer.blueprint, trainer.parts.stacks, trainer.parts)
        apart = str(jax.make_jaxpr(trainer.loss_and_gradients)(*arguments))
    # by layer [embed, key/value heads, queries and both, head_dim]; of all layers two in front
    by_layer, stacked = (
        re.compile(rf":bf16\[{shape}[^ ]* = concatenate") for shape in ("32,2.{0,10},6,8", "2,32,2.{0,10},6,8")
    )
    assert len(stacked.findall(text)) == 1 and not by_layer.findall(text)
    assert not stacked.findall(apart) and len(by_layer.findall(apart)) > 1
