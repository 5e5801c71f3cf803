"""Which mesh axis splits which logical axis: two tables, and nothing else decides it."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxtron.config import UserError
from jaxtron.sharding.config import AXIS, BATCH_AXES, SHARD_AXES, ContextConfig, ShardingConfig
from jaxtron.typing import Array

Table = Mapping[str, tuple[str, ...]]

# Parameters, gradients and optimizer state at rest. `embed` is on every matrix: the axes of ZeRO shard along it.
PARAMETERS: Table = {
    "layers": ("pipe",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "gate": (),
    "vocab": ("tensor",),
    "positions": (),
    "norm": (),
}

# Activations. `seq` is the sequence of the residual stream (sequence parallelism: split over tensor);
# `full_seq` is the same sequence where a layer sees all of it.
ACTIVATIONS: Table = {
    "batch": BATCH_AXES,
    "seq": ("tensor",),
    "full_seq": (),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "gate": (),
    "vocab": ("tensor",),
}

# A key/value head is copied to the devices that share it when there are fewer of them than tensor parts.
REPLICABLE = frozenset({"kv_heads"})


@dataclass(frozen=True)
class Layout:
    """How a parameter lies at rest: `padded` is its shape there, with zeros behind what `shape`, its own, has."""

    spec: PartitionSpec
    shape: tuple[int, ...]
    padded: tuple[int, ...]


@dataclass(frozen=True)
class Rules:
    """The two tables on one mesh, with the ZeRO level applied to the parameters' one.

    `gather_once` axes are gathered at the start of a step, `gather_at_use` axes in the layer that uses the weight.
    """

    mesh: Mesh
    parameters: Table
    activations: Table
    gather_once: tuple[str, ...]
    gather_at_use: tuple[str, ...]
    context: ContextConfig = ContextConfig()
    kind: str | None = None
    """What the devices are to be taken for, where others stand for them."""
    whole_sequences: bool = False
    """Every device along `context` has whole sequences all the same (sampling)."""

    @property
    def device_kind(self) -> str:
        """What the mesh's devices are, as `jax.Device.device_kind`."""
        return self.kind or self.mesh.devices.flat[0].device_kind

    @property
    def context_size(self) -> int:
        """Parts of a sequence."""
        return 1 if self.whole_sequences else self.size((AXIS,))

    def size(self, axes: tuple[str, ...]) -> int:
        """Number of parts that these mesh axes make."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def parameter_layout(self, logical: tuple[str, ...], shape: tuple[int, ...]) -> Layout:
        """Layout of a parameter with these logical axes; collisions and what `tensor` cannot split are `UserError`s.

        An axis of ZeRO that does not divide `embed` moves to the first other dimension that it divides; where there is
        none, `embed` is padded to the next multiple.
        """
        table = {name: self._lookup(self.parameters, name) for name in logical}
        spec: list[tuple[str, ...]] = []
        for name, size in zip(logical, shape, strict=True):
            axes = tuple(axis for axis in table[name] if axis not in SHARD_AXES)
            if size % self.size(axes) and self._replicable(name, size, axes):
                axes = ()
            spec.append(axes)
        self._check(logical, shape, spec)
        padded = list(shape)
        for name in logical:
            for axis in (axis for axis in table[name] if axis in SHARD_AXES):
                self._place(axis, logical.index(name), padded, spec)
        return Layout(PartitionSpec(*spec), shape, tuple(padded))

    def part(self, layout: Layout, gathered: tuple[str, ...] = ()) -> tuple[int, ...]:
        """Shape of a device's part of a parameter, once it is whole along the axes `gathered`."""
        splits = [spec_axes(entry) for entry in layout.spec]
        return tuple(
            (layout.shape if self.is_whole(axes, gathered) else layout.padded)[dim]
            // self.size(tuple(axis for axis in axes if axis not in gathered))
            for dim, axes in enumerate(splits)
        )

    def is_whole(self, axes: tuple[str, ...], gathered: tuple[str, ...]) -> bool:
        """Whether a dimension at rest on `axes` is whole again over those of ZeRO, once the axes `gathered` are."""
        return self.size(tuple(axis for axis in axes if axis in SHARD_AXES and axis not in gathered)) == 1

    def activation_spec(self, *logical: str | None) -> PartitionSpec:
        """Spec of an activation; axes that are manual where this is called are local already and left out."""
        manual = jax.sharding.get_abstract_mesh().manual_axes
        spec = [
            tuple(axis for axis in self._lookup(self.activations, name) if axis not in manual) if name else ()
            for name in logical
        ]
        self._check(tuple(name or "-" for name in logical), None, spec)
        return PartitionSpec(*spec)

    def splits(self, name: str, size: int) -> bool:
        """Whether the activation axis `name` of this size is split by its mesh axes (or copied, `REPLICABLE`)."""
        axes = self._lookup(self.activations, name)
        if size % self.size(axes) == 0:
            return True
        if self._replicable(name, size, axes):
            return False
        raise UserError(f"{name} {size} is not a multiple of {_text(axes)} = {self.size(axes)}")

    def _replicable(self, name: str, size: int, axes: tuple[str, ...]) -> bool:
        return name in REPLICABLE and self.size(axes) % size == 0

    def _lookup(self, table: Table, name: str) -> tuple[str, ...]:
        if name not in table:
            raise UserError(f"no logical axis {name!r}; known: {', '.join(table)}")
        return table[name]

    def _place(self, axis: str, home: int, padded: list[int], spec: list[tuple[str, ...]]) -> None:
        """Put an axis of ZeRO on a dimension, of which `home` is the first choice; padded if it divides none."""
        # manual axes are outermost: on a dimension that tensor splits, each part would be scattered rows
        free = [dim for dim, axes in enumerate(spec) if self.size(_without_zero(axes)) == 1]
        choices = sorted(free, key=lambda dim: dim != home)
        assert choices, f"no dimension without other axes: {spec}"
        parts = {dim: self.size((*_of_zero(spec[dim]), axis)) for dim in choices}
        dim = next((dim for dim in choices if padded[dim] % parts[dim] == 0), choices[0])
        padded[dim] = math.ceil(padded[dim] / parts[dim]) * parts[dim]
        spec[dim] = (*_of_zero(spec[dim]), axis, *_without_zero(spec[dim]))

    def _check(self, logical: tuple[str, ...], shape: tuple[int, ...] | None, spec: list[tuple[str, ...]]) -> None:
        used = [axis for axes in spec for axis in axes]
        if len(set(used)) != len(used):
            raise UserError(f"logical axes {logical} use a mesh axis twice: {PartitionSpec(*spec)}")
        for name, size, axes in zip(logical, shape or (), spec, strict=False):
            if size % self.size(axes):
                raise UserError(
                    f"{name} {size} is not a multiple of {_text(axes)} = {self.size(axes)}, "
                    f"as {PartitionSpec(*spec)} asks"
                )


def make_rules(mesh: Mesh, config: ShardingConfig, context: ContextConfig | None = None) -> Rules:
    """The tables for `mesh`, edited for the ZeRO level (Rajbhandari et al., 1910.02054)."""
    shared = () if config.zero == "none" else ("data", AXIS)
    return Rules(
        mesh=mesh,
        parameters={**PARAMETERS, "embed": ("fsdp", *shared)},
        activations=ACTIVATIONS,
        gather_once=shared if config.zero == "optimizer" else (),
        gather_at_use=("fsdp", *shared) if config.zero == "parameters" else ("fsdp",),
        context=context or ContextConfig(),
    )


_RULES: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules")


@contextlib.contextmanager
def use(rules: Rules) -> Iterator[Rules]:
    """Within this context, models are built and run on the rules' mesh."""
    token = _RULES.set(rules)
    try:
        with jax.set_mesh(rules.mesh):
            yield rules
    finally:
        _RULES.reset(token)


def current() -> Rules:
    """The rules of the enclosing `use`; a `RuntimeError` outside of one."""
    try:
        return _RULES.get()
    except LookupError:
        raise RuntimeError("no mesh here: build and run models inside `with jaxtron.sharding.use(rules):`") from None


def spec(*logical: str | None) -> PartitionSpec:
    """Spec of an activation with these logical axes (None: not split) under the current rules."""
    return current().activation_spec(*logical)


def constrain(x: Array, *logical: str | None) -> Array:
    """`x` laid out as its logical axes say; moves data only where the layout changes."""
    return jax.sharding.reshard(x, spec(*logical))


def spec_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of a dimension's entry in a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _of_zero(axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis in SHARD_AXES)


def _without_zero(axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis not in SHARD_AXES)


def _text(axes: tuple[str, ...]) -> str:
    return " x ".join(f"mesh.{axis}" for axis in axes)
