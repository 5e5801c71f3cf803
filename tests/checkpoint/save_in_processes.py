"""One of two processes that save and restore together: `save_in_processes.py PROCESS PORT DIRECTORY`."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtron.checkpoint import record
from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.manager import Checkpoints

process, port, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)


def sharding(axis: str, *spec: str | None) -> NamedSharding:
    return NamedSharding(jax.make_mesh((8,), (axis,), axis_types=(AxisType.Explicit,)), P(*spec))


def state(step: int) -> dict:
    expected = np.arange(64 * 32, dtype=np.float32).reshape(64, 32) + step
    weight = jax.make_array_from_callback(expected.shape, sharding("data", "data"), lambda index: expected[index])
    small = {"key": jax.random.key(step), "step": jnp.int32(step)}
    return {"weight": weight} | jax.device_put(small, sharding("data"))


def restore(checkpoints: Checkpoints) -> tuple[int, tuple]:
    abstract_state = {
        "weight": jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding("tensor", None, "tensor")),
        "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=sharding("tensor")),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding("tensor")),
    }
    restored = checkpoints.restore(abstract_state)
    assert restored is not None and restored.extra == {"position": restored.step}
    expected = np.arange(64 * 32, dtype=np.float32).reshape(64, 32) + restored.step
    weight = restored.state["weight"]
    assert len(weight.addressable_shards) == 4 and weight.addressable_shards[0].data.shape == (64, 4)
    for shard in weight.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])
    assert np.asarray(restored.state["step"].addressable_shards[0].data) == restored.step
    key = jax.random.key_data(restored.state["key"]).addressable_shards[0].data
    np.testing.assert_array_equal(key, jax.random.key_data(jax.random.key(restored.step)))
    return restored.step, restored.skipped


with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
    checkpoints = Checkpoints(directory, CheckpointConfig(keep=2))
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"position": step})
    assert restore(checkpoints) == (3, ())
    assert checkpoints.steps() == [2, 3]

    # a file whose checksum only the second process verifies
    files = record.read(directory / "step_00000003").files
    assert any(path.startswith("ocdbt.process_1") for path in files)
    multihost_utils.sync_global_devices("checked")
    if process == 0:
        path = directory / "step_00000003" / sorted(files)[1]
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    multihost_utils.sync_global_devices("damaged")
    step, skipped = restore(checkpoints)
    assert step == 2 and len(skipped) == 1 and sorted(files)[1] in skipped[0].reason
    checkpoints.close()
print("done", flush=True)
