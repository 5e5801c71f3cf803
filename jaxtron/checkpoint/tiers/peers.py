"""Parts of a state on another host too: sent from device to device, the way that gradients go, and fetched back."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxtron.checkpoint.names import name_of, plain
from jaxtron.checkpoint.processes import gather_texts
from jaxtron.checkpoint.tiers.part_file import TEMPORARY, Pieces
from jaxtron.checkpoint.tiers.pieces import on_host, piece_name
from jaxtron.sharding.shift import shifted
from jaxtron.typing import PyTree

# of a file that is fetched
CHUNK_BYTES = 2**24


def keepers(places: Sequence[str]) -> tuple[int, ...] | None:
    """For each process, which one keeps its part beside its own: one of the next place; None where there is one place.

    `places` are those of the processes, such as their hosts. Where these have as many processes each, a part goes to
    the same position of the next one, else to the next process.
    """
    members = {place: [process for process, own in enumerate(places) if own == place] for place in places}
    if len(members) == 1:
        return None
    if len({len(group) for group in members.values()}) > 1:
        return tuple((process + 1) % len(places) for process in range(len(places)))
    groups = list(members.values())
    following = {
        process: groups[(number + 1) % len(groups)][position]
        for number, group in enumerate(groups)
        for position, process in enumerate(group)
    }
    return tuple(following[process] for process in range(len(places)))


class Peers:
    """Sends each process's devices' parts to those of its keeper; every process calls it at the same steps."""

    def __init__(self, mesh: Mesh, to: Sequence[int]) -> None:
        rows = list(mesh.devices.flat)
        by_process: dict[int, list[int]] = {}
        for row, device in enumerate(rows):
            by_process.setdefault(device.process_index, []).append(row)
        self._pairs = tuple(
            (row, target)
            for process, own in sorted(by_process.items())
            for row, target in zip(own, by_process[to[process]], strict=True)
        )
        self._source = {rows[target]: rows[row] for row, target in self._pairs}
        self.of = list(to).index(jax.process_index())

    def receive(self, state: PyTree) -> Pieces:
        """The pieces of the process whose part this one keeps, on the host; one array after the other is sent."""
        found: dict[str, np.ndarray] = {}
        for path, leaf in jax.tree.leaves_with_path(state):
            leaf = plain(leaf)
            indices = leaf.sharding.devices_indices_map(leaf.shape)
            for shard in shifted(leaf, self._pairs).addressable_shards:
                name = piece_name(name_of(path), indices[self._source[shard.device]], leaf.shape)
                if name not in found:
                    found[name] = on_host(shard.data)[0]
        return found


def fetch(path: Path, holder: int, wanted_by: int) -> None:
    """Have one process's file of a part at another; all processes call this, and the others forget what they hear."""
    me = jax.process_index()
    sizes = gather_texts(json.dumps(path.stat().st_size if me == holder else 0))
    size = int(sizes[holder])
    scratch = path.with_name(path.name + TEMPORARY)
    source = path.open("rb") if me == holder else None
    target = scratch.open("wb") if me == wanted_by else None
    try:
        for start in range(0, size, CHUNK_BYTES):
            chunk = np.zeros(min(CHUNK_BYTES, size - start), np.uint8)
            if source is not None:
                source.readinto(memoryview(chunk))
            heard = np.asarray(multihost_utils.broadcast_one_to_all(chunk, is_source=me == holder))
            if target is not None:
                target.write(heard.astype(np.uint8).tobytes())
    finally:
        for file in (source, target):
            if file is not None:
                file.close()
    if target is not None:
        scratch.replace(path)
