"""Devices by the names of their hosts, for lines on what one of them did."""

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from jaxtron.checkpoint.processes import gather_texts
from jaxtron.typing import Device


@dataclass(frozen=True)
class Places:
    """The devices of a mesh as `mesh.devices.flat` has them, and the host of each process."""

    devices: Sequence[Device]
    hosts: Sequence[str]

    @classmethod
    def of(cls, mesh: Mesh) -> "Places":
        """Those of a mesh; all processes call this."""
        return cls(list(mesh.devices.flat), gather_texts(socket.gethostname()))

    def names(self, rows: Iterable[int]) -> str:
        """These devices, by their places in the mesh, as a reader wants them: host by host."""
        by_process: dict[int, list[int]] = {}
        for row in rows:
            by_process.setdefault(self.devices[row].process_index, []).append(self.devices[row].id)
        parts = []
        for process, ids in sorted(by_process.items()):
            which = f"device{'s' if len(ids) > 1 else ''} {', '.join(map(str, sorted(ids)))}"
            parts.append(f"{which} of {self.hosts[process]} (process {process})")
        return "; ".join(parts)

    def about(self, rows: Iterable[int]) -> dict[str, Any]:
        """The same for an event."""
        found = [self.devices[row] for row in rows]
        hosts = dict.fromkeys(self.hosts[device.process_index] for device in found)
        return {"devices": [device.id for device in found], "hosts": list(hosts)}
