"""Batch-size ramp: the global batch grows in equal steps over the first samples (Megatron's `rampup_batch_size`)."""

from jaxtron.config import UserError
from jaxtron.optim.config import BatchRampConfig


def batch_size(config: BatchRampConfig | None, global_batch: int, samples_consumed: int) -> int:
    """Return the global batch of the step that begins after `samples_consumed`; None is no ramp."""
    if config is None or samples_consumed >= config.samples:
        return global_batch
    stages = (global_batch - config.start) // config.increment
    return config.start + samples_consumed * stages // config.samples * config.increment


def check_batch_ramp(config: BatchRampConfig | None, global_batch: int, multiple: int) -> tuple[int, ...]:
    """Return every global batch of the run, smallest first.

    Raises UserError where the ramp does not end at `global_batch`, or a size is no multiple of `multiple`,
    what the microbatches and the mesh divide a batch into.
    """
    sizes = (global_batch,)
    if config is not None:
        if config.start >= global_batch:
            raise UserError(
                f"batch ramp starts at {config.start}, which is not below the global batch {global_batch}: "
                "lower the start or drop the ramp"
            )
        if (global_batch - config.start) % config.increment != 0:
            raise UserError(
                f"batch ramp from {config.start} by {config.increment} does not reach the global batch "
                f"{global_batch}: choose an increment that divides {global_batch - config.start}"
            )
        sizes = tuple(range(config.start, global_batch + 1, config.increment))
    for size in sizes:
        if size % multiple != 0:
            raise UserError(
                f"global batch {size} is not a multiple of {multiple}, which the microbatches and the mesh need: "
                "choose sizes that are"
            )
    return sizes
