"""Resumes in a directory and saves as fast as it can until it is killed: `save_in_loop.py DIRECTORY`."""

import sys
from itertools import count
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.manager import Checkpoints


@jax.jit
def state_of(step):
    return {"weight": jnp.full((512, 512), step, jnp.float32), "half": jnp.full((1000,), step % 256, jnp.bfloat16)}


checkpoints = Checkpoints(Path(sys.argv[1]), CheckpointConfig(keep=2))
restored = checkpoints.restore(jax.eval_shape(state_of, 0))
first = restored.step + 1 if restored else 1
for step in count(first):
    checkpoints.save(step, state_of(step), {"position": step})
    print(step, flush=True)
