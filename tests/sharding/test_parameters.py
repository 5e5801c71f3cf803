"""Parameters on a mesh: the same values everywhere, gathered and reduced without loss."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import initializers
from jax.sharding import PartitionSpec as P

from jaxtron.models.stacked import stacked
from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.blueprint import blueprint
from jaxtron.sharding.collectives import vary
from jaxtron.sharding.parameters import gather_at_use, gather_once, manual_specs, parameter, reduce_gradients, shardings
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import use

MESHES = [{"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "context": 4}]
# meshes that divide neither 22 channels nor another dimension, and what they pad them to
UNEVEN = [
    ({"fsdp": 5}, 25),
    ({"data": 7}, 28),
    ({"fsdp": 2, "data": 3}, 24),
    ({"data": 3, "context": 2}, 24),
    ({"data": 3, "tensor": 2}, 24),
]
# stages share what is in no stack whatever ZeRO does
STAGES = [({"pipe": 7}, 28), ({"pipe": 3, "tensor": 2}, 24), ({"fsdp": 2, "pipe": 3}, 24), ({"pipe": 2, "data": 3}, 24)]
LEVELS = ["none", "optimizer", "parameters"]


class Model(nnx.Module):
    """A table, and two matrices of each of three stacked layers."""

    def __init__(self, rngs):
        self.table = parameter(rngs, initializers.normal(1.0), (16, 24), axes=("vocab", "embed"), role="embedding")
        state = jax.vmap(lambda key: nnx.split(Layer(nnx.Rngs(key)))[1])(jax.random.split(rngs.params(), 3))
        self.layers = nnx.merge(nnx.split(nnx.eval_shape(lambda: Layer(nnx.Rngs(0))))[0], state)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up = parameter(rngs, initializers.normal(0.5), (24, 32), axes=("embed", "mlp"), role="kernel")
        self.bias = parameter(rngs, initializers.normal(0.5), (32,), axes=("mlp",), role="bias")


class UnevenModel(nnx.Module):
    """22 channels on 2 x 3 devices are padded to 24: the 2 have 12 each, where 11 would do for them alone."""

    def __init__(self, rngs):
        self.table = parameter(rngs, initializers.normal(1.0), (16, 22), axes=("vocab", "embed"), role="embedding")
        self.up = parameter(rngs, initializers.normal(0.5), (22, 32), axes=("embed", "mlp"), role="kernel")
        self.scale = parameter(rngs, initializers.normal(0.5), (22,), axes=("norm",), role="scale")


def test_initial_values_are_the_same_on_every_mesh(rules_for):
    values = []
    for mesh in ({"data": 1}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        with use(rules_for(**mesh)):
            plan = blueprint(Model)
            params = plan.initialize(jax.random.key(0))
            for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(plan.abstract), strict=True):
                assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
                assert (leaf.shape, leaf.dtype) == (wanted.shape, jnp.float32)
            values.append(jax.tree.map(np.asarray, params))
    for other in values[1:]:
        jax.tree.map(np.testing.assert_array_equal, values[0], other)
    layers = values[0]["layers"]["up"]
    assert len({layer.tobytes() for layer in layers}) == 3


def of_each(plan, name):
    return jax.tree.map(lambda spec: getattr(spec, name), plan.parameters)


def test_a_blueprint_knows_every_parameter_without_making_any(rules_for):
    with use(rules_for(data=2, fsdp=2, tensor=2)):
        plan = blueprint(Model)
        manual = manual_specs(plan.parameters)
    assert plan.num_parameters == 16 * 24 + 3 * (24 * 32 + 32)
    assert plan.roles == {"table": "embedding", "layers": {"up": "kernel", "bias": "bias"}}
    assert of_each(plan, "axes") == {
        "table": ("vocab", "embed"),
        "layers": {"up": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
    }
    batch, tensor = ("fsdp", "data", "context"), ("tensor",)
    # the axis over layers is split over the stages, here one
    pipe = ("pipe",)
    specs = jax.tree.map(lambda layout: layout.spec, of_each(plan, "layout"))
    assert specs == {"table": P(tensor, batch), "layers": {"up": P(pipe, batch, tensor), "bias": P(pipe, tensor)}}
    assert manual == {
        "table": P(None, batch),
        "layers": {"up": P(pipe, batch, None), "bias": P(pipe, None)},
    }


def test_every_device_holds_its_part(rules_for):
    with use(rules_for(data=2, fsdp=2, tensor=2)):
        params = blueprint(Model).initialize(jax.random.key(0))
    assert params["table"].addressable_shards[0].data.shape == (8, 6)
    assert params["layers"]["up"].addressable_shards[0].data.shape == (3, 6, 16)
    assert params["layers"]["bias"].addressable_shards[0].data.shape == (3, 16)


def in_region(plan, function, in_axes):
    """`function(params, x)` in the manual region; what it returns is a tree like the parameters."""
    specs = manual_specs(plan.parameters)
    return jax.jit(region(function, (specs, in_axes), specs))


CASES = [*((Model, mesh, 24) for mesh in MESHES), *((UnevenModel, mesh, padded) for mesh, padded in UNEVEN + STAGES)]


@pytest.mark.parametrize("zero", LEVELS)
@pytest.mark.parametrize(("model", "mesh", "padded"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_gathers_make_parameters_whole_and_reductions_sum_their_gradients(rules_for, model, mesh, padded, zero):
    with use(rules_for(zero=zero, **mesh)):
        plan = blueprint(model)
        generator = np.random.default_rng(0)
        values = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), plan.parameters)
        params = jax.device_put(plan.at_rest(values), shardings(plan.parameters))
        if zero != "none":
            assert plan.parameters["table"].layout.padded == (16, padded)
        shapes = []

        def gradients(params, factor):
            working = gather_once(params, plan.parameters, jnp.dtype(jnp.float32))

            def loss(working):
                whole = gather_at_use(nnx.state(plan.module(working)), jnp.dtype(jnp.float32))
                whole = nnx.to_pure_dict(whole)
                shapes.append(jax.tree.map(jnp.shape, whole))
                # each device has a factor of its own, as it would have its own rows or part of a sequence
                return sum(factor[0] * jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(whole))

            return reduce_gradients(jax.grad(loss)(jax.tree.map(vary, working)), plan.parameters)

        axes = ("pipe", "data", "fsdp", "context")
        shards = math.prod(mesh.get(axis, 1) for axis in axes)
        factors = np.arange(1, shards + 1, dtype=np.float32)
        found = in_region(plan, gradients, P(axes))(params, factors)
        for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    # whole over these axes; what tensor splits is still one array to the type system
    assert shapes[0] == jax.tree.map(lambda leaf: leaf.shape, values)

    def equals_sum_of_factors(one, value):
        one, own = np.asarray(one), tuple(slice(size) for size in value.shape)
        np.testing.assert_allclose(one[own], 2 * factors.sum() * value, rtol=1e-5)
        # padding has no gradient
        assert np.count_nonzero(one) == value.size

    jax.tree.map(equals_sum_of_factors, found, values)


def test_stages_share_what_is_in_no_stack_on_every_level_and_nothing_else(rules_for):
    class Stages(nnx.Module):
        def __init__(self, rngs):
            self.table = parameter(rngs, initializers.normal(1.0), (16, 24), axes=("vocab", "embed"), role="embedding")
            self.scale = parameter(rngs, initializers.ones, (24,), axes=("norm",), role="scale")
            self.layers = stacked(Layer, Partition((2, 1), num_stages=2), rngs)

    for zero in LEVELS:
        with use(rules_for(zero=zero, pipe=2, tensor=2, data=2)):
            plan = blueprint(Stages)
            params = plan.initialize(jax.random.key(0))
            held = {
                name: leaf.addressable_shards[0].data.shape
                for name, leaf in (("table", params["table"]), ("scale", params["scale"]), *params["layers"].items())
            }
            frozen = plan.freeze({"table"}, jnp.bfloat16).parameters["table"]
            assert plan.parameters["table"].layout.once and "pipe" in plan.parameters["table"].layout.once[-1].axes
        over_data = 1 if zero == "none" else 2
        rows = 24 // over_data
        assert held == {"table": (8, rows // 2), "scale": (24,), "up": (2, rows, 16), "bias": (2, 16)}
        assert not frozen.layout.once


def test_matrices_work_in_the_type_of_the_step_and_vectors_in_float32(rules_for):
    with use(rules_for(data=2, fsdp=2, tensor=2)):
        plan = blueprint(Model)
        types = []

        def read(params, _):
            working = gather_once(params, plan.parameters, jnp.dtype(jnp.bfloat16))
            used = gather_at_use(nnx.state(plan.module(working)), jnp.dtype(jnp.bfloat16))
            types.append(jax.tree.map(lambda leaf: leaf.dtype.name, nnx.to_pure_dict(used)))
            return params

        jax.eval_shape(in_region(plan, read, P()), plan.abstract, jax.ShapeDtypeStruct((), jnp.float32))
    assert types[0] == {"table": "bfloat16", "layers": {"up": "bfloat16", "bias": "float32"}}
