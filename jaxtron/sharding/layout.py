"""Where an array of parameters lies at rest, and how it gets whole where it is used."""

from dataclasses import dataclass
from typing import NamedTuple

from jax.sharding import PartitionSpec

from jaxtron.sharding.folding import Axes


class Gather(NamedTuple):
    """A dimension that axes split; `sizes` where it has padding: of the gathered one, without it and with it."""

    dim: int
    axes: Axes
    sizes: tuple[int, int] | None = None


Gathers = tuple[Gather, ...]


@dataclass(frozen=True)
class Layout:
    """Of one parameter, made once (`Rules.parameter_layout`) and carried by it: nothing else knows which axes do what.

    `spec` is that at rest, `used` that of the whole parameter where it is used, split by tensor alone. `padded` is its
    shape at rest, with zeros behind what `shape`, its own, has. On the way to its use it is gathered `once` a step and
    then `at_use`, in each layer and microbatch; gradients are scattered on the way back.
    """

    spec: PartitionSpec
    used: PartitionSpec
    shape: tuple[int, ...]
    padded: tuple[int, ...]
    once: Gathers = ()
    at_use: Gathers = ()
    blocks: int | None = None
    """Of experts: before which dimension a step's own form of it has one more, a block for each device along tensor,
    whatever tensor's axes are used for there: experts, their width, ZeRO, or nothing, that is copies. A copy's gradient
    is then summed once a step, like over data, and not in every layer."""

    def stacked(self, rows: tuple[int, ...], axes: Axes = ()) -> "Layout":
        """Of as many such parameters in one array, with `rows` in front that `axes` split."""
        if not rows:
            return self
        front, count = (axes, *((),) * (len(rows) - 1)), len(rows)

        def behind(gathers: Gathers) -> Gathers:
            return tuple(gather._replace(dim=gather.dim + count) for gather in gathers)

        return Layout(
            PartitionSpec(*front, *self.spec),
            PartitionSpec(*front, *self.used),
            (*rows, *self.shape),
            (*rows, *self.padded),
            behind(self.once),
            behind(self.at_use),
            None if self.blocks is None else self.blocks + count,
        )

    def in_blocks(self, gathers: Gathers) -> Gathers:
        """Gathers of the form that a step computes with."""
        if self.blocks is None:
            return gathers
        return tuple(gather._replace(dim=gather.dim + (gather.dim >= self.blocks)) for gather in gathers)


def spec_axes(spec: PartitionSpec) -> tuple[Axes, ...]:
    """The mesh axes of every dimension of a spec."""
    return tuple(() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec)


def only(spec: PartitionSpec, axes: Axes) -> PartitionSpec:
    """The spec without all mesh axes but these."""
    return PartitionSpec(*(tuple(axis for axis in own if axis in axes) or None for own in spec_axes(spec)))
