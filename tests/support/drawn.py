"""Tokens of an engine, as sequences come and go."""

import numpy as np

from jaxtron.generate.engine import ChosenToken, GenerationEngine
from jaxtron.generate.settings import SamplingSettings


def made(
    engine: GenerationEngine, prompts: list[np.ndarray], settings: list[SamplingSettings], count: int
) -> list[list[ChosenToken]]:
    """So many tokens after each prompt, as rows become free."""
    waiting, rows, found = list(range(len(prompts))), {}, [[] for _ in prompts]
    while waiting or rows:
        for row in engine.free:
            if waiting:
                rows[row] = waiting.pop(0)
                engine.begin(row, prompts[rows[row]], settings[rows[row]])
        for one in engine.step():
            found[rows[one.row]].append(one)
            if len(found[rows[one.row]]) == count:
                engine.end(one.row)
                del rows[one.row]
    return found
