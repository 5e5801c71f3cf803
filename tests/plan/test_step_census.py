"""Collectives of the real train step, compiled for eight H100s: counts and bytes as theory has them."""

import functools
import math

import jax
import pytest

from jaxtron.plan.compiled.census import Collective
from jaxtron.plan.compiled.rehearsal import Rehearsal, rehearse
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.parameters import ParameterSpec

LAYERS, HIDDEN, HEADS, LENGTH, VOCAB, ROWS = 3, 512, 8, 256, 1024, 2
# one transformer layer: query, key, value and output of attention, up and down of the MLP
MATRICES_A_LAYER = 6
# a payload below this is norms, biases and scalars
SMALL = 64 * 1024


@functools.cache
def step(
    zero: str = "optimizer",
    microbatches: int = 1,
    trainable: tuple[str, ...] = ("*",),
    rows: int = ROWS,
    overlap: bool = False,
    **mesh: int,
) -> Rehearsal:
    shards = mesh.get("data", 1) * mesh.get("fsdp", 1)
    config = Configuration.model_validate(
        {
            "model": {
                "num_layers": LAYERS,
                "hidden_size": HIDDEN,
                "num_heads": HEADS,
                "vocab_size": VOCAB,
                "position": "rotary",
                "bias": False,
            },
            "data": {"sequence_length": LENGTH},
            "train": {
                "global_batch": rows * shards * microbatches,
                "microbatches": microbatches,
                "precision": "bf16",
                "trainable": trainable,
            },
            "mesh": {"data": 1, **mesh},
            "sharding": {"zero": zero, "overlap_tensor": overlap},
        }
    )
    return rehearse(config, gpu="h100", num_gpus=math.prod(mesh.values()))


def refined(rehearsal: Rehearsal, **experts: int) -> Rehearsal:
    """The same step on the mesh that experts would have too, which a model without any is refused."""
    config = rehearsal.session.config
    config = config.model_copy(update={"mesh": config.mesh.model_copy(update=experts)})
    return rehearse(config, gpu="h100", num_gpus=math.prod(rehearsal.session.sizes.values()))


def large(rehearsal: Rehearsal, kind: str, axis: str) -> list[Collective]:
    found = [entry for entry in rehearsal.collectives if entry.kind == kind and entry.axes == (axis,)]
    return [entry for entry in found if entry.bytes >= SMALL]


def arrays(entries: list[Collective]) -> int:
    """Arrays communicated in a step; XLA may join several in one operation."""
    return sum(entry.operands * entry.executions for entry in entries)


def matrices(rehearsal: Rehearsal) -> list[ParameterSpec]:
    specs = jax.tree.leaves(rehearsal.session.blueprint.parameters)
    return [spec for spec in specs if len(spec.shape) > 2 or spec.shape == (VOCAB, HIDDEN)]


def matrix_elements(rehearsal: Rehearsal) -> int:
    return sum(spec.size for spec in matrices(rehearsal))


def padded_elements(rehearsal: Rehearsal) -> int:
    """Of matrices, with what makes their parts even."""
    return sum(math.prod(spec.layout.padded) for spec in matrices(rehearsal))


def total_bytes(entries: list[Collective]) -> int:
    return sum(entry.bytes * entry.executions for entry in entries)


@pytest.mark.slow
def test_frozen_matrices_are_gathered_where_they_are_used_and_nothing_else() -> None:
    rehearsal = step("optimizer", trainable=("*norm*",), data=4, fsdp=2)
    over_data = [entry for entry in rehearsal.collectives if "data" in entry.names]
    assert over_data and not [entry for entry in over_data if entry.bytes >= SMALL]
    gathers, scatters = large(rehearsal, "all_gather", "fsdp"), large(rehearsal, "reduce_scatter", "fsdp")
    assert not scatters and not large(rehearsal, "all_reduce", "fsdp")
    # in 16 bits, as they lie: of layers forward and backward
    assert arrays([entry for entry in gathers if entry.loops and not entry.backward]) == MATRICES_A_LAYER * LAYERS
    memory = rehearsal.memory_use
    assert memory.program == rehearsal.memory.peak and memory.weights == 0
    assert memory.frozen == 2 * matrix_elements(rehearsal) // 2
    assert memory.optimizer == 2 * memory.master_weights + 4 * 3 and memory.gradients == memory.master_weights


@pytest.mark.parametrize(
    ("rows", "overlap"),
    [(ROWS, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (ROWS, True), (1, True)))],
    ids=["rows", "one row", "halves of rows", "halves of positions"],
)
def test_tensor_parallelism_costs_what_megatron_says(rows: int, overlap: bool) -> None:
    """2 all-gathers and 2 reduce-scatters a layer forward, 4 and 2 backward (2205.05198 sec. 4.2.2): twice as many of
    halves, and the same bytes."""
    rehearsal, each = step(tensor=8, rows=rows, overlap=overlap), 2 if overlap else 1
    gathers, scatters = large(rehearsal, "all_gather", "tensor"), large(rehearsal, "reduce_scatter", "tensor")
    in_layers = [entry for entry in gathers if entry.loops]
    assert arrays([entry for entry in in_layers if not entry.backward]) == 2 * LAYERS * each
    assert arrays([entry for entry in in_layers if entry.backward]) == 4 * LAYERS * each
    in_layers = [entry for entry in scatters if entry.loops]
    assert arrays([entry for entry in in_layers if not entry.backward]) == 2 * LAYERS * each
    assert arrays([entry for entry in in_layers if entry.backward]) == 2 * LAYERS * each
    # outside: the head gathers its input and scatters its gradient, the embedding the other way around
    assert arrays([entry for entry in gathers if not entry.loops]) == 2
    assert arrays([entry for entry in scatters if not entry.loops]) == 2
    activation = rows * LENGTH * HIDDEN * 2
    assert total_bytes(gathers) == (6 * LAYERS + 2) * activation
    assert total_bytes(scatters) == (4 * LAYERS + 2) * activation
    assert not large(rehearsal, "all_reduce", "tensor")
    assert {entry.axes for entry in rehearsal.collectives} == {("tensor",)}


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_data_parallel_gradients_are_reduced_once_a_step(microbatches: int) -> None:
    """ZeRO none: one float32 all-reduce of every gradient, outside all loops, whatever the number of microbatches."""
    rehearsal = step(zero="none", microbatches=microbatches, data=8)
    assert {(entry.kind, entry.axes, entry.loops) for entry in rehearsal.collectives} == {("all_reduce", ("data",), ())}
    # and two float32 scalars: the loss, and the count of tokens
    assert total_bytes(list(rehearsal.collectives)) == 4 * rehearsal.session.blueprint.num_parameters + 8


def test_zero_optimizer_scatters_gradients_and_gathers_weights_once() -> None:
    """Float32 gradients reduce-scattered, bfloat16 weights gathered: 4 and 2 bytes an element, once (1910.02054)."""
    rehearsal = step(zero="optimizer", microbatches=4, data=8)
    assert all(not entry.loops for entry in rehearsal.collectives)
    assert total_bytes(large(rehearsal, "reduce_scatter", "data")) == 4 * matrix_elements(rehearsal)
    assert total_bytes(large(rehearsal, "all_gather", "data")) == 2 * matrix_elements(rehearsal)
    assert not large(rehearsal, "all_reduce", "data")


@pytest.mark.slow
def test_an_uneven_number_of_replicas_sends_the_padding_and_nothing_else() -> None:
    """6 divides no dimension of 512 channels: they are 516, gathered and scattered once like even ones."""
    rehearsal = step(zero="optimizer", microbatches=4, data=6)
    elements = padded_elements(rehearsal)
    assert elements * 512 == matrix_elements(rehearsal) * 516
    assert all(not entry.loops for entry in rehearsal.collectives)
    assert total_bytes(large(rehearsal, "reduce_scatter", "data")) == 4 * elements
    assert total_bytes(large(rehearsal, "all_gather", "data")) == 2 * elements
    assert not large(rehearsal, "all_reduce", "data")


@pytest.mark.slow
def test_devices_of_a_sequence_share_the_state_too() -> None:
    """Of the context's 4 and the data's 2: gradients go to the part that each keeps, weights come back, once."""
    rehearsal = step(zero="optimizer", microbatches=2, data=2, context=4)
    once = [entry for entry in rehearsal.collectives if not entry.loops and entry.bytes >= SMALL]
    scattered = [entry for entry in once if entry.kind == "reduce_scatter"]
    gathered = [entry for entry in once if entry.kind == "all_gather"]
    assert {entry.axes for entry in (*scattered, *gathered)} == {("data", "context")}
    assert total_bytes(scattered) == 4 * matrix_elements(rehearsal)
    assert total_bytes(gathered) == 2 * matrix_elements(rehearsal)
    assert not [entry for entry in once if entry.kind == "all_reduce"]


def test_weights_that_fsdp_splits_are_gathered_over_data_in_the_steps_precision() -> None:
    rehearsal = step("optimizer", data=2, fsdp=4)
    gathers, scatters = large(rehearsal, "all_gather", "data"), large(rehearsal, "reduce_scatter", "data")
    assert {entry.dtype for entry in gathers} == {"bf16"} and {entry.dtype for entry in scatters} == {"f32"}
    assert not any(entry.loops for entry in (*gathers, *scatters))
    held = matrix_elements(rehearsal) // 4
    assert (total_bytes(gathers), total_bytes(scatters)) == (2 * held, 4 * held)


@pytest.mark.parametrize("axis", ["fsdp", pytest.param("data", marks=pytest.mark.slow)])
def test_sharded_weights_are_gathered_by_layer_forward_and_backward(axis: str) -> None:
    """ZeRO-3: each matrix gathered twice and its gradient scattered once, for each microbatch; 2 and 4 bytes each."""
    microbatches = 2
    rehearsal = step(zero="parameters", microbatches=microbatches, **{axis: 8})
    gathers, scatters = large(rehearsal, "all_gather", axis), large(rehearsal, "reduce_scatter", axis)
    layers = MATRICES_A_LAYER * LAYERS
    # the tied table is gathered once for the embedding and the head; its gradients are reduced apart, the head's when
    # the forward ends and the embedding's when the backward does
    assert arrays(gathers) == (2 * layers + 1) * microbatches
    assert arrays(scatters) == (layers + 2) * microbatches
    table = VOCAB * HIDDEN
    matrices = matrix_elements(rehearsal) - table
    assert total_bytes(gathers) == 2 * (2 * matrices + table) * microbatches
    assert total_bytes(scatters) == 4 * (matrices + 2 * table) * microbatches
    assert not large(rehearsal, "all_reduce", axis)


def test_state_is_divided_by_the_axes_that_shard_it() -> None:
    """Master weights and both moments, 12 bytes an element, over 8 GPUs with ZeRO and whole without."""
    whole, divided = step(zero="none", microbatches=4, data=8), step(zero="optimizer", microbatches=4, data=8)
    saved = whole.memory.arguments - divided.memory.arguments
    assert saved == pytest.approx(12 * matrix_elements(whole) * 7 / 8, rel=1e-3)


@pytest.mark.slow
def test_a_refined_mesh_communicates_as_the_plain_one_and_is_shown_by_flags() -> None:
    plain = step(data=2, tensor=4)
    other = refined(plain, expert=4, expert_tensor=2)
    assert "tensor_1" in other.session.mesh.axis_names and other.session.sizes == plain.session.sizes
    assert other.collectives == plain.collectives
    assert (other.layout, other.memory) == (plain.layout, plain.memory)
