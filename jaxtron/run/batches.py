"""From this process's rows to global arrays."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtron.data.batch import BatchField, map_batch
from jaxtron.data.loader import LocalBatch


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
