"""What XLA makes of products of 8-bit numbers for Hopper GPUs that are not there."""

from collections import Counter
from pathlib import Path

import pytest

from jaxtron.config import UserError, load
from jaxtron.models.work.profile import JAXTRON
from jaxtron.plan.compiled import hlo
from jaxtron.plan.compiled.rehearsal import Rehearsal, rehearse
from jaxtron.plan.formula.activations import row_bytes
from jaxtron.plan.formula.workload import shapes_of, work_of
from jaxtron.plan.machine import machine_named
from jaxtron.run.configuration import Configuration

EIGHT_BITS = ("f8e4m3fn", "f8e5m2")
# one of two layers is compiled: of attention joined projections and those back, of the MLP two
PRODUCTS = 4


def rehearsed(gpu: str = "h100", num_gpus: int = 1, width: int = 512, precision: str = "bf16", **sections) -> Rehearsal:
    model = {"num_layers": 2, "hidden_size": width, "num_heads": 4, "vocab_size": 1000}
    given = {
        "model": model | {"fp8": {"scaling": "current"}} | sections.pop("model", {}),
        "data": {"sequence_length": 256},
        "train": {"global_batch": 8, "precision": precision},
    }
    return rehearse(Configuration(**given, **sections).resolved(), gpu=gpu, num_gpus=num_gpus)


def products(module: hlo.Module) -> Counter[tuple[str, ...]]:
    """Types of the operands of all products."""
    found: Counter[tuple[str, ...]] = Counter()
    for body in module.computations.values():
        table = {one.name: one for one in body}
        for one in body:
            if one.opcode == "dot" or "__cublas$" in one.attributes:
                found[tuple(table[name].results[0].dtype for name in one.operands[:2])] += 1
    return found


# the second is no multiple of 16
@pytest.mark.parametrize("width", [pytest.param(512, marks=pytest.mark.slow), 4 * 31])
def test_hopper_multiplies_8_bits_in_layers_and_wide_numbers_in_the_head(width):
    found = products(rehearsed(width=width).module)
    forward, gradient = EIGHT_BITS
    eight = {types: count for types, count in found.items() if set(types) & set(EIGHT_BITS)}
    assert eight == {
        (forward, forward): PRODUCTS,
        (gradient, forward): PRODUCTS,
        (forward, gradient): PRODUCTS,
    }, found
    # logits and the two gradients of the head
    assert found["bf16", "bf16"] == 3, found


def test_without_the_setting_nothing_is_of_8_bits():
    module = rehearsed(model={"fp8": {"scaling": "none"}}).module
    assert set(products(module)) == {("bf16", "bf16")}
    arrays = {array.dtype for body in module.computations.values() for one in body for array in one.results}
    assert not arrays & set(EIGHT_BITS)


def sent_over(rehearsal: Rehearsal) -> Counter[tuple[str, str]]:
    """Types of what is gathered and reduced."""
    sent: Counter[tuple[str, str]] = Counter()
    for body in rehearsal.module.computations.values():
        for one in body:
            if one.operation in ("all-gather", "reduce-scatter") and not one.is_end:
                # the type of a start has its operands too
                results = one.results[len(one.operands) :] if one.operation != one.opcode else one.results
                sent.update((one.operation, array.dtype) for array in results)
    return sent


def test_layers_are_gathered_over_tensor_as_8_bits():
    sent = sent_over(rehearsed(num_gpus=4, mesh={"tensor": 4}))
    forward, gradient = EIGHT_BITS
    # inputs of attention and of the MLP, again in the backward, and gradients of what the two leave
    assert sent["all-gather", forward] == 4 and sent["all-gather", gradient] == 2, sent
    # the embedding's gradient, and the head's input with its gradient; partial sums are as wide as the step
    assert sent["all-gather", "bf16"] == 3 and sent["reduce-scatter", "bf16"] == 6, sent


@pytest.mark.slow
def test_products_of_blocks_are_our_kernel_alone():
    rehearsal = rehearsed(model={"fp8": {"scaling": "block"}})
    # logits and the two gradients of the head
    assert products(rehearsal.module) == {("bf16", "bf16"): 3}
    instructions = [one for body in rehearsal.module.computations.values() for one in body]
    kernels = [one for one in instructions if one.opcode == "custom-call" and "mosaic.block_product" in one.attributes]
    assert len(kernels) == 3 * PRODUCTS
    assert any("blocks of 8-bit numbers: mosaic" in line for line in rehearsal.session.choices)


@pytest.mark.slow
def test_blocks_are_gathered_over_tensor_as_8_bits_with_their_scales():
    rehearsal = rehearsed(num_gpus=4, mesh={"tensor": 4}, model={"fp8": {"scaling": "block"}})
    sent = sent_over(rehearsal)
    # inputs of attention and of the MLP by rows, again by columns, and gradients of what the two leave by both
    assert sent["all-gather", "f8e4m3fn"] == 8 and sent["all-gather", "f32"] == 8, sent
    assert sent["all-gather", "bf16"] == 3 and sent["reduce-scatter", "bf16"] == 6, sent


def test_gpus_without_such_products_refuse_them():
    with pytest.raises(UserError, match="model.fp8.scaling current: NVIDIA A100.* has no products of 8-bit numbers"):
        rehearsed(gpu="a100")


def test_a_prediction_knows_rate_and_passes():
    path = Path(__file__).parents[2] / "configs" / "gpt_1b.yaml"
    plain, eight = (load(Configuration, path, flags).resolved() for flags in ([], ["--model.fp8.scaling", "current"]))
    sizes = plain.mesh.shape(1)
    layers = [work_of(one, shapes_of(one, sizes, JAXTRON, "NVIDIA H200")).stacks[0].layer for one in (plain, eight)]
    wide, narrow = ([getattr(layer, slot) for slot in ("forward", "backward", "weight")] for layer in layers)
    assert [phase.flops for phase in wide] == [phase.flops for phase in narrow]
    runs = plain.model.num_layers * plain.train.microbatches
    more = runs * sum(there.stream - here.stream for here, there in zip(wide, narrow, strict=True))
    # the compiled step of docs/fp8.md has 59.1 ms more of elementwise kernels and reductions at 85% of 4.8 TB/s
    assert more == pytest.approx(59.1e-3 * 0.85 * 4.8e12, rel=0.1)
    products = {
        gpu: [sum(map(machine_named(gpu).product_seconds, layer.forward.products)) for layer in layers]
        for gpu in ("h200", "a100")
    }
    assert 1.7 < products["h200"][0] / products["h200"][1] < 2
    # what moves are bytes there too
    assert 1 < products["a100"][0] / products["a100"][1] < 1.2


def test_over_tensor_half_the_bytes_are_gathered():
    given = {"data": {"sequence_length": 256}, "train": {"global_batch": 8}, "mesh": {"tensor": 4}}
    model = {"num_layers": 2, "hidden_size": 512, "num_heads": 4, "vocab_size": 1000}
    sent = []
    for scaling in ("none", "current"):
        config = Configuration(model=model | {"fp8": {"scaling": scaling}}, **given).resolved()
        layer = work_of(config, shapes_of(config, config.mesh.shape(4), JAXTRON, "NVIDIA H100")).stacks[0].layer
        phases = (layer.forward, layer.backward, layer.weight)
        found: Counter[str] = Counter()
        for one in (one for phase in phases for one in phase.collectives):
            found[one.kind] += one.size
        sent.append(found)
    assert sent[0]["all_gather"] == 2 * sent[1]["all_gather"] > 0
    assert sent[0]["reduce_scatter"] == sent[1]["reduce_scatter"] > 0


def test_zero_bubble_schedules_keep_8_bits():
    kept = []
    for scaling in ("none", "current"):
        flags = ["--mesh.pipe", "2", "--pipeline.schedule", "zero_bubble", "--train.microbatches", "4"]
        path = Path(__file__).parents[2] / "configs" / "gpt_1b.yaml"
        config = load(Configuration, path, [*flags, "--model.fp8.scaling", scaling]).resolved()
        kept.append(row_bytes(config, 1, 1, "NVIDIA H200", rows=1, expert_tensor=1).kept[0])
    assert kept[1].residuals < 1.01 * kept[0].residuals
    assert 0 < kept[1].deferred < 0.6 * kept[0].deferred, kept
