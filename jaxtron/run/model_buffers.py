"""Buffers of a model: what a step updates without gradient, by the rule of its family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from jaxtron.checkpoint.names import parts as path_parts
from jaxtron.config import UserError
from jaxtron.models.program import Parts, Program
from jaxtron.pipeline.layer_slots import arrange, restore
from jaxtron.pipeline.partition import Partition
from jaxtron.sharding.layout import Layout
from jaxtron.sharding.parameters import fit
from jaxtron.typing import Array, Float, PyTree


@dataclass(frozen=True)
class _Place:
    """A buffer's name with `/`, how it lies at rest, and the slots of its stack's layers (none: it is of none)."""

    name: str
    layout: Layout
    partition: Partition | None

    def in_model_order(self, buffer: Float[Array, "..."]) -> Float[Array, "..."]:
        own = fit(buffer, self.layout.shape)
        return own if self.partition is None else restore(self.partition, own)

    def at_rest(self, value: Float[Array, "..."]) -> Float[Array, "..."]:
        slots = value if self.partition is None else arrange(self.partition, value)
        return fit(slots, self.layout.padded)


def updated_buffers(
    program: Program,
    parts: Parts,
    partitions: Mapping[str, Partition],
    buffers: PyTree,
    reported: Mapping[str, Float[Array, "..."]],
) -> PyTree:
    """A state's buffers after a step that reports this, laid out as they are; `partitions` by the paths of stacks."""
    rule = program.update_buffers
    assert rule is not None
    if not jax.tree.leaves(buffers):
        return buffers
    buffer_specs = parts.blueprint.of("buffer", parts.blueprint.parameters)
    places = []
    for path, spec in jax.tree.leaves_with_path(buffer_specs):
        name = "/".join(path_parts(path))
        stack = next((partition for stack, partition in partitions.items() if name.startswith(f"{stack}/")), None)
        places.append(_Place(name, spec.layout, stack))

    def update(leaves: list[Array], reported: Mapping[str, Array]) -> list[Array]:
        before = {place.name: place.in_model_order(leaf) for place, leaf in zip(places, leaves, strict=True)}
        after = rule(parts, before, reported)
        kinds = [{name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} for found in (before, after)]
        if kinds[0] != kinds[1]:
            raise UserError(f"{rule.__module__}.{rule.__qualname__} gives buffers {kinds[1]} for {kinds[0]}")
        return [place.at_rest(after[place.name]) for place in places]

    # arrays are small, and which device has which layer is the mesh's: XLA finds how to move them
    specs = [place.layout.spec for place in places]
    run: Callable[..., list[Array]] = jax.sharding.auto_axes(  # pyright: ignore[reportAssignmentType]
        update, out_sharding=specs
    )
    return jax.tree.unflatten(jax.tree.structure(buffers), run(jax.tree.leaves(buffers), dict(reported)))
