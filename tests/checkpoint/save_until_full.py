"""Saves to a place where files may not grow, as a full disk or a quota: prints what is raised and what is left."""

import resource
import sys
from pathlib import Path

import jax.numpy as jnp

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.config import UserError

directory = Path(sys.argv[1])
checkpoints = Checkpoints(directory, CheckpointConfig())
state = {f"array_{number}": jnp.ones((50, 50)) for number in range(30)}
checkpoints.save(1, state, {})
checkpoints.wait()
# a file of some kilobytes is the most: arrays do not fit
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
for step in (2, 3):
    try:
        checkpoints.save(step, state, {})
        checkpoints.wait()
    except UserError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.close()
print(sorted(path.name for path in directory.iterdir()))
