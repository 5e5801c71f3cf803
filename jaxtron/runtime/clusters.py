"""What the launcher of a cluster says of its processes: the one file that uses JAX's private modules."""

import os
from collections.abc import Sequence
from typing import NamedTuple

# JAX asks the launchers itself inside of `initialize`, and gives no other way to learn what they say before
from jax._src import clusters


class Cluster(NamedTuple):
    """Where process 0 is, how many processes there are, which this one is, which devices it has; None where unknown."""

    coordinator: str | None
    num_processes: int | None
    process: int | None
    local_devices: Sequence[int] | None


def detect_cluster(connect_seconds: int) -> Cluster:
    """What Slurm, Open MPI or Kubernetes tell of this process; a name is looked up for so many seconds."""
    return Cluster(
        *clusters.ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, connect_seconds
        )
    )
