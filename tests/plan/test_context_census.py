"""What attention over a split sequence sends, compiled for eight H100s: bytes of each method's formula."""

import functools

import pytest

from jaxtron.plan.compiled.bound import step_bound
from jaxtron.plan.compiled.rehearsal import Rehearsal, rehearse
from jaxtron.plan.machine import machine_named
from jaxtron.run.configuration import Configuration

LAYERS, HIDDEN, HEADS, LENGTH, CONTEXT, INNER = 2, 512, 8, 1024, 4, 2
# a device's part of keys, or of values, in elements
PART = LENGTH // CONTEXT * HIDDEN


@functools.cache
def step(method: str, length: int = LENGTH, implementation: str = "auto") -> Rehearsal:
    config = Configuration.model_validate(
        {
            "model": {
                "num_layers": LAYERS,
                "hidden_size": HIDDEN,
                "num_heads": HEADS,
                "vocab_size": 1024,
                "position": "rotary",
                "attention": {"implementation": implementation},
            },
            "data": {"sequence_length": length},
            "train": {"global_batch": 2, "precision": "bf16"},
            "mesh": {"data": 2, "context": CONTEXT},
            "context": {"method": method, **({"inner": INNER} if method == "hierarchical" else {})},
        }
    )
    return rehearse(config, gpu="h100", num_gpus=8, gpus_per_node=8)


def sent(method: str, kind: str) -> int:
    """Bytes that a device sends inside the loop over layers, by all executions of a step."""
    found = [entry for entry in step(method).collectives if entry.kind == kind and entry.names == ("context",)]
    return round(sum(entry.step_sent_bytes for entry in found if entry.loops))


@pytest.mark.slow
def test_a_ring_sends_each_block_on_and_sums_home() -> None:
    # keys and values in bfloat16: all but the last step of the ring, forward and backward
    blocks = 2 * (CONTEXT - 1) * 2 * PART * 2
    # float32 sums of their gradients, from the second step on; home they go in bfloat16
    sums = (CONTEXT - 1) * 2 * PART * 4 + 2 * PART * 2
    assert sent("ring", "collective_permute") == LAYERS * (blocks + sums)


@pytest.mark.slow
def test_a_ring_travels_beside_attention() -> None:
    moves = [entry for entry in step("ring").collectives if entry.kind == "collective_permute" and len(entry.loops) > 1]
    assert moves and all(entry.asynchronous and entry.beside > 0 for entry in moves)


@pytest.mark.parametrize(
    "method",
    ["ring", *(pytest.param(name, marks=pytest.mark.slow) for name in ("all_gather", "all_to_all", "hierarchical"))],
)
def test_the_bound_counts_the_pairs_that_attend(method: str) -> None:
    """Which only the device knows of a block: half of the square, forward and 2.5 times that backward."""
    bound = step_bound(step(method), machine_named("h100"), 1e12)
    pairs = LENGTH * (LENGTH + 1) // 2 // CONTEXT
    assert bound.classes["attention"].flops == pytest.approx(LAYERS * 3.5 * 2 * pairs * 2 * HIDDEN, rel=1e-3)


@pytest.mark.slow
def test_all_gather_gathers_keys_and_values_and_scatters_their_gradients() -> None:
    assert sent("all_gather", "all_gather") == LAYERS * 2 * 2 * (CONTEXT - 1) * PART * 2
    assert sent("all_gather", "reduce_scatter") == LAYERS * 2 * (CONTEXT - 1) * PART * 4


@pytest.mark.slow
def test_all_to_all_moves_all_but_a_devices_own_part() -> None:
    # forward: queries, keys, values and the output in bfloat16, a float32 log-sum-exp a head
    forward = 4 * PART * 2 + PART // (HIDDEN // HEADS) * 4
    # backward: queries, keys, values and the output's gradient, two statistics, and three gradients
    backward = 4 * PART * 2 + 2 * PART // (HIDDEN // HEADS) * 4 + 3 * PART * 2
    assert sent("all_to_all", "all_to_all") == LAYERS * (forward + backward) * (CONTEXT - 1) / CONTEXT
    assert sent("all_to_all", "collective_permute") == 0


@pytest.mark.slow
def test_a_hierarchy_does_both_in_groups() -> None:
    statistics = PART // (HIDDEN // HEADS) * 4
    moved = 8 * PART * 2 + 3 * statistics + 3 * PART * 2
    assert sent("hierarchical", "all_to_all") == LAYERS * moved * (INNER - 1) / INNER
    # a ring of so many groups; a member has a part of the heads of a group's sequence: as much as its own part
    ring = CONTEXT // INNER
    blocks, sums = 2 * (ring - 1) * 2 * PART * 2, (ring - 1) * 2 * PART * 4 + 2 * PART * 2
    assert sent("hierarchical", "collective_permute") == LAYERS * (blocks + sums)


@pytest.mark.slow
def test_memory_of_long_sequences_grows_with_their_length() -> None:
    peaks = [step("ring", length).memory.temporaries for length in (8192, 16384, 32768)]
    # a part of it quadratic in the length would make the last step more than twice
    assert peaks[0] < peaks[1] <= 2 * peaks[0] and peaks[1] < peaks[2] <= 2 * peaks[1]
