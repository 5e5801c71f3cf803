"""What one GPU executes in a step of a configuration, from shapes alone, as the model's family says it."""

import math
from dataclasses import replace

from jaxtron.kernels.grouped_matmul.backend import has_kernel
from jaxtron.models.work.model import ModelWork
from jaxtron.models.work.profile import Profile
from jaxtron.models.work.shapes import Shapes
from jaxtron.run.attention import select_attention
from jaxtron.run.configuration import Configuration
from jaxtron.run.dtypes import DTYPES
from jaxtron.sharding.folding import EXPERT_FLAGS


def shapes_of(config: Configuration, sizes: dict[str, int], profile: Profile, kind: str) -> Shapes:
    """The sizes of a configuration on a mesh of these sizes by axis, of GPUs of this kind (`Gpu.device_kind`)."""
    shards, zero = sizes["data"] * sizes["fsdp"], config.sharding.zero
    folded = config.mesh.refined(sizes)
    view = {flag: math.prod(folded.sizes[axis] for axis in folded.flags[flag]) for flag in EXPERT_FLAGS}
    backends = select_attention(config, sizes["context"], kind).values()
    if profile.attention == "plain" and all(backend.name != "materialized" for backend in backends):
        profile = replace(profile, attention="fused")
    return Shapes(
        profile=profile,
        sizes=sizes | view,
        rows=config.train.global_batch // (config.train.microbatches * shards),
        length=config.data.sequence_length,
        gathered=sizes["fsdp"] * (sizes["data"] * sizes["context"] if zero == "parameters" else 1),
        expert_gathered=view["expert_data"] if sizes["fsdp"] > 1 or zero == "parameters" else 1,
        width=4 if config.train.precision == "fp32" else 2,
        grouped_products=has_kernel(DTYPES[config.train.precision], kind),
    )


def work_of(config: Configuration, shapes: Shapes) -> ModelWork:
    """What the configuration's model takes of a device of these shapes; the family is one that says it."""
    work = config.family.work
    assert work is not None, "`plan` refuses families whose work is not known"
    return work(config.model, shapes)
