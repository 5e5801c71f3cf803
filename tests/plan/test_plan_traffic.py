"""A plan's communication as flows between devices."""

from unittest.mock import Mock

import pytest

from jaxtron.pictures.traffic import Flow, traffic_matrix
from jaxtron.plan.compiled.communication import CommunicationKey, CommunicationRow
from jaxtron.plan.plan import Plan
from jaxtron.plan.traffic import axis_sizes, flows


def row(kind: str, axes: tuple[str, ...], sent: float) -> CommunicationRow:
    return CommunicationRow(CommunicationKey(kind, axes, (), False), None, 1, 1, 1, 1, sent, 1, 0, 0.0, 0.0)


def plan(mesh: dict[str, int], experts: dict[str, int], *rows: CommunicationRow) -> Plan:
    return Mock(spec=Plan, mesh=mesh, experts=experts, communication=list(rows))


def test_flags_of_both_views_are_axes_of_one_mesh():
    found = plan(
        {"pipe": 2, "data": 4, "fsdp": 1, "context": 1, "tensor": 2},
        {"expert_data": 2, "expert": 4, "expert_tensor": 1},
        row("all_gather", ("data",), 10.0),
        row("all_to_all", ("expert",), 6.0),
        row("ragged_all_to_all", ("expert",), 3.0),
        row("collective_permute", ("pipe",), 4.0),
        row("all_reduce", ("data", "tensor"), 2.0),
        # groups that match no axes, and what leaves no device
        row("all_reduce", ("?",), 1.0),
        row("all_reduce", (), 1.0),
        row("all_reduce", ("tensor",), 0.0),
    )
    assert {axis: size for axis, size in axis_sizes(found).items() if size > 1} == {
        "pipe": 2, "data_0": 2, "data_1": 2, "tensor": 2,
    }  # fmt: skip
    assert flows(found) == [
        Flow(("data_0", "data_1"), 10.0),
        Flow(("data_1", "tensor"), 6.0, "all"),
        Flow(("data_1", "tensor"), 3.0, "all"),
        Flow(("pipe",), 4.0, "neighbours"),
        Flow(("data_0", "data_1", "tensor"), 2.0),
    ]
    matrix = traffic_matrix(axis_sizes(found), flows(found), gpus_per_node=4)
    assert matrix.bytes.sum(1).tolist() == pytest.approx([25.0] * 16)
    # experts' parts are neighbours, so that tokens stay in a node
    assert traffic_matrix(axis_sizes(found), flows(found)[1:2], gpus_per_node=4).network == 0


def test_neighbours_along_an_axis_and_an_order_of_ones_own():
    found = plan(
        {"data": 1, "tensor": 2, "context": 8, "pipe": 1, "fsdp": 1},
        {},
        row("collective_permute", ("context/4",), 8.0),
    )
    assert flows(found) == [Flow(("context",), 8.0, "ring", 4)]
    assert [axis for axis, size in axis_sizes(found).items() if size > 1] == ["tensor", "context"]
    assert traffic_matrix(axis_sizes(found), flows(found), gpus_per_node=4).network == 0
