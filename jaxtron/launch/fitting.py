"""How a configuration for MAX hosts runs on fewer: the data axis filled, and more microbatches of the same batch."""

from jaxtron.config import UserError
from jaxtron.run.configuration import Configuration
from jaxtron.sharding.folding import BATCH_FLAGS, FLAGS


class Fitting:
    """Flags for so many hosts of a configuration whose own layout is that of `most`, `devices` a host.

    Raises `UserError` where the configuration does not fit `most` hosts.
    """

    def __init__(self, config: Configuration, *, most: int, devices: int) -> None:
        self._config, self._devices = config, devices
        sizes = config.mesh.shape(most * devices, more=f"have more hosts, with {devices} each: all")
        config.check_mesh(sizes)
        # sequences of a device at once: what its memory is known to hold
        self._rows = config.train.global_batch // (_parts(sizes) * config.train.microbatches)
        is_open = any(getattr(config.mesh, flag) == -1 for flag in FLAGS)
        self._mesh = config.mesh if is_open else config.mesh.model_copy(update={"data": -1})
        self._flags = () if is_open else ("--mesh.data", "-1")

    def flags(self, hosts: int) -> tuple[str, ...]:
        """What is added to the command line for so many hosts; a `UserError` where they cannot be used."""
        sizes = self._mesh.shape(hosts * self._devices, more=f"have more hosts, with {self._devices} each: all")
        train = self._config.train
        # of one microbatch a device's share of the batch
        share = train.model_copy(update={"microbatches": 1})
        share.check(sizes)
        rows = train.global_batch // _parts(sizes)
        refusal: UserError | None = None
        for count in range(train.microbatches, rows + 1):
            if rows % count or rows // count > self._rows:
                continue
            changed = {"train": train.model_copy(update={"microbatches": count}), "mesh": self._mesh}
            try:
                self._config.model_copy(update=changed).check_mesh(sizes)
            except UserError as error:
                refusal = refusal or error
                continue
            more = () if count == train.microbatches else ("--train.microbatches", str(count))
            return (*self._flags, *more)
        raise refusal or UserError(
            f"train.global_batch {train.global_batch} leaves each device {rows} sequences, fewer than "
            f"train.microbatches {train.microbatches}"
        )

    def largest(self, available: int, fewest: int) -> int | None:
        """The most hosts of those available that fit, `fewest` at least; None where no number of them does."""
        return next((hosts for hosts in range(available, fewest - 1, -1) if self._fits(hosts)), None)

    def refusals(self, fewest: int, most: int) -> dict[int, str]:
        """Why each number of hosts in the range that cannot be used cannot."""
        found: dict[int, str] = {}
        for hosts in range(fewest, most + 1):
            try:
                self.flags(hosts)
            except UserError as error:
                found[hosts] = str(error)
        return found

    def _fits(self, hosts: int) -> bool:
        try:
            self.flags(hosts)
        except UserError:
            return False
        return True


def _parts(sizes: dict[str, int]) -> int:
    """Parts of the global batch on a mesh of these sizes."""
    parts = 1
    for flag in BATCH_FLAGS:
        parts *= sizes[flag]
    return parts
