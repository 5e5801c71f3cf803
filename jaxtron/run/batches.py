"""From this process's rows to global arrays."""

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtron.data.loader import LocalBatch
from jaxtron.run.step import Batch


@dataclass(frozen=True)
class Placement:
    """How global batches lie on the devices: rows over the batch axes."""

    sharding: NamedSharding

    def local_rows(self, batch_size: int) -> np.ndarray:
        """The sorted rows of a global batch that this process's devices hold."""
        rows = np.arange(batch_size)
        indices = self.sharding.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([rows[index] for index in indices]))

    def globalize(self, batch: LocalBatch) -> Batch:
        """The batch as global arrays, each device getting its rows from this process's."""
        return Batch(
            tokens=self._globalize(batch, batch.tokens),
            targets=self._globalize(batch, batch.targets),
            weights=self._globalize(batch, batch.weights),
            positions=None if batch.positions is None else self._globalize(batch, batch.positions),
            segments=None if batch.segments is None else self._globalize(batch, batch.segments),
        )

    def _globalize(self, batch: LocalBatch, array: np.ndarray) -> jax.Array:
        def rows(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "a batch has rows"
            return array[np.searchsorted(batch.rows, np.arange(batch.size)[index[0]])]

        return jax.make_array_from_callback((batch.size, *array.shape[1:]), self.sharding, rows)
