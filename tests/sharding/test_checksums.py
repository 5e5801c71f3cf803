"""Checksums by device: of what lies there, another for every flipped bit, in the order of the mesh's devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtron.sharding.checksums import by_device, checksum, device_rows, inside_region
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import current, use
from tests.support.flips import flipped

DTYPES = (jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_, jnp.float8_e4m3fn)


def local_checksum(array: jax.Array) -> int:
    return int(checksum(jnp.asarray(np.asarray(array))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype: jnp.dtype):
    array = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), dtype)
    sums = [int(jax.jit(checksum)(array))]
    for place in (0, 7, 14):
        for bit in (0,) if dtype == jnp.bool_ else (0, array.dtype.itemsize * 8 - 1):
            sums.append(int(jax.jit(checksum)(jnp.asarray(flipped(np.asarray(array), place, bit)))))
    assert len(set(sums)) == len(sums)
    # places count too, and two signs do not cancel
    assert int(checksum(array[::-1])) not in sums or dtype == jnp.bool_
    both = flipped(flipped(np.asarray(array), 1, 0), 8, 0)
    assert int(checksum(jnp.asarray(both))) != sums[0]


def test_each_device_tells_of_its_own_part(rules_for: Callable):
    with use(rules_for(data=2, fsdp=2, tensor=2)):
        mesh = current().mesh
        names = current().axes("data")
        split = jax.device_put(jnp.arange(24.0).reshape(8, 3), NamedSharding(mesh, P(names)))
        whole = jax.device_put(jnp.arange(5.0), NamedSharding(mesh, P()))
        sums = np.asarray(jax.jit(by_device)({"a": split, "b": whole}))
        rows = list(mesh.devices.flat)
    for shard in split.addressable_shards:
        assert sums[rows.index(shard.device), 0] == local_checksum(shard.data)
    assert len(set(sums[:, 0].tolist())) == 2 and set(sums[:, 1].tolist()) == {local_checksum(whole)}


def test_a_region_tells_in_the_same_order(rules_for: Callable):
    with use(rules_for(data=2, fsdp=2, tensor=2)):
        rules = current()
        spec = P((*rules.manual, *rules.axes("tensor")))
        array = jax.device_put(jnp.arange(16.0), NamedSharding(rules.mesh, spec))

        def both(array):
            inside = region(lambda part: inside_region([part, [part]]), (P(rules.manual),), P(rules.manual))
            return device_rows(inside(array)), by_device([array])

        own, after = jax.jit(both)(array)
        assert own.shape == (8, 2) and len(set(np.asarray(own)[:, 0].tolist())) == 8
    parts = {shard.device: local_checksum(shard.data) for shard in array.addressable_shards}
    assert np.asarray(after)[:, 0].tolist() == [parts[device] for device in rules.mesh.devices.flat]
    # a tree of one array, whatever form it has
    assert np.asarray(own).tolist() == [[parts[device]] * 2 for device in rules.mesh.devices.flat]
