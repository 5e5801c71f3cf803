"""Between the stages' order of layers and the model's."""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtron.checkpoint.layer_order import LayerOrder
from jaxtron.checkpoint.names import signature
from jaxtron.pipeline.layer_slots import arrange
from jaxtron.pipeline.partition import Partition

STACKED = (("stack", "w"), ("stack", "b"), ("stack", "v"))
PARTITIONS = {
    "interleaved": Partition((2, 2, 2, 2), num_stages=2),
    "uneven": Partition((1, 2, 3, 1), num_stages=4),
    "empty rows in every chunk": Partition((2, 1, 1, 3), num_stages=2, placement="v_shape"),
    "a stage without layers": Partition((0, 3), num_stages=2),
}


def make_order(partition: Partition) -> LayerOrder:
    return LayerOrder(dict.fromkeys(STACKED, partition), {("stack", "v"): (len(partition.slot_layers), 5)})


def make_state(partition: Partition, rules):
    """Parameters and moments of four arrays, in the stages' order; and the same in the model's.

    `v` has rows of 5, which its parts pad.
    """
    count, parts = partition.num_layers, rules.mesh.shape["fsdp"]
    w, b, v = (
        np.arange(1.0, 1 + math.prod(shape), dtype=np.float32).reshape(shape)
        for shape in ((count, 8, 6), (count, 3), (count, 5))
    )
    model = {"stack": {"w": w, "b": b, "v": v}, "table": np.arange(16.0).reshape(8, 2)}
    specs = {
        "stack": {"w": P("pipe", "fsdp", "tensor"), "b": P("pipe", None), "v": P("pipe", "fsdp")},
        "table": P("fsdp", None),
    }

    def place(values):
        return jax.tree.map(lambda value, spec: jax.device_put(value, NamedSharding(rules.mesh, spec)), values, specs)

    rows = {"stack": jax.tree.map(lambda leaf: np.asarray(arrange(partition, jnp.asarray(leaf))), model["stack"])}
    rows["stack"]["v"] = np.pad(rows["stack"]["v"], ((0, 0), (0, -5 % parts)))
    rows["table"] = model["table"]
    negative = jax.tree.map(np.negative, rows)
    state = {"params": place(rows), "optimizer": [{"mu": place(negative)}, jnp.int32(3)]}
    expected = {"params": model, "optimizer": [{"mu": jax.tree.map(np.negative, model)}, np.int32(3)]}
    return state, expected


def shapes_of(state):
    """The abstract state."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def cut(saved, expected):
    """What is saved in the shapes of `expected`; the rest of it is zeros."""

    def own(leaf, like):
        value = np.asarray(leaf)
        found = value[tuple(map(slice, like.shape))]
        assert np.count_nonzero(value) == np.count_nonzero(found)
        return found

    return jax.tree.map(own, saved, expected)


@pytest.mark.parametrize("name", PARTITIONS)
def test_there_and_back(rules_for, name):
    partition = PARTITIONS[name]
    rules = rules_for(pipe=partition.num_stages, fsdp=8 // partition.num_stages)
    order = make_order(partition)
    with jax.set_mesh(rules.mesh):
        state, expected = make_state(partition, rules)
        saved = order.in_model_order(state)
        jax.tree.map(np.testing.assert_array_equal, cut(saved, expected), expected)
        # nothing of the padding is said to be on the disk
        assert order.on_disk(state) == signature(jax.tree.map(jnp.asarray, expected))
        # nothing else is touched, and the state is still there
        assert saved["params"]["table"] is state["params"]["table"]
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        like = shapes_of(state)
        wanted = order.abstract(like)
        restored = jax.tree.map(lambda leaf, to: jax.device_put(np.asarray(leaf), to.sharding), saved, wanted)
        back = order.in_stage_order(restored, like)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    for leaf, first in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert leaf.sharding.is_equivalent_to(first.sharding, leaf.ndim)


def test_no_device_has_more_than_its_part_and_what_waits_for_the_disk_is_on_the_host(rules_for):
    partition, rules = PARTITIONS["uneven"], rules_for(pipe=4, fsdp=2)
    order = make_order(partition)
    with jax.set_mesh(rules.mesh):
        state, _ = make_state(partition, rules)
        saved = order.in_model_order(state)["params"]["stack"]
    # seven layers do not divide by four stages: another dimension does
    assert saved["w"].sharding.spec == P(None, ("fsdp", "pipe"), "tensor")
    # three do not, and are padded to four; five were padded to six for fsdp, and are to eight for both
    shapes = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in saved.items()}
    assert shapes == {"w": (7, 1, 6), "b": (7, 1), "v": (7, 1)}
    assert {leaf.sharding.memory_kind for leaf in saved.values()} == {"pinned_host"}


def test_layers_in_order_are_left_as_they_are(rules_for):
    partition, rules = Partition((2, 2), num_stages=2), rules_for(pipe=2)
    order = make_order(partition)
    state, _ = make_state(partition, rules)
    like = shapes_of(state)
    for same in (order.in_model_order(state), order.in_stage_order(state, like)):
        assert all(map(operator.is_, jax.tree.leaves(same), jax.tree.leaves(state)))
    assert all(map(operator.is_, jax.tree.leaves(order.abstract(like)), jax.tree.leaves(like)))
