"""Times of what is trained in part: what is frozen has no gradients, sums or moments; adapters multiply beside it."""

import dataclasses
import math
from pathlib import Path

import pytest

from jaxtron.config import load
from jaxtron.models.work.profile import JAXTRON
from jaxtron.plan.formula import trained
from jaxtron.plan.formula.pieces import once
from jaxtron.plan.formula.prediction import predict
from jaxtron.plan.formula.trained import model_flops_per_token, trained_work
from jaxtron.plan.formula.workload import shapes_of, work_of
from jaxtron.plan.machine import machine_named
from jaxtron.run.configuration import Configuration
from tests.plan.test_prediction import ONE

SMALL = (
    "--model.num_layers 4 --model.hidden_size 64 --model.num_heads 4 --model.num_kv_heads 2 --model.vocab_size 512 "
    "--model.mlp_size 96 --model.activation swiglu --model.norm rms_norm --model.bias false --model.tied_head false "
    "--model.position rotary --data.sequence_length 32 --train.global_batch 16 "
)
LORA = "--train.lora.rank 2 "


def configuration(flags: str) -> Configuration:
    return load(Configuration, None, flags.split()).resolved()


def works(config: Configuration, **sizes: int):
    """Shapes, the work of training everything and that of what is trained."""
    sizes = ONE | sizes
    shapes = shapes_of(config, sizes, JAXTRON, "NVIDIA A100-SXM4-80GB")
    whole = work_of(config, shapes)
    return shapes, whole, trained_work(config, sizes, shapes, whole)


def flops(work, slot: str) -> float:
    return sum(one.flops for one in getattr(work, slot).products)


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ("", {"tensor": 2}),
        ("--model.pattern *-*E --model.moe.num_experts 4 --mesh.expert 2 --sharding.zero parameters ", {"data": 4}),
        (
            "--model.pattern Mm*- --model.mamba.head_dim 16 --model.mamba.num_groups 2 --mesh.fsdp 2 ",
            {"fsdp": 2, "tensor": 2},
        ),
    ],
)
def test_what_trains_everything_is_what_it_was(flags: str, sizes, monkeypatch: pytest.MonkeyPatch):
    """Counted from the blueprint, which is what counts where some is frozen."""
    config = configuration(SMALL + flags)
    monkeypatch.setattr(trained, "is_all_trained", lambda config: False)
    _, whole, found = works(config, **sizes)
    assert found.head == whole.head and found.outer_parameters == pytest.approx(whole.outer_parameters, rel=0.01)
    for one, other in zip(found.stacks, whole.stacks, strict=True):
        for name in ("parameters", "expert_parameters"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=0.01), name
        assert dataclasses.replace(one, parameters=0, expert_parameters=0) == dataclasses.replace(
            other, parameters=0, expert_parameters=0
        )
    assert model_flops_per_token(config) == config.family.flops_per_token(config.model, 32)


def test_adapters_alone_are_trained():
    config = configuration(SMALL + LORA)
    shapes, whole, found = works(config)
    # query, key, value, output; gate and up, down
    heads = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    numbers = sum(2 * (inputs + outputs) for inputs, outputs in heads)
    (one,), (other,) = found.stacks, whole.stacks
    tokens = shapes.tokens
    assert one.parameters == numbers and found.outer_parameters == 0
    assert flops(one.layer, "weight") == pytest.approx(2 * tokens * numbers)
    for slot in ("forward", "backward"):
        added = flops(one.layer, slot) - flops(other.layer, slot)
        assert added == pytest.approx(2 * tokens * numbers), slot
    # nothing is before the first layer, and the head has no gradient of its table
    assert not one.enter.backward.stream and one.enter.forward == other.enter.forward
    assert flops(found.head, "forward") == pytest.approx(flops(whole.head, "forward") * 2 / 3)
    # a step's FLOPs by the papers are those of its products
    layers = 4 * sum(getattr(one.layer, slot).flops for slot in ("forward", "backward", "weight"))
    assert model_flops_per_token(config) * tokens == pytest.approx(layers + found.head.forward.flops, rel=1e-9)


def test_what_is_reduced_and_updated_is_what_is_trained():
    config = configuration(SMALL + LORA + "--sharding.zero optimizer --mesh.data 4 --mesh.pipe 2 ")
    shapes, _, work = works(config, data=4, pipe=2)
    found = once(config, shapes, work, [2])
    (stack,) = work.stacks
    assert found.parameters == 2 * stack.parameters / 4 and found.tables == ()
    assert [one.size for one in found.reduced] == [4 * 2 * stack.parameters]
    assert [one.size for one in found.gathered] == [2 * 2 * stack.parameters]


def test_over_tensor_what_is_narrow_travels_and_nothing_is_gathered_again():
    config = configuration(SMALL + LORA)
    shapes, whole, work = works(config, tensor=2)
    (one,), (other,) = work.stacks, whole.stacks
    sent = [collective.size for collective in one.layer.forward.collectives]
    narrow = shapes.tokens * 2 * shapes.width
    # queries, keys and values, gate and up together; and what reduces, after attention and the MLP
    assert sorted(sent)[:6] == [narrow] * 5 + [2 * narrow]
    assert sorted(sent)[6:] == sorted(collective.size for collective in other.layer.forward.collectives)
    assert {collective.kind for collective in one.layer.weight.collectives} == {"all_reduce"}
    # each device multiplies its part of either matrix's numbers
    alone = works(config)[2].stacks[0].layer
    assert 2 * flops(one.layer, "weight") == pytest.approx(flops(alone, "weight"))


def test_adapters_run_again_where_their_module_does():
    def added(recompute: str, slot: str) -> float:
        _, whole, work = works(configuration(f"{SMALL}{LORA}--model.recompute {recompute} "))
        return flops(work.stacks[0].layer, slot) - flops(whole.stacks[0].layer, slot)

    once_more = added("none", "forward")
    assert added("none", "backward") == added("selective", "backward") == once_more
    assert added("full", "backward") == added("attention mlp", "backward") == 2 * once_more
    assert once_more < added("[mlp]", "backward") < 2 * once_more


def test_part_of_a_model_has_part_of_its_weight_gradients():
    config = configuration(SMALL + "--train.trainable !*.mlp.* ")
    _, whole, work = works(config)
    attention, mlp = 64 * (64 + 32 + 32 + 64), 3 * 64 * 96
    found = flops(work.stacks[0].layer, "weight") / flops(whole.stacks[0].layer, "weight")
    assert found == pytest.approx(attention / (attention + mlp))
    assert work.head == whole.head and work.stacks[0].enter == whole.stacks[0].enter


def test_a_llama_with_adapters_takes_less_time():
    machine = machine_named("h100")
    plain, adapted = (
        predict(load(Configuration, Path("configs/llama_3_8b.yaml"), list(words)), ONE | {"fsdp": 8}, machine)
        for words in ((), ("--train.lora.rank", "16"))
    )
    # but for attention, whose scores have no weights
    assert 0.67 < adapted.model_flops / plain.model_flops < 0.75
    assert 0.75 < adapted.step_seconds / plain.step_seconds < 0.87
    assert adapted.breakdown.optimizer < 0.05 * plain.breakdown.optimizer
    assert math.isclose(adapted.hfu, adapted.mfu, rel_tol=0.01)
