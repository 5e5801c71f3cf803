"""Which layers lie where, there and back."""

import itertools

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.layer_slots import arrange, restore
from jaxtron.pipeline.partition import Partition, StagePlan, forward_only, stage_plan
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.pipeline.schedules.schedule import Work

PARTITIONS = [
    Partition((3,)),
    Partition((2, 2, 2), 3),
    Partition((1, 3, 2), 3),
    Partition((2, 1, 1, 2), 2),
    Partition((2, 1, 1, 2), 2, "v_shape"),
    Partition((0, 3, 2, 0, 1, 1), 2),
    Partition((1, 0, 4, 2, 2, 1, 0, 3), 4, "v_shape"),
]


def even(num_layers: int, num_stages: int, num_chunks: int = 1, **settings) -> Partition:
    name = "1f1b" if num_chunks == 1 else "interleaved"
    table = make_schedule(name, num_stages, 2 * num_stages, num_chunks)
    return stage_plan((num_layers,), table, PipelineConfig(**settings)).partitions[0]


def test_rows_by_hand():
    assert Partition((3,)).slot_layers == (0, 1, 2)
    # round and round: stage 0 has the parts 0 and 2; each part has as many rows as the longest
    assert Partition((2, 1, 1, 2), 2).slot_layers == (0, 1, 3, -1, 2, -1, 4, 5)
    # there and back: stage 0 has the first and the last
    assert Partition((2, 1, 1, 2), 2, "v_shape").slot_layers == (0, 1, 4, 5, 2, -1, 3, -1)


@pytest.mark.parametrize("stages", PARTITIONS, ids=str)
def test_rows_have_every_layer_once_where_the_schedule_looks_for_it(stages: Partition):
    assert sorted(row for row in stages.slot_layers if row >= 0) == list(range(stages.num_layers))
    by_place = np.asarray(stages.slot_layers).reshape(stages.num_stages, stages.num_chunks, stages.slots_per_chunk)
    table = forward_only(StagePlan((stages,)))
    order = []
    for virtual, length in enumerate(stages.lengths):
        stage, chunk = table.place(virtual)
        here = by_place[stage, chunk].tolist()
        # the layers first, then the empty rows
        assert here[length:] == [-1] * (stages.slots_per_chunk - length)
        assert stages.chunk_lengths[stage][chunk] == length
        order += here[:length]
    assert order == list(range(stages.num_layers))


@pytest.mark.parametrize("stages", PARTITIONS, ids=str)
def test_arranging_and_restoring(stages: Partition):
    layers = 1 + np.arange(2 * stages.num_layers, dtype=np.float32).reshape(-1, 2)
    rows = np.asarray(arrange(stages, layers))
    assert rows.shape == (len(stages.slot_layers), 2)
    for row, number in zip(rows, stages.slot_layers, strict=True):
        np.testing.assert_array_equal(row, layers[number] if number >= 0 else np.zeros(2))
    np.testing.assert_array_equal(restore(stages, rows), layers)
    assert stages.is_in_order == (rows.shape == layers.shape and bool((rows == layers).all()))


def test_layers_are_shared_out_evenly():
    for num_stages, num_chunks in itertools.product((1, 2, 3, 4, 8), (1, 2, 3)):
        if num_stages == 1 < num_chunks:
            continue
        parts = num_stages * num_chunks
        for num_layers in range(parts, 3 * parts + 1):
            lengths = even(num_layers, num_stages, num_chunks).lengths
            assert (len(lengths), sum(lengths)) == (parts, num_layers)
            assert max(lengths) - min(lengths) <= 1
    # more in the middle: the ends have the embedding and the loss
    assert even(10, 4).lengths == (2, 3, 3, 2)


@pytest.mark.parametrize("weights", [(0, 0), (1, 2), (0.5, 0.5), (0, 3), (2.5, 0), (9, 0)])
def test_the_largest_work_is_the_least_there_can_be(weights):
    first, last = weights
    for num_stages, num_layers in ((2, 5), (3, 7), (4, 9)):
        found = even(num_layers, num_stages, embedding_weight=first, loss_weight=last).lengths

        def work(lengths, first=first, last=last) -> float:
            return max(first + lengths[0], *lengths[1:-1], last + lengths[-1])

        every = itertools.product(range(num_layers + 1), repeat=num_stages)
        assert work(found) == min(work(lengths) for lengths in every if sum(lengths) == num_layers)


def test_lengths_as_set():
    assert even(6, 2, 2, stage_layers=(1, 2, 3, 0)).lengths == (1, 2, 3, 0)
    for lengths in ((3, 3), (1, 2, 3, 1), (4, 4, -1, -1)):
        with pytest.raises(
            UserError, match=r"must be 4 numbers \(mesh.pipe 2 x pipeline.chunks 2\) that add up to .*6"
        ):
            even(6, 2, 2, stage_layers=lengths)
    with pytest.raises(UserError, match="the model has 3 layers, too few for mesh.pipe 2 x pipeline.chunks 2 = 4"):
        even(3, 2, 2)


@pytest.mark.parametrize("stages", PARTITIONS, ids=str)
def test_evaluation_runs_one_virtual_stage_after_the_other(stages: Partition):
    table = forward_only(StagePlan((stages,)))
    works = [
        (stage, entry.forward) for row in table.table for stage, entry in enumerate(row) if entry.forward is not None
    ]
    places = [table.place(virtual) for virtual in range(len(stages.lengths))]
    assert works == [(stage, Work(chunk, 0)) for stage, chunk in places]
    assert all(entry.backward is entry.weight is None for row in table.table for entry in row)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("stages", PARTITIONS, ids=str)
def test_microbatches_of_an_evaluation_fill_the_stages(stages: Partition, count: int):
    table = forward_only(StagePlan((stages,)), count)
    ticks = {}
    for tick, row in enumerate(table.table):
        for stage, entry in enumerate(row):
            assert entry.backward is entry.weight is None
            if entry.forward is not None:
                key = table.virtual(stage, entry.forward.chunk), entry.forward.microbatch
                assert key not in ticks
                ticks[key] = tick
    num_virtual = len(stages.lengths)
    assert ticks.keys() == set(itertools.product(range(num_virtual), range(count)))
    assert all(ticks[virtual - 1, index] < tick for (virtual, index), tick in ticks.items() if virtual)
    # the first one and the last pass all stages; between them no stage that has work is idle for long
    assert table.num_ticks <= stages.num_chunks * count + 2 * num_virtual
    if stages.num_chunks == 1:
        assert table.num_ticks == count + num_virtual - 1
