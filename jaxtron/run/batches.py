"""From this process's rows to global arrays."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtron.data.batch import BatchField, make_batch, map_batch, row_bytes
from jaxtron.data.loader import LocalBatch
from jaxtron.models.families import program_of
from jaxtron.run.configuration import Configuration
from jaxtron.run.step import batch_sharding


@dataclass(frozen=True)
class BatchSharding:
    """How global batches are laid out on the devices: rows over the batch axes."""

    sharding: NamedSharding

    def local_rows(self, batch_size: int) -> np.ndarray:
        """The sorted rows of a global batch that this process's devices hold."""
        rows = np.arange(batch_size)
        indices = self.sharding.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([rows[index] for index in indices]))

    def globalize(self, batch: LocalBatch) -> Any:
        """The batch as global arrays, each device getting its rows from this process's."""

        def make(_field: BatchField, array: np.ndarray) -> jax.Array:
            def rows(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None, "a batch has rows"
                return array[np.searchsorted(batch.rows, np.arange(batch.size)[index[0]])]

            return jax.make_array_from_callback((batch.size, *array.shape[1:]), self.sharding, rows)

        return map_batch(make, batch.arrays)


def abstract_batch(config: Configuration) -> Any:
    """Shapes, types and shardings of the global batch, inside `sharding.use(rules)`."""
    program = program_of(config.model)
    make = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding())
    lengths = program.lengths(config.model, config.data.sequence_length)
    return make_batch(program.batch, config.train.global_batch, lengths, config.data.optional_fields, make)


def batch_row_bytes(config: Configuration) -> int:
    """Bytes of one row of a batch, as the model's family reads it."""
    program = program_of(config.model)
    lengths = program.lengths(config.model, config.data.sequence_length)
    return row_bytes(program.batch, lengths, config.data.optional_fields)
