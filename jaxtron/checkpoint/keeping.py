"""Which checkpoints a run keeps: the newest, some for good, and the best by validation."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax

from jaxtron.checkpoint import record as records
from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.processes import gather_texts
from jaxtron.checkpoint.record import DamageError
from jaxtron.checkpoint.restore import committed_steps, step_path

# beside a checkpoint's arrays: the loss of its state, where it was measured
LOSS = "validation_loss"
# of each finished checkpoint, by its step: that loss, or None
Losses = Mapping[int, float | None]


def kept_steps(losses: Losses, config: CheckpointConfig) -> set[int]:
    """Those of the steps that stay: the newest `keep`, multiples of `keep_every`, and `keep_best` of least loss.

    The newest is always among them, which a run that stops goes on from. Of equal losses the later step is better.
    """
    kept = set(sorted(losses)[-config.keep :])
    if config.keep_every is not None:
        kept |= {step for step in losses if step % config.keep_every == 0}
    known = [(loss, -step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    return kept | {-step for _, step in sorted(known)[: config.keep_best]}


def losses_of(directory: Path, config: CheckpointConfig) -> dict[int, float | None]:
    """The finished checkpoints of a directory; their losses only where these decide what is kept.

    All processes call this, and get what the first one reads.
    """
    found: dict[int, float | None] = dict.fromkeys(committed_steps(directory))
    if not config.keep_best:
        return found
    if jax.process_index() == 0:
        found = {step: _loss(step_path(directory, step)) for step in found}
    return dict(json.loads(gather_texts(json.dumps(list(found.items())))[0]))


def _loss(path: Path) -> float | None:
    try:
        return records.read(path).extra.get(LOSS)
    except DamageError:
        return None
