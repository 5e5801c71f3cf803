"""One of two processes on two hosts that copy a state in memory: `copy_in_processes.py PROCESS PORT DIRECTORY`.

A host is a directory of its own here. The second one is lost, with all that is in its memory.
"""

import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.tiers.copies import Copies
from jaxtron.sharding.config import MeshConfig, ShardingConfig
from jaxtron.sharding.mesh import build_mesh
from jaxtron.sharding.rules import make_rules, use

process, port, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
memory = directory / f"host{process}"
config = CheckpointConfig(memory_every=1, memory_directory=str(memory))
rules = make_rules(build_mesh(MeshConfig(data=2, fsdp=4), jax.devices()), ShardingConfig())


def values(step: int) -> dict[str, np.ndarray]:
    return {
        "all": np.arange(64 * 32, dtype=np.float32).reshape(64, 32) + step,
        "half": np.arange(16, dtype=np.int32) * step,
        "same": np.full((5,), step, np.float32),
    }


def placed(step: int) -> dict[str, jax.Array]:
    data, fsdp = rules.axes("data"), rules.axes("fsdp")
    specs = {"all": P((*data, *fsdp)), "half": P(data), "same": P()}
    return {
        name: jax.make_array_from_callback(value.shape, NamedSharding(rules.mesh, specs[name]), value.__getitem__)
        for name, value in values(step).items()
    }


def check(copies: Copies, step: int) -> None:
    found = copies.restore(newer_than=0)
    assert found is not None and (found.step, found.extra) == (step, {"position": step}), found
    for name, value in values(step).items():
        for shard in found.state[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index])


with use(rules):
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), placed(0)
    )
    copies = Copies(config, directory, rules.mesh, abstract)
    for step in (1, 2, 3):
        copies.save(step, placed(step), {"position": step})
    copies.close()
    # what this host has of the other one as well
    assert len(list(memory.rglob("step_00000003.part_*"))) == 2
    multihost_utils.sync_global_devices("copied")
    if process == 1:
        shutil.rmtree(memory)
    multihost_utils.sync_global_devices("lost")
    copies = Copies(config, directory, rules.mesh, abstract)
    check(copies, 3)
    # it is there again; but now a part is damaged wherever it is
    multihost_utils.sync_global_devices("back")
    for path in memory.rglob("step_00000003.part_00001"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    multihost_utils.sync_global_devices("damaged")
    check(copies, 2)
    copies.close(remove=True)
    assert not list(memory.rglob("*.part_*"))
print("done", flush=True)
