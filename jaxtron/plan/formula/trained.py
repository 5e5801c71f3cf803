"""The work of a model of which some parameters are frozen, or that has adapters: no weight gradients, sums or moments
of what is frozen, and what adapters multiply beside it."""

import math
from collections.abc import Iterable
from dataclasses import replace

from jaxtron.models.work.adapters import AdapterShapes, adapter, head_partly_trained, partly_trained
from jaxtron.models.work.model import ModelWork
from jaxtron.models.work.operations import NOTHING, SlotWork
from jaxtron.models.work.shapes import Shapes, gathered_weights
from jaxtron.plan.formula.parameters import Parameter, abstract_rules, traced
from jaxtron.run.configuration import Configuration
from jaxtron.run.trainable import ALL
from jaxtron.sharding.rules import Rules

A, B = ".lora.a", ".lora.b"


def is_all_trained(config: Configuration) -> bool:
    """Whether nothing is frozen, and nothing beside the model."""
    return config.train.lora is None and config.train.trainable == ALL


def trained_work(config: Configuration, sizes: dict[str, int], shapes: Shapes, work: ModelWork) -> ModelWork:
    """What is left of a model's work on a mesh of these sizes; its parameters are then those that are trained."""
    if is_all_trained(config):
        return work
    rules = abstract_rules(config.mesh.model_copy(update=sizes), config.sharding)
    found = traced(config).parameters
    outer = [one for one in found if one.stack is None]
    stacks = []
    for number, stack in enumerate(work.stacks):
        own = [one for one in found if one.stack == number]
        adapters, held = _adapters(config, own, rules, shapes, stack.recomputed)
        stacks.append(
            replace(
                stack,
                layer=partly_trained(stack.layer, _share(config, own)) + adapters + gathered_weights(shapes, held),
                parameters=_numbers(own, rules, of_experts=False),
                expert_parameters=_numbers(own, rules, of_experts=True),
            )
        )
    tables = [one for one in outer if one.role == "embedding"]
    stacks[0] = replace(stacks[0], enter=_entering(config, outer, rules, shapes, stacks[0].enter))
    return replace(
        work,
        stacks=tuple(stacks),
        head=head_partly_trained(work.head, _share(config, tables)),
        outer_parameters=_numbers(outer, rules, of_experts=False),
    )


def model_flops_per_token(config: Configuration) -> float:
    """FLOPs of one token's forward and backward of what is trained, as the papers count them."""
    if is_all_trained(config):
        return config.family.flops_per_token(config.model, config.data.sequence_length)
    return traced(config).flops_per_token


def _entering(config: Configuration, outer: list[Parameter], rules: Rules, shapes: Shapes, work: SlotWork) -> SlotWork:
    """What makes the first stack's stream, layers that lead it among it, whose forward always runs again."""
    if not any(_is_trained(one) and one.role in ("embedding", "position", "kernel", "adapter") for one in outer):
        # nothing is before it that wants a gradient
        return replace(work, backward=NOTHING, weight=NOTHING)
    leading = [one for one in outer if one.role not in ("embedding", "position")]
    adapters, held = _adapters(config, leading, rules, shapes, frozenset({"layer"}))
    return partly_trained(work, _share(config, leading)) + adapters + gathered_weights(shapes, held)


def _adapters(
    config: Configuration, own: list[Parameter], rules: Rules, shapes: Shapes, recomputed: frozenset[str]
) -> tuple[SlotWork, float]:
    """Those of a layer, and a device's numbers of them."""
    named, lora = {one.name: one for one in own if one.role == "adapter"}, config.train.lora
    found, held = SlotWork(), 0.0
    for name, a in named.items():
        if not name.endswith(A):
            continue
        b = named[name.removesuffix(A) + B]
        pairs = a.shape[a.axes.index("gate")] if "gate" in b.axes[: b.axes.index("rank")] else 1
        narrow = a.shape[-1] * pairs
        parts = [math.prod(one.part(rules)) // narrow for one in (a, b)]
        wide = [math.prod(one.shape) // narrow for one in (a, b)]
        layer = AdapterShapes(
            inputs=parts[0],
            outputs=parts[1],
            rank=a.shape[-1],
            split="inputs" if parts[0] < wide[0] else "outputs" if parts[1] < wide[1] else None,
            pairs=pairs,
            dropout=lora is not None and lora.dropout > 0,
        )
        found += adapter(shapes, layer, again=bool({"layer", *name.split(".")} & recomputed))
        held += narrow * sum(parts)
    return found, held


def _share(config: Configuration, own: Iterable[Parameter]) -> float:
    """The part of the numbers in products, without adapters, that is trained."""
    weights = {True: 0.0, False: 0.0}
    for one in own:
        if one.role != "adapter":
            passes = config.family.passes(config.model, one.name, one.role, one.axes)
            weights[_is_trained(one)] += passes * math.prod(one.shape)
    total = sum(weights.values())
    return weights[True] / total if total else 1.0


def _numbers(own: Iterable[Parameter], rules: Rules, *, of_experts: bool) -> float:
    """A device's numbers of those that are trained, experts or others."""
    mine = (one for one in own if _is_trained(one) and ("expert" in one.axes) == of_experts)
    return float(sum(math.prod(one.part(rules)) for one in mine))


def _is_trained(one: Parameter) -> bool:
    return one.status == "trained"
