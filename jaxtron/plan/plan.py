"""A plan: all that is known of a step before it runs, from its compiled program and the model of time."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax

from jaxtron.models.work.profile import JAXTRON, Profile
from jaxtron.pipeline.lowering import lower
from jaxtron.pipeline.tick_loops import message_counts
from jaxtron.plan.compiled import flops
from jaxtron.plan.compiled.bound import Bound, step_bound
from jaxtron.plan.compiled.communication import CommunicationRow, communication_rows, compiled_overlap, is_further
from jaxtron.plan.compiled.diagnostics import Diagnostic, diagnostics
from jaxtron.plan.compiled.rehearsal import Rehearsal
from jaxtron.plan.formula.prediction import Prediction, predict
from jaxtron.plan.formula.workload import shapes_of, work_of
from jaxtron.plan.hint import first_change
from jaxtron.plan.machine import Machine
from jaxtron.plan.memory_use import MemoryUse
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.folding import EXPERT_FLAGS
from jaxtron.words import plural

# of the file that --json writes: 2 has `communication`, `diagnostics` and `hint`, 3 frozen weights, 4 `bound`
FORMAT = 4


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it runs. Bytes, FLOPs and seconds are those of one GPU and one step.

    `experts` is the experts' view of the mesh, empty where there are none. `compiled_flops` are those of the products
    in the program, where no schedule chooses among them; `padding` is the part of the model's FLOPs that
    rows of the vocabulary take which are no tokens; `further` are communications of rounds of experts that run only
    where choices are uneven, and that nothing here counts.
    """

    title: str
    mesh: dict[str, int]
    experts: dict[str, int]
    gpu: str
    num_gpus: int
    gpus_per_node: int
    schedule: str
    jax_version: str
    rehearsal_seconds: float
    parameters: int
    trained: int
    memory: MemoryUse
    communication: list[CommunicationRow]
    messages: tuple[int, int]
    prediction: Prediction
    bound: Bound
    compiled_flops: int | None
    attention: tuple[str, ...]
    choices: tuple[str, ...]
    padding: float
    diagnostics: list[Diagnostic]
    further: int
    hint: str | None

    def json(self) -> dict[str, Any]:
        """Plain data, read again by `plan/compare.py`."""
        plain = dataclasses.asdict(self)
        memory = {**plain["memory"], "total": self.memory.total, "fits": self.memory.fits}
        return {"format": FORMAT, **plain, "memory": memory}


def profile_of(rehearsal: Rehearsal, machine: Machine) -> Profile:
    """How the compiled step runs, for the model of time: what it hides is what its schedule hides."""
    return dataclasses.replace(JAXTRON, overlap=compiled_overlap(rehearsal, machine))


def make_plan(rehearsal: Rehearsal, machine: Machine, title: str) -> Plan:
    """Everything at once, from one compiled step and the constants of a machine."""
    config, sizes = rehearsal.session.config, rehearsal.session.sizes
    profile = profile_of(rehearsal, machine)
    train, tokens = config.train, config.data.sequence_length
    rows = train.global_batch // train.microbatches // (sizes["data"] * sizes["fsdp"])
    name = f"{config.pipeline.schedule}, " if sizes["pipe"] > 1 else ""
    memory, rules = rehearsal.memory_use, rehearsal.session.rules
    shapes = shapes_of(config, sizes, profile, rehearsal.gpu.device_kind)
    prediction = predict(config, sizes, machine, gpus_per_node=rehearsal.gpus_per_node, profile=profile)
    bound = step_bound(rehearsal, machine, prediction.model_flops)
    has_experts = config.family.experts(config.model) is not None
    return Plan(
        title=title,
        mesh=sizes,
        experts={flag: rules.parts(flag) for flag in EXPERT_FLAGS} if has_experts else {},
        gpu=rehearsal.gpu.name,
        num_gpus=rehearsal.session.mesh.size,
        gpus_per_node=rehearsal.gpus_per_node,
        schedule=f"{name}{plural(train.microbatches, 'microbatch')} of {rows:,} x {tokens:,} tokens",
        jax_version=jax.__version__,
        rehearsal_seconds=rehearsal.seconds,
        parameters=rehearsal.session.blueprint.num_parameters,
        trained=rehearsal.session.blueprint.num_trained,
        memory=memory,
        communication=communication_rows(rehearsal, machine),
        messages=message_counts(lower(config.schedule(sizes["pipe"]), config.stage_plan(sizes["pipe"]).stack_chunks)),
        prediction=prediction,
        bound=bound,
        compiled_flops=_executed(rehearsal),
        attention=rehearsal.attention,
        choices=rehearsal.choices,
        padding=_padding(config),
        diagnostics=diagnostics(rehearsal, work_of(config, shapes).exchanged, bound.copies),
        further=sum(map(is_further, rehearsal.collectives)),
        hint=None if memory.fits else first_change(config, sizes, memory),
    )


def _executed(rehearsal: Rehearsal) -> int | None:
    """FLOPs of the compiled program's products; None where they depend on a stage's table or on data."""
    stages = rehearsal.session.trainer.stages
    if stages.num_virtual > 1:
        return None
    try:
        return flops.work(rehearsal.module, shares=flops.kind_shares(stages)).most
    except ValueError:
        return None


def _padding(config: Configuration) -> float:
    family, model = config.family, config.model
    return family.padding_flops(model) / family.flops_per_token(model, config.data.sequence_length)
