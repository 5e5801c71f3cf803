"""Which flag of the mesh splits which logical axis: two tables, and nothing else decides it.

A flag names a setting of `mesh`; the mesh axes that are its are `Rules.axes(flag)`, here and everywhere else.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxtron.config import UserError
from jaxtron.sharding.config import ContextConfig, ShardingConfig
from jaxtron.sharding.folding import BATCH_FLAGS, Axes
from jaxtron.sharding.layout import Gather, Gathers, Layout, spec_axes
from jaxtron.sharding.mesh import Folding
from jaxtron.typing import Array

# logical axis -> flags
Table = Mapping[str, tuple[str, ...]]

# Parameters, gradients and optimizer state where they are used; at rest ZeRO shares them out besides.
PARAMETERS: Table = {
    "layers": ("pipe",),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "groups": ("tensor",),
    "channels": ("tensor",),
    "state": (),
    "taps": (),
    "latent": (),
    "rank": (),
    "mlp": ("tensor",),
    "gate": (),
    "vocab": ("tensor",),
    "positions": (),
    "norm": (),
    "choice": (),
    # experts see the devices of a stage in another view (`folding.py`)
    "expert": ("expert",),
    "expert_embed": (),
    "expert_mlp": ("expert_tensor",),
}

# Activations. `seq` is the sequence of the residual stream (sequence parallelism: split over tensor);
# `full_seq` is the same sequence where a layer sees all of it.
ACTIVATIONS: Table = {
    "batch": BATCH_FLAGS,
    "seq": ("tensor",),
    "full_seq": (),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "groups": ("tensor",),
    "channels": ("tensor",),
    "state": (),
    "taps": (),
    "latent": (),
    "rank": (),
    "mlp": ("tensor",),
    "gate": (),
    "group": (),
    "vocab": ("tensor",),
}

# A key/value head, or a group of a state-space layer, is copied to the devices that share it when there are fewer of
# them than tensor parts.
REPLICABLE = frozenset({"kv_heads", "groups"})


@dataclass(frozen=True)
class Rules:
    """The two tables on one mesh, and the flags that share parameters and their state (ZeRO).

    `shared` names, by the logical axis along which they share, flags in the order of their turn; `outer` those that
    have their turn after them in parameters outside of stacks. Those of `gather_once` are gathered at the start of a
    step, the others in the layer that uses the weight.
    """

    folding: Folding
    parameters: Table
    activations: Table
    shared: Table
    outer: tuple[str, ...] = ()
    gather_once: frozenset[str] = frozenset()
    context: ContextConfig = ContextConfig()
    overlap_tensor: bool | None = None
    """As `ShardingConfig` has it."""
    stands_for: str | None = None
    """The `jax.Device.device_kind` of what the devices stand for, where a step is traced for others than they are."""

    @property
    def mesh(self) -> Mesh:
        """All axes, outermost first; only where there are devices."""
        assert isinstance(self.folding.mesh, Mesh)
        return self.folding.mesh

    @property
    def device_kind(self) -> str:
        """What the mesh's devices are, or stand for, as `jax.Device.device_kind`."""
        return self.stands_for or self.mesh.devices.flat[0].device_kind

    def axes(self, *flags: str) -> Axes:
        """The mesh axes of these flags, in their order: what specs and collectives are given."""
        return self.folding.axes(*flags)

    def parts(self, *flags: str) -> int:
        """Parts that these flags make together."""
        return self.size(self.axes(*flags))

    def size(self, axes: Axes) -> int:
        """Parts that these mesh axes make."""
        return self.folding.size(axes)

    @property
    def sizes(self) -> dict[str, int]:
        """Parts by flag, outermost first."""
        return self.folding.sizes

    @property
    def manual(self) -> Axes:
        """The axes over which a region is manual (`regions.region`)."""
        return self.folding.manual

    @property
    def batch(self) -> Axes:
        """The axes that split the rows of a batch."""
        return self.axes(*BATCH_FLAGS)

    def without(self, flag: str) -> "Rules":
        """The rules of the same mesh with nothing split over `flag`: every device along it has the whole."""
        return replace(self, folding=self.folding.without(flag))

    def parameter_layout(
        self, logical: tuple[str, ...], shape: tuple[int, ...], *, is_trained: bool = True, is_outer: bool = False
    ) -> Layout:
        """Layout of a parameter with these logical axes; collisions and what `tensor` cannot split are `UserError`s.

        `is_outer`: it is in no stack of layers, so that every stage uses it, or could.

        A flag of ZeRO that does not divide `embed` shares the first other dimension that it divides; where there is
        none, `embed` is padded to the next multiple. What is not trained has no state to share: flags gathered once
        leave it whole.
        """
        placed = self._placement(logical, shape)
        home = next((dim for dim, name in enumerate(logical) if name in self.shared), None)
        flags = () if home is None else (*self.shared[logical[home]], *(self.outer if is_outer else ()))
        flags = tuple(flag for flag in flags if is_trained or flag not in self.gather_once)
        shares, padded = self._share(flags, home, placed, shape)
        at_rest = [(*self.axes(*flags), *axes) for flags, axes in zip(shares, placed, strict=True)]
        once, at_use = self._gathers(shares, shape, padded)
        blocks = 0 if "expert" in logical else None
        return Layout(PartitionSpec(*at_rest), PartitionSpec(*placed), shape, padded, once, at_use, blocks)

    def part(self, layout: Layout, gathers: Gathers = ()) -> tuple[int, ...]:
        """Shape of a device's part of a parameter, at rest or after some of its gathers."""
        part = [size // self.size(axes) for size, axes in zip(layout.padded, spec_axes(layout.spec), strict=True)]
        for dim, axes, sizes in gathers:
            part[dim] = part[dim] * self.size(axes) if sizes is None else sizes[0]
        return tuple(part)

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
        raise UserError(f"{name} {size} is not a multiple of {self._text(axes)} = {self.size(axes)}")

    def _replicable(self, name: str, size: int, axes: tuple[str, ...]) -> bool:
        return name in REPLICABLE and self.size(axes) % size == 0

    def _lookup(self, table: Table, name: str) -> tuple[str, ...]:
        if name not in table:
            raise UserError(f"no logical axis {name!r}; known: {', '.join(table)}")
        return self.axes(*table[name])

    def _placement(self, logical: tuple[str, ...], shape: tuple[int, ...]) -> list[Axes]:
        """The axes that split each dimension where the parameter is used, by the table."""
        placed = []
        for name, size in zip(logical, shape, strict=True):
            axes = self._lookup(self.parameters, name)
            placed.append(() if size % self.size(axes) and self._replicable(name, size, axes) else axes)
        self._check(logical, shape, placed)
        return placed

    def _share(
        self, flags: tuple[str, ...], home: int | None, placed: list[Axes], shape: tuple[int, ...]
    ) -> tuple[list[tuple[str, ...]], tuple[int, ...]]:
        """The flags that share each dimension, `home` if it can be, and the shape with the padding that they need."""
        # manual axes are outermost: on a dimension that tensor splits, each part would be scattered rows
        free = sorted((dim for dim, axes in enumerate(placed) if self.size(axes) == 1), key=lambda dim: dim != home)
        assert free or not flags, f"no dimension without other axes: {placed}"
        shares: list[tuple[str, ...]] = [()] * len(shape)
        padded = list(shape)
        for flag in flags:
            parts = {dim: self.parts(*shares[dim], flag) for dim in free}
            dim = next((dim for dim in free if padded[dim] % parts[dim] == 0), free[0])
            padded[dim] = math.ceil(padded[dim] / parts[dim]) * parts[dim]
            shares[dim] = (*shares[dim], flag)
        return shares, tuple(padded)

    def _gathers(
        self, shares: list[tuple[str, ...]], shape: tuple[int, ...], padded: tuple[int, ...]
    ) -> tuple[Gathers, Gathers]:
        """Those once a step and those at use; the last one of a dimension leaves its padding out."""
        once, at_use = [], []
        for dim, flags in enumerate(shares):
            early = self.axes(*(flag for flag in flags if flag in self.gather_once))
            late = self.axes(*(flag for flag in flags if flag not in self.gather_once))
            sizes = (shape[dim], padded[dim]) if shape[dim] != padded[dim] else None
            if self.size(early) > 1:
                once.append(Gather(dim, early, sizes if self.size(late) == 1 else None))
            if self.size(late) > 1:
                at_use.append(Gather(dim, late, sizes))
        return tuple(once), tuple(at_use)

    def _text(self, axes: Axes) -> str:
        return " x ".join(f"mesh.{flag}" for flag in self.folding.names(axes))

    def _check(self, logical: tuple[str, ...], shape: tuple[int, ...] | None, spec: list[tuple[str, ...]]) -> None:
        used = [axis for axes in spec for axis in axes]
        if len(set(used)) != len(used):
            raise UserError(f"logical axes {logical} use a mesh axis twice: {PartitionSpec(*spec)}")
        for name, size, axes in zip(logical, shape or (), spec, strict=False):
            if size % self.size(axes):
                raise UserError(
                    f"{name} {size} is not a multiple of {self._text(axes)} = {self.size(axes)}, "
                    f"as {PartitionSpec(*spec)} asks"
                )


@dataclass(frozen=True)
class Tables:
    """The two tables before a mesh: what a caller edits, by default the house's."""

    parameters: Table = field(default_factory=lambda: MappingProxyType(dict(PARAMETERS)))
    activations: Table = field(default_factory=lambda: MappingProxyType(dict(ACTIVATIONS)))


def make_rules(
    folding: Folding, config: ShardingConfig, context: ContextConfig | None = None, tables: Tables | None = None
) -> Rules:
    """The tables (none: the house's) on a mesh, with what the ZeRO level shares (Rajbhandari et al., 1910.02054).

    Of what is in no stack the stages of a pipeline share the state on every level: all have the same of it.
    """
    shared = () if config.zero == "none" else ("data", "context")
    # experts know no fsdp: where it is asked for, all that copy them share them
    experts = ("expert_data",) if shared or folding.size(folding.axes("fsdp")) > 1 else ()
    early = shared if config.zero == "optimizer" else ()
    if folding.size(folding.axes("fsdp")) == 1:
        early += experts if config.zero == "optimizer" else ()
    outer = ("pipe",) if folding.size(folding.axes("pipe")) > 1 else ()
    tables = tables or Tables()
    return Rules(
        folding=folding,
        parameters=tables.parameters,
        activations=tables.activations,
        shared={"embed": ("fsdp", *shared), "expert_embed": experts},
        outer=outer,
        gather_once=frozenset((*early, *outer)),
        context=context or ContextConfig(),
        overlap_tensor=config.overlap_tensor,
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
    """The rules of the enclosing `use`; a `UserError` outside of one."""
    try:
        return _RULES.get()
    except LookupError:
        raise UserError(
            "no mesh here: a model is built and called inside `with session.use():` of a jaxtron.Session, whose own "
            "methods need no `with`"
        ) from None


def spec(*logical: str | None) -> PartitionSpec:
    """Spec of an activation with these logical axes (None: not split) under the current rules."""
    return current().activation_spec(*logical)


def constrain(x: Array, *logical: str | None) -> Array:
    """`x` laid out as its logical axes say; moves data only where the layout changes."""
    return jax.sharding.reshard(x, spec(*logical))
