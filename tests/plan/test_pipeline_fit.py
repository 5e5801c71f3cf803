"""The papers' large models on their papers' layouts fit the GPUs that they ran on; compiled, not run.

The largest is in test_step_bounds.py.
"""

from pathlib import Path

import pytest

from jaxtron.config import load
from jaxtron.plan.compiled.rehearsal import rehearse
from jaxtron.run.configuration import Configuration

CONFIGS = Path(__file__).parents[2] / "configs"
# bytes of an A100 or H100; the compiler is told of an H100
GPU_BYTES = 80e9


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_gpus"), [("gpt_22b", 8), ("gpt_175b", 64), ("gpt_530b", 280)])
def test_a_step_fits_80_gb_with_its_optimizer_state(name: str, num_gpus: int) -> None:
    rehearsal = rehearse(load(Configuration, CONFIGS / f"{name}.yaml"), gpu="h100", num_gpus=num_gpus)
    assert rehearsal.memory.peak < GPU_BYTES
