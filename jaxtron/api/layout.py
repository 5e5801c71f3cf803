"""`Session.layout`: parameters on the mesh as a table that shows itself."""

import difflib
import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from jaxtron.api.html import html_table
from jaxtron.config import UserError
from jaxtron.plan.layout import ParameterRow, parameter_rows
from jaxtron.plan.table import aligned
from jaxtron.run.session import RunSession
from jaxtron.words import readable_bytes

HEADER = ("parameter", "shape", "axes", "spec", "a device", "bytes", "replicas")
RIGHT = (5, 6)


@dataclass(frozen=True)
class PlacedParameter:
    """One parameter at rest: `split` has the mesh's flags that split each dimension, in words `spec_text`.

    `part` is the shape of a device's part, with the padding that makes parts even; `bytes` are its bytes; `replicas`
    says on how many devices each part lies.
    """

    name: str
    shape: tuple[int, ...]
    part: tuple[int, ...]
    axes: tuple[str, ...]
    split: tuple[tuple[str, ...], ...]
    spec: PartitionSpec
    """In JAX's words: the mesh's axes, which may be parts of a flag's."""
    dtype: str
    role: str
    status: str
    bytes: int
    replicas: int

    @property
    def spec_text(self) -> str:
        """Flags by dimension, such as `(-, fsdp+data, tensor)`; `-` is not split."""
        return "(" + ", ".join("+".join(flags) or "-" for flags in self.split) + ")"

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        shape, part = (" x ".join(map(str, sizes)) or "scalar" for sizes in (self.shape, self.part))
        size = readable_bytes(self.bytes)
        return (self.name, shape, ", ".join(self.axes), self.spec_text, part, size, str(self.replicas))

    def __str__(self) -> str:
        return "\n".join(aligned([HEADER, self.cells], right=RIGHT))

    def _repr_html_(self) -> str:
        return html_table(HEADER, [self.cells], right=RIGHT)


@dataclass(frozen=True)
class LayoutTable:
    """Some of a model's parameters on a mesh, in the model's order; `layout["name"]` is one, iteration gives all.

    `mesh` has the parts by flag. It prints as a table, and is one in a notebook.
    """

    mesh: dict[str, int]
    parameters: tuple[PlacedParameter, ...]

    @property
    def bytes(self) -> int:
        """Of one device, of all in the table."""
        return sum(one.bytes for one in self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __iter__(self) -> Iterator[PlacedParameter]:
        return iter(self.parameters)

    def __getitem__(self, name: str) -> PlacedParameter:
        found = next((one for one in self.parameters if one.name == name), None)
        if found is None:
            raise UserError(f"no parameter {name!r} in this layout{_near(name, [one.name for one in self])}")
        return found

    @property
    def title(self) -> str:
        """The mesh, and what a device holds."""
        count = sum(math.prod(one.shape) for one in self.parameters)
        return f"mesh: {mesh_text(self.mesh)}; {count:,} numbers, {readable_bytes(self.bytes)} a device"

    def __str__(self) -> str:
        return "\n".join([self.title, *aligned([HEADER, *(one.cells for one in self)], right=RIGHT)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(HEADER, [one.cells for one in self], right=RIGHT, title=self.title)


def layout_of(session: RunSession, pattern: str) -> LayoutTable:
    """The parameters whose names a pattern matches; a `UserError` where it matches none."""
    if not isinstance(pattern, str) or not pattern:
        raise UserError(f"layout({pattern!r}): give a pattern of names, such as '*query*', or nothing for all")
    with session.use():
        rules, specs = session.rules, session.blueprint.names
        rows = {row.name: row for row in parameter_rows(session.blueprint)}
        wanted = [name for name in specs if matches(name, pattern)]
        parts = {name: rules.part(specs[name].layout) for name in wanted}
    if not wanted:
        raise UserError(f"no parameter matches {pattern!r}{_near_part(pattern, list(specs))}")
    placed = tuple(_placed(rows[name], parts[name], specs[name].layout.spec, str(specs[name].dtype)) for name in wanted)
    return LayoutTable(session.sizes, placed)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern with `*`, `?` and `[...]` matches a name, or some of its parts that follow each other.

    `/` stands for the dot between parts.
    """
    pattern = pattern.replace("/", ".").strip(".")
    forms = (pattern, f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*")
    return any(fnmatch.fnmatchcase(name, form) for form in forms)


def mesh_text(sizes: dict[str, int]) -> str:
    """`data 2 x tensor 4`, outermost first."""
    return " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1) or "one device"


def _placed(row: ParameterRow, part: tuple[int, ...], spec: PartitionSpec, dtype: str) -> PlacedParameter:
    return PlacedParameter(
        name=row.name,
        shape=row.shape,
        part=part,
        axes=row.axes,
        split=row.split,
        spec=spec,
        dtype=dtype,
        role=row.role,
        status=row.status,
        bytes=row.bytes,
        replicas=row.replicas,
    )


def _near_part(pattern: str, names: list[str]) -> str:
    """What a pattern may have meant, by the parts of names."""
    parts = list(dict.fromkeys(part for name in names for part in name.split(".") if not part.isdecimal()))
    last = pattern.replace("/", ".").strip(".").split(".")[-1]
    near = difflib.get_close_matches(last, parts, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; names have the parts {', '.join(parts)}"


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; they are {', '.join(known[:8])}, ..."
