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

    def parameter_spec(self, logical: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """Spec at rest of a parameter with these logical axes; indivisible sizes and collisions are `UserError`s.

        An axis of ZeRO that does not divide `embed` moves to the first other dimension that it divides; where there is
        none, `context` leaves the parameter whole.
        """
        table = {name: self._lookup(self.parameters, name) for name in logical}
        spec: list[tuple[str, ...]] = []
        for name, size in zip(logical, shape, strict=True):
            axes = tuple(axis for axis in table[name] if axis not in SHARD_AXES)
            if size % self.size(axes) and self._replicable(name, size, axes):
                axes = ()
            spec.append(axes)
        self._check(logical, shape, spec)
        for name in logical:
            for axis in (axis for axis in table[name] if axis in SHARD_AXES):
                self._place(axis, logical.index(name), logical, shape, spec)
        return PartitionSpec(*spec)

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

    def _place(self, axis: str, home: int, logical: tuple[str, ...], shape: tuple[int, ...], spec: list) -> None:
        others = [dim for dim in range(len(shape)) if dim != home]
        for dim in [home, *others]:
            batch = (*(used for used in spec[dim] if used in SHARD_AXES), axis)
            rest = tuple(used for used in spec[dim] if used not in SHARD_AXES)
            # manual axes are outermost: on a dimension that tensor splits, each part would be scattered rows
            if self.size(rest) == 1 and shape[dim] % self.size(batch) == 0:
                spec[dim] = (*batch, *rest)
                return
        if axis == AXIS:
            # sharing is a gain here and not what the axis is for: whole on all its devices
            return
        raise UserError(
            f"no dimension of a parameter with {', '.join(f'{n} {s}' for n, s in zip(logical, shape, strict=True))} "
            f"divides by mesh.{axis} {self.size((axis,))}; lower mesh.{axis}, or choose sizes that do "
            f"(split so far: {PartitionSpec(*spec)})"
        )

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


def _text(axes: tuple[str, ...]) -> str:
    return " x ".join(f"mesh.{axis}" for axis in axes)
