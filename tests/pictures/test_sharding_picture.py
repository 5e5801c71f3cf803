"""Blocks of arrays on meshes as pictures show them."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from matplotlib import pyplot
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex

from jaxtron import pictures
from jaxtron.config import UserError
from jaxtron.pictures.blocks import array_blocks
from jaxtron.pictures.grid import MOST_APART, device_grid
from jaxtron.pictures.picture import COLORS, colors, numbers_text

SMALL = {"data": 2, "fsdp": 2, "tensor": 2}
SPECS = [
    (),
    (None, "tensor"),
    ("tensor", None),
    (("fsdp", "data"), "tensor"),
    (("data", "fsdp"), None),
    (("tensor", "data", "fsdp"),),
]


@pytest.mark.parametrize("spec", SPECS)
def test_devices_hold_what_jax_gives_them(spec):
    """On a mesh whose devices are not in the order of their numbers."""
    devices = np.array(jax.devices())[[3, 1, 0, 2, 7, 6, 4, 5]].reshape(2, 2, 2)
    mesh = Mesh(devices, tuple(SMALL))
    found = array_blocks((16, 8), PartitionSpec(*spec), mesh)
    theirs = NamedSharding(mesh, PartitionSpec(*spec)).devices_indices_map((16, 8))
    ours = {device: found.slices(block) for block, held in found.devices.items() for device in held}
    assert {device.id: tuple(part.indices(size)[:2] for part, size in zip(index, (16, 8), strict=True))
            for device, index in theirs.items()} == {
        device: tuple((part.start, part.stop) for part in parts) for device, parts in ours.items()
    }  # fmt: skip
    assert found.replicas * len(found.devices) == 8 and found.padding == 0


def test_blocks_of_three_thousand_devices():
    found = array_blocks((128, 25_600, 102_400), ("pipe", "data", "tensor"), {"pipe": 64, "data": 6, "tensor": 8})
    assert found.parts == (64, 6, 8) and found.part == (2, 4267, 12_800) and found.replicas == 1
    assert found.padding == 2 * 128 * 102_400
    assert found.devices[3, 2, 1] == (3 * 48 + 2 * 8 + 1,)
    assert sorted(itertools.chain(*found.devices.values())) == list(range(3072))
    # the last part has what is left of the array
    assert found.slices((63, 5, 7))[1] == slice(21_335, 25_600)


def test_a_scalar_and_a_part_that_is_padding_alone():
    assert array_blocks((), (), SMALL).devices == {(): tuple(range(8))}
    found = array_blocks((3,), (("data", "fsdp", "tensor"),), SMALL)
    assert found.padding == 5 and found.slices((7,)) == (slice(3, 3),)


def drawn(picture: pictures.Picture) -> list[list[str]]:
    """Colours of the cells of each collection in a picture."""
    axes = [own for part in picture.subfigs for own in part.axes] or picture.axes
    found = [own for box in axes for own in box.collections if isinstance(own, PolyCollection)]
    return [[to_hex(color) for color in own.get_facecolors()] for own in found]


def test_replicas_have_one_color_and_blocks_another():
    array, mesh = drawn(pictures.sharding((4, 4), ("fsdp", "tensor"), SMALL, title="weight"))
    assert array == list(COLORS[:4])
    # devices 0 to 7: those that differ along data alone are alike
    assert mesh == [*COLORS[:4], *COLORS[:4]]


def test_stacked_parameters_are_planes_by_stage():
    picture = pictures.sharding(
        (8, 4, 4), ("pipe", None, "tensor"), {"pipe": 4, "tensor": 2}, dims=("layers", "in", "out")
    )
    *planes, mesh = drawn(picture)
    assert [len(plane) for plane in planes] == [2] * 4 and len(mesh) == 8
    assert list(itertools.chain(*planes)) == mesh
    titles = [axes.get_title() for axes in picture.subfigs[0].axes]
    assert titles == ["layers 0:2", "layers 2:4", "layers 4:6", "layers 6:8"]
    # of many the last is there, and how many are not is said
    picture = pictures.sharding((64, 4, 4), ("pipe",), {"pipe": 64})
    titles = [axes.get_title() for axes in picture.subfigs[0].axes]
    assert len(titles) == 6 and titles[-1] == "[63:64]  (58 not drawn)"


def test_padding_is_marked():
    def hatched(picture: pictures.Picture) -> int:
        return sum(bool(patch.get_hatch()) for axes in picture.subfigs[0].axes for patch in axes.patches)

    assert not hatched(pictures.sharding((8, 8), ("data", "tensor"), SMALL))
    assert hatched(pictures.sharding((7, 9), ("data", "tensor"), SMALL)) == 2


def test_a_mesh_without_devices_will_do():
    mesh = AbstractMesh((2, 2, 2), tuple(SMALL))
    assert array_blocks((8, 8), ("data",), mesh) == array_blocks((8, 8), ("data",), SMALL)


def test_a_mesh_of_some_devices_has_their_numbers():
    """Not the first ones, and not in order (jax-ml/jax#16193, where the last core alone is not drawn)."""
    devices = np.array(jax.devices())[[7, 5]]
    mesh = Mesh(devices, ("data",))
    picture = pictures.sharding((4, 4), PartitionSpec("data"), mesh)
    texts = [text.get_text() for part in picture.subfigs for axes in part.axes for text in axes.texts]
    assert texts == ["7", "5", "7", "5"]


def test_the_type_of_a_traced_array_will_do():
    """Shapes and specs are all that is looked at, so a tracer is drawn as an array is (jax-ml/jax#23936), of any size
    (google-deepmind/treescope#70)."""
    drawn_as = []

    @jax.jit
    def look(x):
        kind = jax.typeof(x)
        drawn_as.append(array_blocks(x.shape, kind.sharding.spec, kind.sharding.mesh))
        return x

    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    x = jax.ShapeDtypeStruct((2**20, 2**14), "float32", sharding=NamedSharding(mesh, PartitionSpec("b", "a")))
    look.lower(x)
    assert drawn_as == [array_blocks(x.shape, ("b", "a"), {"a": 2, "b": 4})]


def test_several_axes_on_one_dimension_cut_it_together():
    """Five rows over eight devices are one each, however many axes these are (pytorch/pytorch#160835)."""
    flat = array_blocks((5, 1), ("a",), {"a": 8})
    folded = array_blocks((5, 1), (("a", "b"),), {"a": 2, "b": 4})
    assert flat.devices == folded.devices and flat.part == folded.part == (1, 1)


def test_axes_of_one_part_are_not_named():
    assert array_blocks((8,), (("pipe", "data", "fsdp"),), {"pipe": 1, "data": 2, "fsdp": 1}).axes == (("data",),)


def test_pyplot_keeps_no_picture():
    """One that it keeps is shown twice and never goes away."""
    pictures.sharding((4, 4), ("data",), SMALL).png()
    assert pyplot.get_fignums() == []


def test_a_picture_shows_and_saves_itself(tmp_path):
    picture = pictures.sharding((4, 4), ("data",), SMALL)
    assert picture._repr_png_().startswith(b"\x89PNG")
    for name in ("a.png", "a.svg", "a.pdf"):
        assert picture.save(tmp_path / name).stat().st_size > 1000
    assert "<text" in (tmp_path / "a.svg").read_text()
    with pytest.raises(UserError, match="a.gif.*png, svg, or pdf"):
        picture.save(tmp_path / "a.gif")
    with pytest.raises(UserError, match="cannot write"):
        picture.save(tmp_path / "nowhere" / "a.png")


def test_cells_of_a_mesh_do_not_overlap():
    for sizes in ({"data": 1}, SMALL, {"data": 3072}, {"pipe": 64, "data": 6, "tensor": 8}, {"data": 7}, {"a": 97}):
        grid = device_grid(sizes)
        cells = np.stack([grid.left, grid.top], -1)
        assert len(np.unique(cells, axis=0)) == len(cells)
        if 1 < len(cells) <= MOST_APART:
            apart = np.abs(cells[:, None] - cells).max(-1)
            assert apart[~np.eye(len(cells), dtype=bool)].min() >= 1


def test_colors_and_numbers():
    assert len(set(colors(3072))) > 200 and len(set(colors(8))) == 8
    assert numbers_text([3, 1, 2, 7]) == "1-3, 7"
    assert numbers_text([0, 8, 16, 24, 32], 14) == "0, 8, .. 32"
    assert numbers_text(range(0, 3072, 8), 12) == "384 devices"
    assert numbers_text(range(0, 3072, 8), 3) == ""


@pytest.mark.parametrize(
    "shape, spec, mesh, line",
    [
        ((4, 4), ("tensors",), SMALL, "did you mean 'tensor'"),
        ((4, 4), ("rows",), SMALL, "it has data, fsdp, tensor"),
        ((4, 4), ("data", "data"), SMALL, "'data' twice"),
        ((4, 4), (("data", "data"),), SMALL, "'data' twice"),
        ((4,), (None, "data"), SMALL, "2 entries, and the array 1 dim"),
        ((4, 4), "data", SMALL, "an entry for each dimension"),
        ((4, 4), (PartitionSpec.UNCONSTRAINED,), SMALL, "says no layout"),
        ((4, 4), (3,), SMALL, "says no layout"),
        ((4, 0), ("data",), SMALL, "sizes above 0"),
        ((4, 2.5), ("data",), SMALL, "sizes above 0"),
        ((4, True), ("data",), SMALL, "sizes above 0"),
        ((4, 4), ("data",), {"data": 0}, "axis 'data' has size 0"),
        ((4, 4), (), {}, "a mesh is a JAX mesh"),
        ((4, 4), (), 8, "a mesh is a JAX mesh"),
        ((4, 4), (), {"data": 1_000_000}, "too large to draw"),
    ],
)
def test_what_is_no_layout_is_one_line(shape, spec, mesh, line):
    with pytest.raises(UserError, match=line) as caught:
        pictures.sharding(shape, spec, mesh)
    assert "\n" not in str(caught.value)
