"""The first thing to change when a step does not fit."""

from jaxtron.config import UserError
from jaxtron.plan.memory_use import MemoryUse
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.folding import refine

# Tokens of a sequence that a device has at least where a search splits it over mesh.context: as many as Llama 3 had of
# its longest, 16 parts of 131,072 (2407.21783, Table 4). The configuration's own number of parts is always tried.
LEAST_PART = 8192
# GPUs that NVLink joins in most machines
MOST_TENSOR = 8


def first_change(config: Configuration, sizes: dict[str, int], memory: MemoryUse) -> str:
    """One setting that shrinks the largest class of a GPU's memory, in words with the flag."""
    state = memory.master_weights + memory.optimizer + memory.frozen + memory.gradients + memory.weights
    kept, rest = memory.activations + memory.messages, memory.temporaries
    if state >= max(kept, rest):
        return _smaller_state(config, sizes)
    return _smaller_activations(config, sizes) if kept >= rest else _smaller_microbatch(config, sizes)


def _smaller_state(config: Configuration, sizes: dict[str, int]) -> str:
    why = "weights, gradients and optimizer take most"
    if config.sharding.zero != "none" and (parts := _more_experts(config, sizes)):
        return f"--mesh.expert {parts} ({why}, and devices have copies of the same experts)"
    sharing = [axis for axis in ("data", "context") if sizes[axis] > 1]
    if sharing and config.sharding.zero != "parameters":
        level = "optimizer" if config.sharding.zero == "none" else "parameters"
        axes = " x ".join(f"mesh.{axis} {sizes[axis]}" for axis in sharing)
        return f"--sharding.zero {level} ({why}, and {axes} can share them)"
    if sizes["tensor"] < MOST_TENSOR and _fits(config, {**sizes, "tensor": 2 * sizes["tensor"]}):
        return f"--mesh.tensor {2 * sizes['tensor']} ({why})"
    return f"more of mesh.pipe or mesh.fsdp, on more GPUs ({why})"


def _more_experts(config: Configuration, sizes: dict[str, int]) -> int | None:
    """Twice the parts of experts, where there are experts and devices for it."""
    experts, parts = config.family.experts(config.model), 2 * config.mesh.expert
    if experts is None or experts.count[1] % parts:
        return None
    try:
        refine(sizes, parts, config.mesh.expert_tensor, config.mesh.order)
    except UserError:
        return None
    return parts


def _smaller_activations(config: Configuration, sizes: dict[str, int]) -> str:
    levels = config.family.recompute(config.model)
    own = getattr(config.model, "recompute", None)
    if levels and own == levels[0]:
        return f"--model.recompute {levels[1]} (activations take most)"
    if _rows(config, sizes) > 1:
        return _smaller_microbatch(config, sizes)
    if levels and own != levels[-1]:
        return f"--model.recompute {levels[-1]} (activations take most, and a microbatch is one row already)"
    why = "activations take most, although all is computed again" if levels else "activations take most"
    parts = 2 * sizes["context"]
    if config.data.sequence_length >= parts * LEAST_PART and _fits(config, {**sizes, "context": parts}):
        return f"--mesh.context {parts}, on more GPUs ({why})"
    return f"more of mesh.tensor or mesh.pipe ({why})"


def _smaller_microbatch(config: Configuration, sizes: dict[str, int]) -> str:
    if _rows(config, sizes) > 1:
        return f"--train.microbatches {2 * config.train.microbatches} (a microbatch has more than one row)"
    return "more of mesh.tensor (what one layer needs for one row takes most)"


def _fits(config: Configuration, sizes: dict[str, int]) -> bool:
    """Whether sequences and layers split over a mesh of these sizes by flag."""
    try:
        config.context.check(sizes, config.data.sequence_length)
        config.family.check(config.model, sizes, config.data.sequence_length, config.context)
    except UserError:
        return False
    return True


def _rows(config: Configuration, sizes: dict[str, int]) -> int:
    return config.train.global_batch // config.train.microbatches // (sizes["data"] * sizes["fsdp"])
