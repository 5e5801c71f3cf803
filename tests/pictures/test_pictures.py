"""Pictures of memory, time, traffic and meshes: that they show the sums they are given."""

import math

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from jaxtron import pictures
from jaxtron.config import UserError
from jaxtron.pictures.mesh import groups, link_of
from jaxtron.pictures.traffic import Flow, traffic_matrix
from jaxtron.pipeline.schedules.figures import figures
from jaxtron.pipeline.schedules.named import make_schedule

GIB = 2**30
SMALL = {"data": 2, "fsdp": 2, "tensor": 2}
LARGE = {"pipe": 64, "data": 6, "tensor": 8}


def test_memory_falls_to_its_sum():
    own = {"weights": 10 * GIB, "optimizer": 20 * GIB, "nothing": 0, "activations": 45 * GIB}
    picture = pictures.memory(own, 80 * GIB, title="a model")
    (axes,) = picture.axes
    bars = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches[:4]]
    assert bars == [(0, 10), (10, 30), (30, 75), (0, 75)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["weights", "optimizer", "activations", "in all"]
    assert axes.get_title() == "a model: 75 GiB of 80 GiB, it fits"
    (axes,) = pictures.memory(own, 70 * GIB).axes
    assert axes.get_title() == "75 GiB of 70 GiB, 5 GiB too much"


def test_memories_compared():
    several = {"fsdp": {"weights": GIB, "optimizer": 2 * GIB}, "data": {"weights": 8 * GIB, "batch": GIB}}
    (axes,) = pictures.memory(several, 8 * GIB).axes
    assert axes.get_title() == "9 GiB of 8 GiB, 1 of 2 do not fit"
    ends = [patch.get_x() + patch.get_width() for patch in axes.patches if patch.get_width()]
    assert 3 in ends and 9 in ends
    # kinds keep the order that they are given in, one without bytes has its place where another has some
    picture = pictures.memory({"a": {"weights": 0, "optimizer": GIB, "nothing": 0}, "b": {"weights": GIB}})
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["weights", "optimizer"]


def bars(picture: pictures.Picture) -> np.ndarray:
    """Left and right end and stage of each bar of a timeline."""
    (own,) = (own for own in picture.axes[0].collections if isinstance(own, PolyCollection))
    corners = np.array([path.vertices[:4] for path in own.get_paths()])
    return np.stack([corners[:, 0, 0], corners[:, 1, 0], corners[:, :, 1].mean(1).round()], -1)


@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("interleaved", 2), ("zero_bubble_v", 2)])
def test_a_timeline_has_every_slot_for_as_long_as_it_takes(name, chunks):
    schedule = make_schedule(name, 4, 8, chunks)
    seconds = {"forward": [0.1] * 4 * chunks, "backward": [0.2] * 4 * chunks, "weight": [0.1] * 4 * chunks}
    picture = pictures.timeline(schedule, seconds, after={"optimizer": 0.5})
    found = bars(picture)
    kinds = 3 if schedule.split else 2
    assert len(found) == 4 * chunks * 8 * kinds
    each = 0.4 if schedule.split else 0.3
    for stage in range(4):
        own = found[found[:, 2] == stage]
        assert (own[:, 1] - own[:, 0]).sum() == pytest.approx(each * chunks * 8)
        own = own[own[:, 0].argsort()]
        assert (own[1:, 0] >= own[:-1, 1] - 1e-9).all(), "a stage does one thing at a time"
    assert picture.axes[0].get_xlim() == pytest.approx((0, found[:, 1].max() + 0.5))
    # without seconds in forwards of a stage, as the figures count
    assert bars(pictures.timeline(schedule))[:, 1].max() == pytest.approx(figures(schedule).makespan)


def test_a_window_of_a_long_timeline():
    schedule = make_schedule("1f1b", 64, 256)
    found = bars(pictures.timeline(schedule, window=(0, 20)))
    assert found[:, 0].max() < 20 and len(found) == sum(20 - stage for stage in range(20))


def test_traffic_sums_to_what_each_sends():
    flows = [
        Flow(("tensor",), 8.0),
        Flow(("data", "fsdp"), 6.0, "all"),
        Flow(("data",), 4.0, "neighbours"),
        Flow((), 99.0),
    ]
    found = traffic_matrix(SMALL, flows, gpus_per_node=2)
    assert found.bytes.sum(1).tolist() == [18.0] * 8 and found.bytes.sum(0).tolist() == [18.0] * 8
    assert np.trace(found.bytes) == 0
    # all to three others, each a third; two neighbours that are one get both halves
    assert found.bytes[0].tolist() == [0, 8, 2, 0, 2 + 4, 0, 2, 0]
    assert found.nvlink == 8 * 8 and found.network == 8 * 10
    assert found.inside[0].tolist() == [True, True, *[False] * 6]


def test_rings_over_nodes_share_the_network():
    found = traffic_matrix({"fsdp": 8}, [Flow(("fsdp",), 12.0)], gpus_per_node=4)
    # three of four steps of a ring are inside a node, and each device is once the one that leaves it
    outside = np.where(found.inside, 0, found.bytes)
    assert outside.sum(1).tolist() == outside.sum(0).tolist() == [3.0] * 8
    assert found.bytes.sum(1).tolist() == found.bytes.sum(0).tolist() == [12.0] * 8
    assert found.bytes[0, 1] == 9 and found.bytes[3, 0] == 9 and found.bytes[3, 4] == 3


def test_traffic_of_many_devices_is_by_node():
    flows = [Flow(("tensor",), 5.0), Flow(("pipe",), 2.0, "neighbours"), Flow(("data",), 1.0)]
    found = traffic_matrix(LARGE, flows)
    assert found.devices == 8 and len(found.bytes) == 384
    assert found.bytes.sum() == pytest.approx(3072 * 8) and np.trace(found.bytes) == pytest.approx(3072 * 5)
    assert found.network == pytest.approx(3072 * 3)
    coarse = traffic_matrix(LARGE, flows, most_rows=100)
    assert len(coarse.bytes) == 96 and coarse.bytes.sum() == pytest.approx(found.bytes.sum())
    assert (coarse.nvlink, coarse.network) == (found.nvlink, found.network)


def test_neighbours_along_an_axis_are_groups():
    found = traffic_matrix({"context": 8}, [Flow(("context",), 1.0, "ring", 4)], gpus_per_node=4)
    assert found.network == 0 and found.bytes[3, 0] == 1


def test_the_picture_of_traffic_tells_both_links_apart():
    picture = pictures.traffic(SMALL, [Flow(("tensor",), GIB), Flow(("data",), 2 * GIB)], gpus_per_node=4)
    names = [axes.get_xlabel() for axes in picture.axes[1:]]
    assert names == ["a step, over NVLink", "a step, over network"]
    assert "sends 1 GiB over NVLink, 2 GiB over the network" in picture.axes[0].get_title()
    assert len(pictures.traffic(SMALL, []).axes) == 1


def test_a_mesh_on_nodes():
    assert groups(SMALL, "fsdp").tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert [link_of(SMALL, axis, 4) for axis in SMALL] == ["network", "NVLink", "NVLink"]
    picture = pictures.mesh(LARGE, device=100)
    assert [axes.get_title() for axes in picture.axes] == [
        "pipe 64, over 64 nodes: network",
        "data 6, over 6 nodes: network",
        "tensor 8, inside a node: NVLink",
    ]
    assert picture.axes[2].get_xlabel() == "with device 100: 96-103"
    cells = picture.axes[0].collections[1].get_paths()
    assert len(cells) == math.prod(LARGE.values())


@pytest.mark.parametrize(
    "draw, line",
    [
        (lambda: pictures.memory({}), "bytes by what they are for"),
        (lambda: pictures.memory({"weights": -1}), "weights is -1"),
        (lambda: pictures.memory({"weights": math.nan}), "weights is nan"),
        (lambda: pictures.memory({"weights": "2 GiB"}), "weights is '2 GiB'"),
        (lambda: pictures.memory({"weights": 1}, 0), "capacity is 0"),
        (lambda: pictures.memory({"weights": 1, "a plan": {"weights": 1}}), "give one of them"),
        (lambda: pictures.timeline(make_schedule("1f1b", 2, 4), {"forward": [1.0]}), "2 virtual stages"),
        (lambda: pictures.timeline(make_schedule("1f1b", 2, 4), window=(99, 100)), "shows nothing"),
        (lambda: pictures.timeline(make_schedule("1f1b", 2, 4), window=(3, 2)), "shows nothing"),
        (lambda: pictures.traffic(SMALL, [Flow(("rows",), 1.0)]), "along 'rows', and the mesh has"),
        (lambda: pictures.traffic(SMALL, [Flow(("data",), -1.0)]), "-1.0 bytes"),
        (lambda: pictures.traffic(SMALL, [Flow(("data",), 1.0, "ring", 3)]), "does not divide the 2 devices"),
        (lambda: pictures.traffic(SMALL, [], gpus_per_node=0), "gpus_per_node is 0"),
        (lambda: pictures.mesh(SMALL, device=8), "it has 0 to 7"),
        (lambda: pictures.mesh(SMALL, gpus_per_node=-8), "gpus_per_node is -8"),
        (lambda: pictures.mesh({"data": 2.5}), "axis 'data' has size 2.5"),
    ],
)
def test_bad_input_is_one_line(draw, line):
    with pytest.raises(UserError, match=line) as caught:
        draw()
    assert "\n" not in str(caught.value)
