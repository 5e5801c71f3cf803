"""The census of collectives against programs whose communication is known."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtron.plan.compiled.census import UNKNOWN_AXES, Collective, census
from jaxtron.plan.compiled.deviceless import gpu_devices
from jaxtron.plan.compiled.hlo import replica_groups


def explicit_mesh(devices, **axes: int) -> Mesh:
    return Mesh(
        np.array(devices).reshape(tuple(axes.values())), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes)
    )


def gpu_mesh(**axes: int) -> Mesh:
    return explicit_mesh(gpu_devices("h100", 8), **axes)


def array(mesh: Mesh, shape: tuple[int, ...], spec: P, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def census_of(function, *arguments, mesh: Mesh) -> tuple[Collective, ...]:
    with jax.set_mesh(mesh):
        return census(jax.jit(function).lower(*arguments).compile().as_text(), mesh.shape)


def only(collectives, kind: str) -> Collective:
    (found,) = [collective for collective in collectives if collective.kind == kind]
    return found


def manual(x, flag):
    """All kinds of collectives: three permutations in each of five steps, a branch, and sums after the loop."""

    def permute(c, _):
        return jax.lax.ppermute(c, "data", [(0, 1), (1, 0)]) * 2, None

    def branch(c):
        gathered = jax.lax.all_gather(c, "tensor", axis=0, tiled=True) * 2
        return jax.lax.psum_scatter(gathered, "tensor", scatter_dimension=0, tiled=True)

    def step(c, _):
        c, _ = jax.lax.scan(permute, c, None, length=3)
        c = jax.lax.all_to_all(c.reshape(4, -1, c.shape[-1]), "tensor", 0, 0).reshape(c.shape)
        return jax.lax.cond(flag[0] > 0, branch, lambda c: c, c), None

    c, _ = jax.lax.scan(step, x, None, length=5)
    ring = [(i, (i + 1) % 8) for i in range(8)]
    return jax.lax.psum(c.astype(jnp.float32).sum(), "data"), jax.lax.ppermute(c, ("data", "tensor"), ring)


@pytest.fixture(scope="module")
def manual_census() -> tuple[Collective, ...]:
    mesh = gpu_mesh(pipe=1, data=2, fsdp=1, tensor=4)
    both = P(("data", "tensor"))
    function = jax.shard_map(manual, mesh=mesh, in_specs=(both, P()), out_specs=(P(), both), check_vma=False)
    return census_of(function, array(mesh, (1024, 256), both), array(mesh, (1,), P(), jnp.int32), mesh=mesh)


LOCAL = 128 * 256 * 2


def test_every_collective_is_found_once(manual_census):
    kinds = collections.Counter(collective.kind for collective in manual_census)
    assert kinds == {
        "collective_permute": 2,
        "all_to_all": 1,
        "all_gather": 1,
        "reduce_scatter": 1,
        "all_reduce": 1,
    }


def test_permutes_in_nested_loops(manual_census):
    inner, ring = [collective for collective in manual_census if collective.kind == "collective_permute"]
    assert (inner.axes, inner.loops, inner.executions, inner.bytes) == (("data",), (5, 3), 15, LOCAL)
    assert inner.sent_bytes == LOCAL
    assert inner.step_bytes == 15 * LOCAL
    assert inner.asynchronous
    assert (ring.axes, ring.loops, ring.executions, ring.group_size) == (("data", "tensor"), (), 1, 8)


def test_branches_count_once_and_are_marked(manual_census):
    gather, scatter = only(manual_census, "all_gather"), only(manual_census, "reduce_scatter")
    for collective in (gather, scatter):
        assert collective.axes == ("tensor",)
        assert collective.group_size == 4
        assert collective.shapes == ((512, 256),)
        assert collective.bytes == 4 * LOCAL
        assert collective.sent_bytes == 3 * LOCAL
        assert (collective.loops, collective.conditional) == ((5,), True)


def test_all_to_all_and_all_reduce(manual_census):
    exchange, total = only(manual_census, "all_to_all"), only(manual_census, "all_reduce")
    assert (exchange.axes, exchange.bytes, exchange.sent_bytes) == (("tensor",), LOCAL, LOCAL * 3 / 4)
    assert (exchange.executions, exchange.conditional) == (5, False)
    assert (total.axes, total.bytes, total.sent_bytes, total.dtype) == (("data",), 4, 4, "f32")


def test_source_is_the_line_that_asked_for_it(manual_census):
    exchange = only(manual_census, "all_to_all")
    assert exchange.source.endswith("all_to_all")
    file, line = exchange.location.rsplit(":", 1)
    with open(file, encoding="utf-8") as source:
        assert "all_to_all" in source.readlines()[int(line) - 1]


def layer(x, weights):
    """Megatron's tensor-parallel MLP with sequence parallelism."""
    hidden = jax.sharding.reshard(x, P("data", None, None))
    hidden = jax.nn.gelu(jnp.einsum("bsd,df->bsf", hidden, weights["up"], out_sharding=P("data", None, "tensor")))
    return x + jnp.einsum("bsf,fd->bsd", hidden, weights["down"], out_sharding=P("data", "tensor", None)), None


def loss(weights, x):
    return (jax.lax.scan(layer, x, weights)[0].astype(jnp.float32) ** 2).mean()


def layer_census(mesh: Mesh) -> tuple[Collective, ...]:
    weights = {
        "up": array(mesh, (3, 256, 1024), P(None, None, "tensor")),
        "down": array(mesh, (3, 1024, 256), P(None, "tensor", None)),
    }
    return census_of(
        jax.value_and_grad(loss), weights, array(mesh, (4, 128, 256), P("data", "tensor", None)), mesh=mesh
    )


def test_explicit_tensor_parallel_layer():
    """One all-gather and one reduce-scatter forward and as many backward, in a loop over layers."""
    collectives = layer_census(gpu_mesh(data=2, tensor=4))
    arrays = collections.Counter()
    for collective in collectives:
        if collective.loops and collective.axes == ("tensor",):
            arrays[collective.kind, collective.backward] += collective.operands * collective.executions
            assert collective.bytes == collective.operands * 2 * 128 * 256 * 2
    kinds = ("all_gather", "reduce_scatter")
    assert arrays == {(kind, backward): 3 for kind in kinds for backward in (False, True)}
    gradients = sum(c.step_bytes for c in collectives if c.axes == ("data",) and c.kind == "all_reduce")
    assert gradients == 3 * 2 * 256 * 256 * 2


def test_axes_of_size_one_are_never_named():
    collectives = layer_census(gpu_mesh(pipe=1, data=1, context=1, tensor=8))
    assert {collective.axes for collective in collectives} == {("tensor",)}


def test_cpu_program():
    collectives = layer_census(explicit_mesh(jax.devices()[:8], data=2, tensor=4))
    looped = {(c.kind, c.axes, c.loops) for c in collectives if c.loops}
    assert ("all_gather", ("tensor",), (3,)) in looped
    assert all(not collective.asynchronous for collective in collectives)


def combined(pair):
    return jax.lax.psum(pair, "tensor")


def test_combined_all_reduce_is_one_entry_with_the_sum_of_bytes():
    mesh = gpu_mesh(data=2, tensor=4)
    pair = (array(mesh, (64, 32), P(), jnp.float32), array(mesh, (16,), P(), jnp.float32))
    function = jax.shard_map(combined, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found = census_of(function, pair, mesh=mesh)
    assert sum(collective.bytes for collective in found) == (64 * 32 + 16) * 4
    assert {collective.axes for collective in found} == {("tensor",)}


MESH = {"data": 2, "tensor": 4}


def text_census(*lines: str, before: str = "") -> tuple[Collective, ...]:
    body = "\n".join(f"  {line}" for line in lines)
    text = f"HloModule jit_f, num_partitions=8\n\n{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    return census(text, MESH)


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("tensor",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("[2,4]<=[8]", ("tensor",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[1,8]<=[8]", ("data", "tensor"), 8),
        ("{}", ("data", "tensor"), 8),
        ("[8,1]<=[8]", (), 1),
        ("[4,2]<=[8]", ("tensor/2",), 2),
        ("{{0,2},{1,3},{4,6},{5,7}}", UNKNOWN_AXES, 2),
        ("{{0,1,4,5},{2,3,6,7}}", UNKNOWN_AXES, 4),
        ("{{0,1,2},{3,4,5,6,7}}", UNKNOWN_AXES, 5),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("tensor",), 4),
        ("mesh['pipe'=1,'data'=2,'tensor'=4] {'data','tensor'}", ("data", "tensor"), 8),
        ("mesh['all'=8] {'all':(1)2}", ("data",), 2),
        ("mesh['all'=8] {'all':(2)4}", ("tensor",), 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",), 2),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}", ("tensor",), 4),
    ],
)
def test_replica_groups_in_every_form(groups, axes, size):
    (found,) = text_census(
        f"%x = f32[32]{{0}} all-reduce(%p), replica_groups={groups}, use_global_device_ids=true, to_apply=%a"
    )
    assert (found.axes, found.group_size, found.bytes) == (axes, size, 128)


def test_groups_of_thousands_of_devices():
    assert len(replica_groups("[384,8]<=[3072]", 3072)) == 384
    assert replica_groups("mesh['pipe'=64,'data'=6,'tensor'=8] {'data'}", 3072)[0] == [0, 8, 16, 24, 32, 40]


def test_start_of_a_pair_lists_operands_before_results():
    found = text_census(
        "%g = ((bf16[2,8], bf16[4]{0}), (bf16[8,8]{1,0:T(8,128)}, bf16[16])) all-gather-start(%p, %q), "
        "replica_groups=[2,4]<=[8], dimensions={0}",
        "%gd = (bf16[8,8], bf16[16]) all-gather-done(%g)",
        "%s = ((f32[16,2]), f32[4,2]) reduce-scatter-start(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%a",
        "%r = (f32[4], f32[6]) all-reduce-start(%p, %q), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%a",
        "%c = (f32[5], f32[5], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,4},{1,5}}",
        "%old = (f32[5], f32[20]) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}, "
        'backend_config={"collective_backend_config":{"is_sync":true}}',
    )
    assert [(c.kind, c.shapes, c.bytes, c.asynchronous) for c in found] == [
        ("all_gather", ((8, 8), (16,)), 160, True),
        ("reduce_scatter", ((16, 2),), 128, True),
        ("all_reduce", ((4,), (6,)), 40, True),
        ("collective_permute", ((5,),), 20, True),
        ("all_gather", ((20,),), 80, False),
    ]


def test_what_lost_its_name_is_of_the_kind_of_layers_around_it():
    reduce = "f32[4] all-reduce(%p), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%a"
    named = 'metadata={op_name="jit(step)/while/body/cond/kind=mlp/psum"}'
    other = 'metadata={op_name="jit(step)/while/body/cond/kind=mamba/add"}'
    mlp = f"%mlp (p: f32[4]) -> f32[4] {{\n  %b = {reduce}\n  ROOT %c = {reduce}, {named}\n}}"
    mamba = f"%mamba (p: f32[4]) -> f32[4] {{\n  %d = {reduce}\n  ROOT %e = f32[4] add(%d, %d), {other}\n}}"
    choice = "%out = f32[4] conditional(%is, %p, %p), true_computation=%mlp, false_computation=%mamba"
    found = text_census(f"%first = {reduce}", choice, before=f"{mlp}\n\n{mamba}\n")
    assert sorted((one.layers, one.conditional) for one in found) == [
        ("", False),
        ("mamba", True),
        ("mlp", True),
        ("mlp", True),
    ]


def test_permutes_without_traffic():
    nothing, itself = text_census(
        "%a = f32[5] collective-permute(%p), source_target_pairs={}",
        "%b = f32[5] collective-permute(%p), source_target_pairs={{0,0},{1,1}}",
    )
    assert (nothing.group_size, itself.group_size) == (0, 1)
    for permute in (nothing, itself):
        assert (permute.axes, permute.bytes, permute.sent_bytes) == ((), 20, 0)


CALLED = """
%wrapped (q: f32[8,2]) -> f32[2,2] {
  ROOT %rs = f32[2,2] reduce-scatter(%q), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %start = ((f32[8,2]), f32[2,2], s32[]) async-start(%x), calls=%wrapped
  %done = f32[2,2] async-done(%start), calls=%wrapped
  %call = f32[8] call(%x), to_apply=%inner
}

%inner (q: f32[8]) -> f32[8] {
  %e = (f32[4], f32[4]) all-to-all(%q, %q), replica_groups=[4,2]<=[2,4]T(1,0)
  %w = (s32[], f32[8]) while(%q), condition=%other, body=%deepest
}

%deepest (q: f32[8]) -> f32[8] {
  %r = f32[8] all-reduce(%q), replica_groups={}, metadata={op_name="psum" source_file="a.py" source_line=7}
}

%condition (t: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(6)
  ROOT %less = pred[] fusion(%i, %limit), kind=kLoop, calls=%compared
}

%compared (i: s32[], n: s32[]) -> pred[] {
  ROOT %less.1 = pred[] compare(%i, %n), direction=LT
}

%other (t: (s32[], f32[8])) -> pred[] {
  ROOT %flag = pred[] get-tuple-element(%t), index=0
}
"""


def test_calls_inside_loops_and_trip_counts_without_a_record():
    found = text_census("%w = (s32[], f32[8]) while(%p), condition=%condition, body=%body", before=CALLED)
    assert [(c.kind, c.axes, c.loops, c.executions, c.bytes, c.asynchronous) for c in found] == [
        ("reduce_scatter", ("tensor",), (6,), 6, 64, True),
        ("all_to_all", ("data",), (6,), 6, 32, False),
        ("all_reduce", ("data", "tensor"), (6, None), 6, 32, False),
    ]
    assert (found[2].source, found[2].location) == ("psum", "a.py:7")


def test_mesh_of_another_size_is_refused():
    with pytest.raises(ValueError, match="HLO is for 8 devices, the mesh {'data': 4} has 4"):
        census("HloModule f, num_partitions=8\n\nENTRY %main () -> f32[] {\n}", {"data": 4})


def test_text_that_is_not_hlo_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        census("module @jit_f {}", MESH)
