"""Two views of one mesh: which axes it is cut into, whose they are, and that layers do not notice."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.nn import initializers
from jax.sharding import PartitionSpec as P

from jaxtron.config import UserError
from jaxtron.plan.layout import layout_text, parameter_rows
from jaxtron.sharding.blueprint import blueprint
from jaxtron.sharding.config import MeshConfig
from jaxtron.sharding.folding import EXPERT_FLAGS, FLAGS, refine
from jaxtron.sharding.layout import Gather
from jaxtron.sharding.mesh import abstract_mesh, build_mesh
from jaxtron.sharding.parameters import parameter
from jaxtron.sharding.rules import use

ONE = dict.fromkeys(FLAGS, 1)
# sizes, the axes that are cut with their sizes, and the axes of expert_data, expert and expert_tensor
VIEWS = [
    ({"data": 2, "tensor": 4}, {}, [("data", "tensor"), (), ()]),
    ({"data": 8, "expert": 8}, {}, [(), ("data",), ()]),
    ({"data": 8, "expert": 2}, {"data_0": 4, "data_1": 2}, [("data_0",), ("data_1",), ()]),
    ({"data": 4, "tensor": 2, "expert": 2}, {}, [("data",), ("tensor",), ()]),
    ({"data": 4, "tensor": 2, "expert": 4}, {"data_0": 2, "data_1": 2}, [("data_0",), ("data_1", "tensor"), ()]),
    ({"data": 2, "tensor": 4, "expert": 2}, {"tensor_0": 2, "tensor_1": 2}, [("data", "tensor_0"), ("tensor_1",), ()]),
    (
        {"data": 2, "tensor": 4, "expert": 4, "expert_tensor": 2},
        {"tensor_0": 2, "tensor_1": 2},
        [(), ("data", "tensor_0"), ("tensor_1",)],
    ),
    (
        {"tensor": 8, "expert": 2, "expert_tensor": 2},
        {"tensor_0": 2, "tensor_1": 2, "tensor_2": 2},
        [("tensor_0",), ("tensor_1",), ("tensor_2",)],
    ),
    # the experts' own tensor parallelism is none unless it is asked for, and a stage's devices are those of both views
    ({"tensor": 4, "expert": 4}, {}, [(), ("tensor",), ()]),
    ({"pipe": 2, "data": 2, "expert": 2}, {}, [(), ("data",), ()]),
    ({"pipe": 2, "context": 2, "tensor": 2, "expert": 4}, {}, [(), ("context", "tensor"), ()]),
]


@pytest.mark.parametrize(("sizes", "cut", "axes"), VIEWS, ids=str)
def test_the_mesh_has_the_cuts_of_both_views_and_no_more(sizes, cut, axes):
    dense = {flag: sizes.get(flag, 1) for flag in FLAGS}
    found = refine(dense, sizes.get("expert", 1), sizes.get("expert_tensor", 1))
    assert {axis: size for axis, size in found.sizes.items() if axis not in FLAGS} == cut
    assert [found.flags[flag] for flag in EXPERT_FLAGS] == axes
    # every axis is one flag's of the layers' view, in the mesh's order
    assert [axis for flag in FLAGS for axis in found.flags[flag]] == list(found.sizes)
    assert {flag: math.prod(found.sizes[axis] for axis in found.flags[flag]) for flag in FLAGS} == dense
    for flag in ("expert", "expert_tensor"):
        assert math.prod(found.sizes[axis] for axis in found.flags[flag]) == sizes.get(flag, 1)
    # of several parts, each is one flag's of the experts' view
    shared = [axis for flag in ("pipe", *EXPERT_FLAGS) for axis in found.flags[flag] if found.sizes[axis] > 1]
    assert shared == [axis for axis, size in found.sizes.items() if size > 1]


@pytest.mark.parametrize(("sizes", "cut", "axes"), VIEWS, ids=str)
@pytest.mark.parametrize("order", [FLAGS, ("data", "pipe", "fsdp", "context", "tensor")], ids="-".join)
def test_stages_may_be_neighbours_and_experts_lie_as_before(order, sizes, cut, axes):
    dense = {flag: sizes.get(flag, 1) for flag in FLAGS}
    found = refine(dense, sizes.get("expert", 1), sizes.get("expert_tensor", 1), order)
    assert [found.flags[flag] for flag in EXPERT_FLAGS] == axes
    assert [axis for flag in order for axis in found.flags[flag]] == list(found.sizes)


def test_experts_lie_along_the_innermost_of_the_order():
    sizes = ONE | {"fsdp": 4, "context": 2, "tensor": 2}
    usual, inside = (refine(sizes, 8, 1, order) for order in (FLAGS, ("pipe", "data", "context", "fsdp", "tensor")))
    assert usual.flags["expert"] == ("fsdp_1", "context", "tensor") and usual.flags["fsdp"] == ("fsdp_0", "fsdp_1")
    assert inside.flags["expert"] == ("fsdp", "tensor") and inside.flags["expert_data"] == ("context",)
    assert list(inside.sizes) == ["pipe", "data", "context", "fsdp", "tensor"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 8, "expert": 16},
            "mesh.expert 16 needs a multiple of 16 devices in a stage, there are 8 .mesh",
        ),
        ({"expert": 2}, "mesh.expert 2 needs a multiple of 2 devices in a stage, there is 1 .one device.; change one"),
        (
            {"pipe": 2, "data": 4, "expert": 4, "expert_tensor": 2},
            "mesh.expert 4 x mesh.expert_tensor 2 needs a multiple of 8 devices in a stage, there are 4",
        ),
        (
            {"data": 3, "tensor": 2, "expert": 3},
            "cannot be mesh.data 3 x mesh.tensor 2 and 2 copies x mesh.expert 3 at once: these cut them every 2 and "
            "every 3, which is not a multiple",
        ),
        ({"data": 2, "tensor": 6, "expert": 4}, "mesh.data 2 x mesh.tensor 6 and 3 copies x mesh.expert 4 at once"),
    ],
)
def test_views_that_do_not_fit_each_other(sizes, message):
    config = MeshConfig(**{"data": 1, **sizes})
    with pytest.raises(UserError, match=message) as error:
        config.shape(math.prod(sizes.get(flag, 1) for flag in FLAGS))
    assert "\n" not in str(error.value)


def test_a_refined_mesh_has_the_devices_where_the_plain_one_has_them():
    plain, refined = (
        build_mesh(MeshConfig(data=2, tensor=4, **experts), jax.devices()) for experts in ({}, {"expert": 4})
    )
    np.testing.assert_array_equal(refined.mesh.devices.ravel(), plain.mesh.devices.ravel())
    assert refined.mesh.axis_names == ("pipe", "data", "fsdp", "context", "tensor")
    refined = build_mesh(MeshConfig(data=2, tensor=4, expert=2), jax.devices())
    assert refined.mesh.axis_names == ("pipe", "data", "fsdp", "context", "tensor_0", "tensor_1")
    assert refined.mesh.devices.shape == (1, 2, 1, 1, 2, 2)
    np.testing.assert_array_equal(refined.mesh.devices.ravel(), plain.mesh.devices.ravel())
    assert refined.sizes == plain.sizes == ONE | {"data": 2, "tensor": 4}
    assert refined.manual == plain.manual == ("pipe", "data", "fsdp", "context")


def test_axes_are_named_by_the_flags_that_they_make_up():
    folding = abstract_mesh(MeshConfig(data=4, tensor=4, expert=4, expert_tensor=2), 16)
    assert folding.axes("data", "tensor") == ("data_0", "data_1", "tensor_0", "tensor_1")
    assert folding.names(("data_0", "data_1")) == ("data",)
    # in their own order, and without those of one part
    assert folding.names(("tensor_0", "tensor_1", "fsdp", "data_0", "data_1")) == ("tensor", "data")
    # of the experts' view where the layers' has no name, and their own where neither has
    assert folding.names(("data_1", "tensor_0")) == ("expert",)
    assert folding.names(("data_0", "tensor_1")) == ("expert_data", "expert_tensor")
    assert folding.names(("tensor_0",)) == ("tensor_0",)
    assert folding.names(()) == ()


def test_nothing_is_split_over_a_flag_that_is_left_out(rules_for):
    rules = rules_for(data=2, context=2, tensor=2)
    whole = rules.without("context")
    assert (whole.axes("context"), whole.parts("context"), rules.parts("context")) == ((), 1, 2)
    assert whole.mesh is rules.mesh and whole.manual == rules.manual
    assert (whole.batch, whole.axes("tensor")) == (rules.batch, rules.axes("tensor"))
    layout = whole.parameter_layout(("embed", "mlp"), (32, 128))
    assert layout.spec == P(("fsdp", "data"), "tensor") and layout.once == (Gather(0, ("data",)),)


AXES, SHAPE = ("embed", "heads", "head_dim"), (36, 8, 4)


class Model(nnx.Module):
    """A matrix and a vector."""

    def __init__(self, rngs):
        self.query = parameter(rngs, initializers.normal(1.0), SHAPE, axes=AXES, role="kernel")
        self.norm = parameter(rngs, initializers.ones, SHAPE[:1], axes=("norm",), role="scale")


@pytest.mark.parametrize("zero", ["none", "optimizer", "parameters"])
def test_parameters_lie_on_a_refined_mesh_as_on_the_plain_one(rules_for, zero):
    plain, refined = rules_for(zero, data=4, tensor=2), rules_for(zero, data=4, tensor=2, expert=4)
    assert refined.axes("data") == ("data_0", "data_1")
    layout = refined.parameter_layout(AXES, SHAPE)
    shared = () if zero == "none" else ("data_0", "data_1", "context")
    assert layout.spec == P(("fsdp", *shared), "tensor", ()) and layout.used == P((), "tensor", ())
    assert layout.once == ((Gather(0, shared),) if zero == "optimizer" else ())
    assert layout.at_use == ((Gather(0, ("fsdp", *shared)),) if zero == "parameters" else ())
    # what people see are flags
    found = []
    for rules in (plain, refined):
        with use(rules):
            plan = blueprint(Model)
            found.append(([dataclasses.asdict(row) for row in parameter_rows(plan)], layout_text(plan)))
            for spec in jax.tree.leaves(plan.parameters):
                part = jax.NamedSharding(rules.mesh, spec.layout.spec).shard_shape(spec.layout.padded)
                assert part == rules.part(spec.layout)
    assert found[0] == found[1] and "mesh: data 4 x tensor 2\n" in found[0][1]
