"""A schedule's timeline as columns of numbers, small enough for a page."""

import base64
from typing import Any

import numpy as np

from jaxtron.pipeline.schedules.figures import Slot, times, walk
from jaxtron.pipeline.schedules.schedule import Schedule
from jaxtron.plan.formula.prediction import Prediction

SLOTS: tuple[Slot, ...] = ("forward", "backward", "weight")
# eight bytes each; more make the file too large to mail and the picture too full to read
MOST_SPANS = 300_000


def timeline_data(schedule: Schedule, prediction: Prediction) -> dict[str, Any]:
    """Every slot of a step with its seconds, stage by stage in the order of their starts.

    Columns are base64 of little-endian numbers: `starts` (float32 seconds), `codes` (uint16: the slot's number times
    chunks, plus the chunk) and `microbatches` (uint16, or uint32 where they are more). `offsets` says where each stage
    begins. A slot lasts as long as `seconds` says for its kind and virtual stage. Of a step with more than `MOST_SPANS`
    those that start first are kept, and `until` tells up to when all are there. `after` is what comes when the stages
    are through.
    """
    walked, durations = walk(schedule), prediction.slot_seconds
    begun, _ = times(walked, durations)
    starts = np.array(begun)
    stages = np.array(walked.stages)
    slots = np.array([SLOTS.index(slot) for slot in walked.slots])
    chunks = np.array([work.chunk for work in walked.works])
    microbatches = np.array([work.microbatch for work in walked.works])
    lengths = np.array([durations[slot][virtual] for slot, virtual in zip(walked.slots, walked.virtuals, strict=True)])
    end = float((starts + lengths).max())
    busy = np.bincount(stages, lengths, schedule.num_stages)
    kept = np.arange(starts.size)
    until = None
    if starts.size > MOST_SPANS:
        by_start = np.argsort(starts, kind="stable")
        kept, until = by_start[:MOST_SPANS], float(starts[by_start[MOST_SPANS]])
    order = kept[np.lexsort((starts[kept], stages[kept]))]
    offsets = np.searchsorted(stages[order], np.arange(schedule.num_stages + 1))
    parts = prediction.breakdown
    few = schedule.num_microbatches <= np.iinfo(np.uint16).max
    return {
        "name": schedule.name,
        "stages": schedule.num_stages,
        "chunks": schedule.num_chunks,
        "num_microbatches": schedule.num_microbatches,
        "slots": list(SLOTS),
        "virtual": [
            [schedule.virtual(stage, chunk) for chunk in range(schedule.num_chunks)]
            for stage in range(schedule.num_stages)
        ],
        "seconds": {slot: list(map(float, durations[slot])) for slot in durations},
        "starts": _packed(starts[order], "<f4"),
        "codes": _packed(slots[order] * schedule.num_chunks + chunks[order], "<u2"),
        "microbatches": _packed(microbatches[order], "<u2" if few else "<u4"),
        "offsets": offsets.tolist(),
        "spans": int(starts.size),
        "until": until,
        "end": end,
        "busy": busy.tolist(),
        "after": [[name, length] for name, length in (("gradients", parts.data), ("optimizer", parts.optimizer))],
    }


def _packed(numbers: np.ndarray, kind: str) -> str:
    return base64.b64encode(numbers.astype(kind).tobytes()).decode()
