"""Low-rank adapters: their gradients are those of the merged weights by the chain rule, and nothing else is trained."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtron.config import UserError, load
from jaxtron.models.adapters import merge_adapters, with_adapters, without_adapters
from jaxtron.run.configuration import Configuration
from jaxtron.run.step import batch_sharding
from jaxtron.sharding.rules import use
from tests.support.equivalence import (
    CUBE,
    MODELS,
    ONE_DEVICE,
    TOLERANCE,
    assert_equal,
    by_name,
    changed,
    make_batch,
    make_params,
    make_trainer,
    rules_for,
    take_steps,
)

LLAMA, GPT = changed(MODELS["llama"], num_layers=1), changed(MODELS["gpt"], num_layers=1)
LORA = {"rank": 3, "alpha": 6.0}
DROPPED = {**LORA, "dropout": 0.2}
TENSOR = {"tensor": 4, "fsdp": 2}


def step_of(trainer, params, rows: int):
    """Loss and gradients."""
    batch = jax.device_put(make_batch(rows), batch_sharding())
    metrics, gradients = jax.jit(trainer.loss_and_gradients)(params, batch, jnp.int32(5), jnp.float32(1))
    return float(metrics["loss"]), gradients


@functools.cache
def by_chain_rule(name: str):
    """Loss and gradients of adapters, of the gradients of the merged weights of the model itself."""
    model = {"llama": LLAMA, "gpt": GPT}[name]
    with use(rules_for(ONE_DEVICE, "none")):
        adapted, whole = make_trainer(model, lora=LORA), make_trainer(model)
        params = make_params(adapted)
        loss, gradients = step_of(whole, merge_adapters(adapted.blueprint, params), 32)
        gradients = by_name(gradients, whole)
        values = by_name(params, adapted)
    expected, scale = {}, LORA["alpha"] / LORA["rank"]
    for name, a in values.items():
        if not name.endswith("['lora']['a']"):
            continue
        kernel = gradients[name.replace("['lora']['a']", "['kernel']")]
        b = values[name[: -len("['a']")] + "['b']"]
        # with the layer in front; gate and up have pairs of their own
        gates = "g" if a.ndim == 4 and b.ndim == 4 and "mlp" in name else ""
        inputs, outputs = "xyz"[: a.ndim - 2 - len(gates)], "uvw"[: b.ndim - 2 - len(gates)]
        whole_letters, a_letters, b_letters = f"l{inputs}{gates}{outputs}", f"l{inputs}{gates}r", f"l{gates}r{outputs}"
        expected[name] = scale * np.einsum(f"{whole_letters},{b_letters}->{a_letters}", kernel, b)
        expected[name[: -len("['a']")] + "['b']"] = scale * np.einsum(
            f"{a_letters},{whole_letters}->{b_letters}", a, kernel
        )
    return loss, expected


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", CUBE),
        pytest.param("llama", ONE_DEVICE, marks=pytest.mark.slow),
        # key/value heads are fewer than tensor parts
        pytest.param("llama", TENSOR, marks=pytest.mark.slow),
        pytest.param("gpt", CUBE, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_are_those_of_merged_weights_by_the_chain_rule(name, mesh):
    expected_loss, expected = by_chain_rule(name)
    with use(rules_for(mesh)):
        trainer = make_trainer({"llama": LLAMA, "gpt": GPT}[name], lora=LORA, microbatches=2)
        loss, gradients = step_of(trainer, make_params(trainer), 32)
        gradients = by_name(gradients, trainer)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    assert len(gradients) == 12
    assert_equal(gradients, expected)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_new_adapters_change_nothing(precision):
    """Bit for bit, and what is drawn beside them is what it is without."""
    with use(rules_for({"data": 2, "tensor": 2})):
        adapted, whole = (make_trainer(LLAMA, precision=precision, **lora) for lora in ({"lora": LORA}, {}))
        state, plain = adapted.initial_state(), whole.initial_state()
        batch = jax.device_put(make_batch(), batch_sharding())
        model = with_adapters(plain.model, state.model)
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, state.model)
        for made, same in zip(
            jax.tree.leaves(state.model),
            jax.tree.leaves(jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), model, dtypes)),
            strict=True,
        ):
            np.testing.assert_array_equal(np.asarray(made), np.asarray(same))
        sums, _ = jax.jit(adapted.evaluate)(state.model, batch)
        expected, _ = jax.jit(whole.evaluate)(plain.model, batch)
        assert float(sums["loss"]) == float(expected["loss"])
        base = without_adapters(adapted.blueprint)
        assert base.names.keys() == whole.blueprint.names.keys()
        merged = merge_adapters(adapted.blueprint, state.model)
        for name, leaf in by_name(merged, whole).items():
            np.testing.assert_array_equal(leaf, by_name(state.model, adapted)[name])


@functools.cache
def dropped(*mesh, **flags):
    """Loss and gradients of adapters with dropout on a mesh."""
    with use(rules_for(dict(mesh))):
        trainer = make_trainer(LLAMA, lora=DROPPED, **flags)
        params = make_params(trainer)
        loss, gradients = step_of(trainer, params, 32)
        batch = jax.device_put(make_batch(), batch_sharding())
        sums, _ = jax.jit(trainer.evaluate)(params, batch)
        return loss, by_name(gradients, trainer), float(sums["loss"])


@pytest.mark.parametrize(
    "mesh", [CUBE, pytest.param(TENSOR, marks=pytest.mark.slow), pytest.param({"context": 4}, marks=pytest.mark.slow)]
)
def test_what_is_dropped_is_the_same_on_every_mesh(mesh):
    expected_loss, expected, expected_score = dropped(*ONE_DEVICE.items())
    loss, gradients, score = dropped(*mesh.items(), microbatches=2)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    assert_equal(gradients, expected)
    assert score == pytest.approx(expected_score, rel=TOLERANCE)


def test_dropout_is_of_training_alone():
    loss, gradients, score = dropped(*ONE_DEVICE.items())
    plain_loss, plain = by_chain_rule("llama")
    with use(rules_for(ONE_DEVICE, "none")):
        trainer = make_trainer(LLAMA, lora=LORA)
        sums, _ = jax.jit(trainer.evaluate)(make_params(trainer), jax.device_put(make_batch(), batch_sharding()))
    assert score == float(sums["loss"])
    assert abs(loss - plain_loss) > 1e-4 * plain_loss
    # each adapter reads another input
    for name, gradient in plain.items():
        assert np.abs(gradients[name] - gradient).max() > 0.01 * np.abs(gradient).max(), name


def test_adapters_alone_are_trained_and_what_is_named_beside_them():
    found = take_steps(LLAMA, {"data": 2}, "optimizer", (0, 0), precision="bf16", lora=LORA, trainable=("head.*",))
    first, last = found.states[0], found.states[-1]
    frozen = jax.tree.leaves(first.frozen)
    assert {str(leaf.dtype) for leaf in frozen} == {"bfloat16", "float32"}
    for before, after in zip(frozen, jax.tree.leaves(last.frozen), strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(first.params)]
    assert len(names) == 13 and all("['lora']" in name or name == "['head']['table']" for name in names)
    assert len(jax.tree.leaves(last.optimizer)) == 2 * 13 + 1
    for before, after in zip(jax.tree.leaves(first.params), jax.tree.leaves(last.params), strict=True):
        assert (np.asarray(before) != np.asarray(after)).any()


def test_first_values_and_scales():
    with use(rules_for({})):
        trainer = make_trainer(LLAMA, lora={"rank": 4, "targets": ("attention.query", "mlp.down")})
        params = trainer.initial_state().params
    found = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}
    assert len(found) == 4
    for name, value in found.items():
        bound = 1 / np.sqrt(48 if "down" in name else 32)
        if name.endswith("['b']"):
            assert not value.any()
        else:
            assert 0.9 * bound < np.abs(value).max() <= bound
    scales = [
        load(Configuration, None, ["--train.lora.rank", "16", *words]).train.lora.scale
        for words in ((), ("--train.lora.alpha", "8"), ("--train.lora.alpha", "8", "--train.lora.rslora", "true"))
    ]
    assert scales == [1.0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--train.lora.rank", "4", "--train.trainable", "!embedding.*"],
            "train.trainable [!embedding.*] with train.lora trains all but these beside the adapters",
        ),
        (["--train.lora.rank", "0"], "train.lora.rank"),
        (["--train.lora.alpha", "2"], "train.lora.rank"),
        (["--train.lora.rank", "4", "--train.lora.dropout", "1"], "train.lora.dropout"),
        (
            ["--train.lora.rank", "4", "--train.lora.targets", "[]"],
            "train.lora.targets has no pattern, or an empty one",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(words, text):
    with pytest.raises(UserError, match=re.escape(text)):
        load(Configuration, None, words)


@pytest.mark.parametrize("target", ["q_proj", "head.*", "moe.*"])
def test_a_target_that_is_not_there_is_refused(target):
    text = "names no linear layer of the model; they are attention.key, attention.output, attention.query, "
    with use(rules_for({})), pytest.raises(UserError, match=re.escape(text)):
        make_trainer(LLAMA, lora={"rank": 2, "targets": (target,)})
