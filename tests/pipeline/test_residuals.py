"""What a backward needs: taken apart, put together again, and without weights among what is kept."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxtron.data.batch import TokenBatch
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.families import program_of
from jaxtron.models.program import Microbatch, make_parts
from jaxtron.pipeline.layer_loop import ChunkWork, LayerLoop
from jaxtron.pipeline.model import LayerOutput
from jaxtron.pipeline.residuals import split_residuals
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.parameters import manual_specs
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import use


def layer(weights, x, scale):
    hidden = jnp.tanh(x @ weights["up"])
    return x + scale * (hidden @ weights["down"] + weights["bias"])


def make():
    generator = np.random.default_rng(0)
    shapes = {"up": (5, 11), "down": (11, 5), "bias": (5,)}
    weights = {name: jnp.asarray(generator.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return weights, jnp.asarray(generator.normal(size=(7, 5)), jnp.float32), jnp.float32(0.5)


def test_the_function_made_again_gives_the_same():
    weights, x, scale = make()

    def there_and_back(weights, x, scale):
        y, pull = jax.vjp(lambda weights, x: layer(weights, x, scale), weights, x)
        stored, pullback = split_residuals(pull, (weights, scale))
        return y, stored, pull(y), pullback(stored, (weights, scale))(y)

    _, stored, expected, found = jax.jit(there_and_back)(weights, x, scale)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    # neither the weights nor what else is given
    assert {leaf.shape for leaf in stored} == {(7, 5), (7, 11)}


def test_what_is_given_is_read_anew():
    weights, x, scale = make()

    @jax.jit
    def run(weights, x, scale):
        pull = jax.vjp(lambda weights, x: layer(weights, x, scale), weights, x)[1]
        stored, pullback = split_residuals(pull, (weights, scale))
        other = {**weights, "down": 2 * weights["down"]}
        # the first matrix gets its cotangent through the second
        return pullback(stored, (other, scale))(x)[0]["up"], pull(x)[0]["up"]

    double, single = run(weights, x, scale)
    np.testing.assert_allclose(double, 2 * single, rtol=1e-6)


def test_keys_are_kept_as_numbers_and_constants_are_not_kept():
    constant = np.arange(5, dtype=np.float32)

    @jax.jit
    def run(x, key):
        noise = jax.checkpoint(lambda x, key: x * constant * jax.random.uniform(key, x.shape))
        y, pull = jax.vjp(noise, x, key)
        stored, pullback = split_residuals(pull, ())
        return stored, pullback(stored, ())(y)[0], pull(y)[0]

    stored, found, expected = run(jnp.ones((7, 5)), jax.random.key(3))
    assert stored and not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in stored)
    assert (5,) not in {leaf.shape for leaf in stored}
    np.testing.assert_array_equal(found, expected)


# No dimension of a weight is a multiple of the number of rows, so what has no such dimension was made of weights alone.
ROWS, LENGTH = 7, 16
MODELS = {
    "gpt": ModelConfig(num_layers=3, hidden_size=40, num_heads=4, vocab_size=60, vocab_multiple=64),
    "llama": ModelConfig(
        num_layers=3,
        hidden_size=40,
        num_heads=4,
        num_kv_heads=2,
        activation="swiglu",
        norm="rms_norm",
        bias=False,
        position="rotary",
        vocab_size=60,
        vocab_multiple=64,
    ),
    "palm": ModelConfig(
        pattern="(*-)",
        num_layers=3,
        hidden_size=40,
        num_heads=4,
        num_kv_heads=1,
        qk_norm=True,
        norm="layer_norm_1p",
        position="alibi",
        vocab_size=60,
        vocab_multiple=64,
    ),
}


def has_rows(shape: tuple[int, ...]) -> bool:
    return any(size % ROWS == 0 for size in shape)


def stored_leaves(rules, model: ModelConfig, *, is_split: bool = False) -> list[tuple[int, ...]]:
    """Shapes of what a layer of a pipeline keeps (for its backward, or for its weight gradients), in bfloat16."""
    with use(rules):
        parts = make_parts(model, "bfloat16")
        pieces, found = program_of(model).model(parts, jax.random.key(0)), []

        def local(params, microbatch):
            working = parts.split(parts.blueprint.working(params, jnp.bfloat16))
            (stack,), (layers,) = pieces.stacks, working.stacks
            loop = LayerLoop(stack.layer, layers, jnp.arange(3))
            x = jax.eval_shape(lambda: stack.enter(working.outer, None, microbatch))
            held = loop.buffers(loop.prepare(x, stack.shared(microbatch), splits=is_split), 2, 2, 3)
            found.extend(held.deferred if is_split else held.residuals)
            return params

        tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
        microbatch = Microbatch(TokenBatch(tokens, tokens, jnp.ones((ROWS, LENGTH))), jnp.arange(ROWS))
        specs = manual_specs(parts.blueprint.parameters)
        run = region(
            lambda params, microbatch: local(params, jax.tree.map(vary, microbatch)), (specs, PartitionSpec()), specs
        )
        jax.eval_shape(run, parts.blueprint.abstract, microbatch)
    assert all(leaf.shape[:2] == (2, 3) for leaf in found)
    return [leaf.shape[2:] for leaf in found]


@pytest.mark.parametrize("is_split", [False, True], ids=["residuals", "deferred"])
@pytest.mark.parametrize("mesh", [{"data": 1}, {"fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_no_weights_are_kept(rules_for, name, recompute, mesh, is_split):
    model = MODELS[name].model_copy(update={"recompute": recompute, "max_positions": LENGTH, "dropout": 0.1})
    shapes = stored_leaves(rules_for(**mesh), model, is_split=is_split)
    # vectors are next to nothing: one more than a norm's scales
    matrices = [shape for shape in shapes if len(shape) > 1]
    assert matrices and all(has_rows(shape) for shape in matrices), matrices
    if recompute == "full" and not is_split:
        # the layer's input, and the number of each row's dropout
        large = [shape for shape in shapes if math.prod(shape) > 2 * ROWS]
        assert large == [(ROWS, LENGTH, 40)]


def test_the_check_notices_weights(rules_for):
    # the sum of the squares of a matrix needs the matrix again, in the precision of the layer
    loop = LayerLoop(
        lambda weights, x, number, shared: LayerOutput(x * jnp.sum(jnp.square(weights.astype(jnp.bfloat16)))),
        jnp.ones((3, 40, 160)),
        jnp.arange(3),
    )
    with use(rules_for(data=1)):
        x = jax.ShapeDtypeStruct((ROWS, LENGTH, 40), jnp.bfloat16)

        def make_buffer():
            return loop.buffers(loop.prepare(x, ()), 2, 0, 3).residuals

        shapes = [leaf.shape[2:] for leaf in jax.eval_shape(region(make_buffer, (), PartitionSpec()))]
    assert [shape for shape in shapes if len(shape) > 1 and not has_rows(shape)] == [(40, 160)]


@pytest.mark.parametrize("is_split", [False, True], ids=["residuals", "deferred"])
def test_nothing_is_kept_or_summed_for_frozen_weights(rules_for, is_split):
    weights, x, _ = make()
    stacked = {name: jnp.stack([leaf, leaf]) for name, leaf in weights.items()}
    frozen = {"up": stacked["up"], "down": None, "bias": None}
    trained = {"up": None, "down": stacked["down"], "bias": stacked["bias"]}

    def layer_output(weights, x, number, shared):
        return LayerOutput(layer(weights, x, shared))

    def held(trained, frozen):
        loop = LayerLoop(layer_output, trained, jnp.arange(2), frozen=frozen)
        stored = loop.buffers(loop.prepare(x, jnp.float32(0.5), splits=is_split), 1, 1, 2)
        return stored.residuals, stored.deferred, stored.grad_accumulators

    with use(rules_for(data=1)):
        everything, less = (
            jax.eval_shape(region(held, (PartitionSpec(), PartitionSpec()), PartitionSpec()), *parameters)
            for parameters in ((stacked, None), (trained, frozen))
        )
    assert jax.tree.structure(less[2]) == jax.tree.structure(trained)
    for found in (everything, less):
        # of the layer's input and of what is between its products: never a weight
        assert {leaf.shape[2:] for leaf in (*found[0], *found[1])} <= {(7, 5), (7, 11)}
    # the first product's weight gradient is what needs the input
    sizes = [sum(math.prod(leaf.shape) for leaf in (*found[0], *found[1])) for found in (everything, less)]
    assert sizes[1] < sizes[0]


def test_a_prepared_layer_is_made_of_values_and_tracing_it_leaks_none(rules_for):
    weights, x, _ = make()
    loop = LayerLoop(
        lambda weights, x, number, shared: LayerOutput(layer(weights, x, shared), jnp.sum(x), {"most": jnp.max(x)}),
        {name: leaf[None] for name, leaf in weights.items()},
        jnp.arange(1),
    )
    work = ChunkWork(0, 1, 0, 0)

    def gradients(x):
        prepared = loop.prepare(x, jnp.float32(0.5), splits=True)
        held = loop.buffers(prepared, 1, 1, 1)
        # neither method needs that another was traced before it
        backward = jax.eval_shape(lambda: loop.backward(prepared, work, x, jnp.float32(0.5), held)[0])
        _, held = loop.forward(prepared, work, x, jnp.float32(0.5), held)
        assert backward.shape == x.shape
        cotangent, held = loop.backward(prepared, work, jnp.ones_like(x), jnp.float32(0.5), held)
        return cotangent, loop.weight_grads(prepared, work, jnp.float32(0.5), held).grad_accumulators

    def loss(weights, x):
        return jnp.sum(layer(weights, x, 0.5)) + jnp.sum(x)

    with use(rules_for(data=1)), jax.checking_leaks():
        found = jax.jit(region(gradients, (PartitionSpec(),), PartitionSpec()))(x)
    expected = jax.grad(loss, argnums=(1, 0))(weights, x)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5), found[0], expected[0])
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one[0], other, rtol=1e-5, atol=1e-5), found[1], expected[1]
    )
