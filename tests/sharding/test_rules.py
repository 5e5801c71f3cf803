"""The two tables: specs for every ZeRO level, what moves, what collides, what does not divide."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxtron.config import UserError
from jaxtron.sharding.layout import Gather
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import constrain, current, spec, use

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
SHARED = ("fsdp", "data", "context")
# logical axes and shapes of a decoder's parameters
KERNELS = {
    "query": (("embed", "heads", "head_dim"), (32, 8, 4)),
    "key": (("embed", "kv_heads", "head_dim"), (32, 4, 4)),
    "output": (("heads", "head_dim", "embed"), (8, 4, 32)),
    "up": (("embed", "mlp"), (32, 128)),
    "gate_up": (("embed", "gate", "mlp"), (32, 2, 96)),
    "down": (("mlp", "embed"), (128, 32)),
    "table": (("vocab", "embed"), (64, 32)),
    "positions": (("positions", "embed"), (16, 32)),
}
VECTORS = {
    "query_bias": (("heads", "head_dim"), (8, 4)),
    "up_bias": (("mlp",), (128,)),
    "norm": (("norm",), (32,)),
}


def specs(rules, parameters):
    return {name: rules.parameter_layout(*axes_and_shape).spec for name, axes_and_shape in parameters.items()}


@pytest.mark.parametrize(
    ("zero", "batch"),
    [("none", ("fsdp",)), ("optimizer", SHARED), ("parameters", SHARED)],
)
def test_parameters_at_rest(rules_for, zero, batch):
    rules = rules_for(zero=zero, **CUBE)
    tensor = ("tensor",)
    assert specs(rules, KERNELS) == {
        "query": P(batch, tensor, ()),
        "key": P(batch, tensor, ()),
        "output": P(tensor, (), batch),
        "up": P(batch, tensor),
        "gate_up": P(batch, (), tensor),
        "down": P(tensor, batch),
        "table": P(tensor, batch),
        "positions": P((), batch),
    }
    # small: batch axes leave them whole
    assert specs(rules, VECTORS) == {"query_bias": P(tensor, ()), "up_bias": P(tensor), "norm": P(())}


@pytest.mark.parametrize(
    ("zero", "once", "at_use"),
    [
        ("none", (), (Gather(0, ("fsdp",)),)),
        ("optimizer", (Gather(0, ("data", "context")),), (Gather(0, ("fsdp",)),)),
        ("parameters", (), (Gather(0, SHARED),)),
    ],
)
def test_when_parameters_are_gathered(rules_for, zero, once, at_use):
    rules = rules_for(zero=zero, **CUBE)
    layout = rules.parameter_layout(*KERNELS["query"])
    assert (layout.once, layout.at_use, layout.used) == (once, at_use, P((), "tensor", ()))
    # of several stacked in one array, a dimension later
    stacked = layout.stacked((6,), ("pipe",))
    assert stacked.spec == P("pipe", *layout.spec) and stacked.used == P("pipe", *layout.used)
    assert (stacked.shape, stacked.padded) == ((6, 32, 8, 4), (6, 32, 8, 4))
    for gathers, wanted in ((stacked.once, once), (stacked.at_use, at_use)):
        assert gathers == tuple(Gather(1, gather.axes) for gather in wanted)
    # what no axis of several parts shares is not gathered
    norm = rules.parameter_layout(*VECTORS["norm"])
    assert (norm.once, norm.at_use, norm.used) == ((), (), norm.spec)


def test_the_last_gather_of_a_dimension_leaves_its_padding_out(rules_for):
    rules = rules_for(fsdp=2, data=3)
    layout = rules.parameter_layout(("embed", "mlp"), (8, 5))
    assert layout.once == (Gather(0, ("data", "context")),)
    assert layout.at_use == (Gather(0, ("fsdp",), (8, 12)),)
    alone = rules_for(data=3).parameter_layout(("embed", "mlp"), (8, 5))
    assert (alone.once, alone.at_use) == ((Gather(0, ("data", "context"), (8, 9)),), ())


def test_activations_split_batch_heads_and_sequence(rules_for):
    with use(rules_for(**CUBE)):
        batch, tensor = ("data", "fsdp"), ("tensor",)
        assert spec("batch", "seq", "embed") == P(batch, tensor, ())
        assert spec("batch", "full_seq", "heads", "head_dim") == P(batch, (), tensor, ())
        assert spec("batch", "full_seq", "mlp") == P(batch, (), tensor)
        assert spec("batch", None, "vocab") == P(batch, (), tensor)


def test_manual_axes_are_local_already(rules_for):
    with use(rules_for(**CUBE)):
        seen = []

        def local(x):
            seen.append(spec("batch", "seq", "embed"))
            return x

        whole = P(("data", "fsdp"))
        jax.eval_shape(region(local, whole, whole), jax.ShapeDtypeStruct((4, 4, 4), "float32"))
    assert seen == [P((), ("tensor",), ())]


def test_constrain_lays_out(rules_for):
    with use(rules_for(**CUBE)):
        x = constrain(jax.numpy.ones((4, 8, 6)), "batch", "seq", "embed")
        assert x.sharding.spec == P(("data", "fsdp"), "tensor", None)
        assert x.addressable_shards[0].data.shape == (1, 4, 6)


def test_a_batch_axis_moves_where_embed_does_not_divide(rules_for):
    rules = rules_for(data=2, fsdp=4)
    # 36 divides by fsdp 4 and not by 8: data goes to the other dimension, whose tensor is of size 1
    # (of size 1 there is nothing to scatter, and manual axes are named first)
    assert rules.parameter_layout(("embed", "mlp"), (36, 64)).spec == P(("fsdp", "context"), ("data", "tensor"))
    assert rules.parameter_layout(("positions", "embed"), (16, 35)).spec == P(("fsdp", "data"), "context")
    found = rules.parameter_layout(("embed", "heads", "head_dim"), (35, 3, 8))
    assert found.spec == P("context", "tensor", ("fsdp", "data"))


def layout_of(rules, axes, shape):
    found = rules.parameter_layout(axes, shape)
    assert found.shape == shape
    return found.spec, found.padded


def test_what_no_axis_divides_is_padded_along_embed(rules_for):
    # 34 divides by 2 and not by 4
    rules = rules_for(data=2, context=2, tensor=2)
    assert layout_of(rules, ("embed", "mlp"), (36, 64)) == (P(SHARED, "tensor"), (36, 64))
    assert layout_of(rules, ("embed", "mlp"), (34, 64)) == (P(SHARED, "tensor"), (36, 64))
    assert rules.part(rules.parameter_layout(("embed", "mlp"), (34, 64))) == (9, 32)
    # even where a dimension is smaller than its parts
    assert layout_of(rules_for(data=8), ("positions", "embed"), (3, 5)) == (P((), SHARED), (3, 8))
    # an axis that is not needed pads nothing
    rules = rules_for(zero="none", data=4, context=2)
    assert layout_of(rules, ("embed", "mlp"), (35, 64)) == (P("fsdp", "tensor"), (35, 64))
    assert layout_of(rules_for(zero="none", fsdp=3), ("embed", "mlp"), (35, 64)) == (P("fsdp", "tensor"), (36, 64))


def test_padding_is_used_by_the_axes_that_follow(rules_for):
    # fsdp 3 pads 32 to 33 and data 2 divides 128; 7 divides by nothing, and 33 not by 6
    rules = rules_for(fsdp=3, data=2)
    assert layout_of(rules, ("embed", "mlp"), (32, 128)) == (P(("fsdp", "context"), ("data", "tensor")), (33, 128))
    assert layout_of(rules, ("embed", "mlp"), (32, 7)) == (P(SHARED, "tensor"), (36, 7))


def test_a_device_s_part_is_without_padding_once_it_is_whole(rules_for):
    rules = rules_for(fsdp=2, data=3)
    layout = rules.parameter_layout(("embed", "mlp"), (8, 5))
    assert layout.padded == (12, 5)
    # gathered over data alone, each half of what fsdp splits has padding; over both, none has
    gathers = ((), layout.once, layout.once + layout.at_use)
    assert [rules.part(layout, some) for some in gathers] == [(2, 5), (6, 5), (8, 5)]


def test_a_batch_axis_never_joins_tensor_on_a_dimension(rules_for):
    # manual axes are the outer ones of a dimension: gathered over data, each tensor part would hold scattered rows
    rules = rules_for(data=2, tensor=4)
    found = layout_of(rules, ("embed", "heads", "head_dim"), (35, 8, 4))
    assert found == (P(("fsdp", "context"), "tensor", "data"), (35, 8, 4))
    assert layout_of(rules, ("vocab", "embed"), (64, 35)) == (P("tensor", SHARED), (64, 36))


def test_sizes_that_do_not_divide_show_the_spec(rules_for):
    rules = rules_for(tensor=8)
    with pytest.raises(UserError, match="heads 6 is not a multiple of mesh.tensor = 8, as .*'tensor'.* asks") as error:
        rules.parameter_layout(("embed", "heads", "head_dim"), (32, 6, 4))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="vocab 60 is not a multiple of mesh.tensor = 8"):
        rules.parameter_layout(("vocab", "embed"), (60, 32))


def test_key_value_heads_are_copied_where_there_are_fewer_than_parts(rules_for):
    rules = rules_for(zero="none", tensor=8)
    axes = ("embed", "kv_heads", "head_dim")
    assert rules.parameter_layout(axes, (32, 8, 4)).spec == P("fsdp", "tensor", ())
    assert rules.parameter_layout(axes, (32, 2, 4)).spec == P("fsdp", (), ())
    assert rules.splits("kv_heads", 16) and not rules.splits("kv_heads", 2) and not rules.splits("kv_heads", 1)
    # neither copied nor split evenly
    for size in (3, 12):
        with pytest.raises(UserError, match=f"kv_heads {size} is not a multiple of mesh.tensor = 8"):
            rules.splits("kv_heads", size)
        with pytest.raises(UserError, match=f"kv_heads {size} is not a multiple of mesh.tensor = 8"):
            rules.parameter_layout(axes, (32, size, 4))
    with pytest.raises(UserError, match="heads 2 is not a multiple"):
        rules.splits("heads", 2)


def test_collisions_show_the_spec(rules_for):
    rules = rules_for(tensor=8)
    with pytest.raises(UserError, match="\\('heads', 'mlp'\\) use a mesh axis twice: .*'tensor'.*'tensor'"):
        rules.parameter_layout(("heads", "mlp"), (8, 8))
    with use(rules), pytest.raises(UserError, match="twice"):
        spec("batch", "seq", "mlp")
    edited = dataclasses.replace(rules, activations={**rules.activations, "embed": ("data",)})
    with use(edited), pytest.raises(UserError, match="twice"):
        spec("batch", "seq", "embed")


def test_unknown_names_list_the_known_ones(rules_for):
    rules = rules_for(tensor=8)
    with pytest.raises(UserError, match="no logical axis 'hidden'; known: .*embed"):
        rules.parameter_layout(("hidden",), (8,))
    with use(rules), pytest.raises(UserError, match="no logical axis 'hidden'"):
        spec("batch", "hidden")


def test_rules_end_with_their_context(rules_for):
    with pytest.raises(UserError, match="no mesh here"):
        current()
    outer, inner = rules_for(data=8), rules_for(tensor=8)
    with use(outer):
        with use(inner):
            assert current() is inner
        assert current() is outer
        assert jax.sharding.get_abstract_mesh().shape["data"] == 8
    with pytest.raises(UserError):
        current()
