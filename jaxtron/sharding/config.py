"""The settings of what the devices split (the flags of `mesh`): the batch, sequences, parameters and their state."""

import itertools
import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from jaxtron.config import Config, NoEffect, UserError, format_value
from jaxtron.sharding.folding import FLAGS, Flag, Refinement, refine
from jaxtron.words import plural

Method = Literal["ring", "all_gather", "all_to_all", "hierarchical"]
Zero = Literal["none", "optimizer", "parameters"]


class MeshConfig(Config):
    """Devices along each axis of the mesh; the product is the number of devices, and one `-1` fills it."""

    data: int = -1
    """Replicas of the model, each on its own part of the batch (`-1`: as many as fit)."""
    fsdp: int = 1
    """Parts of every parameter, gathered where it is used; splits the batch too."""
    tensor: int = 1
    """Parts of every layer's heads, MLP width and vocabulary; the sequence is split between them."""
    pipe: int = 1
    """Pipeline stages, each with its part of the layers."""
    context: int = 1
    """Parts of every sequence, each on its own devices; attention sees the others (settings: context)."""
    expert: int = Field(default=1, ge=1)
    """Parts of every layer's experts, over the devices of a stage: from those of a tensor group to those of all."""
    expert_tensor: int = Field(default=1, ge=1)
    """Parts of every expert's width, over neighbours; devices that neither splits have copies of the experts."""
    order: tuple[Flag, ...] = FLAGS
    """All five flags, outermost first: devices along the last are neighbours, and fill nodes before those of others."""

    @model_validator(mode="after")
    def _check(self) -> "MeshConfig":
        sizes = {axis: getattr(self, axis) for axis in FLAGS}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis} must be a positive number or -1, not {size}")
        if list(sizes.values()).count(-1) > 1:
            filled = ", ".join(f"mesh.{axis}" for axis, size in sizes.items() if size == -1)
            raise ValueError(f"only one mesh axis can be -1 (fill), not {filled}")
        if sorted(self.order) != sorted(FLAGS):
            raise UserError(
                f"mesh.order {format_value(self.order)} must have each of {', '.join(FLAGS)} once, outermost first"
            )
        self._check_order(sizes)
        return self

    @property
    def split(self) -> frozenset[str]:
        """The flags along which there is, or may be, more than one part."""
        return frozenset(axis for axis in FLAGS if getattr(self, axis) != 1)

    def _check_order(self, sizes: Mapping[str, int]) -> None:
        """`NoEffect` where all that `order` moves are flags of one part (-1: not known yet)."""
        moved = [
            (outer, inner)
            for outer, inner in itertools.combinations(FLAGS, 2)
            if self.order.index(outer) > self.order.index(inner)
        ]
        if moved and all(1 in (sizes[outer], sizes[inner]) for outer, inner in moved):
            alone = {f"mesh.{flag}": 1 for flag in FLAGS if sizes[flag] == 1 and any(flag in pair for pair in moved)}
            raise NoEffect("mesh.order", self.order, alone)

    def shape(self, num_devices: int, *, more: str = "simulate them: --devices") -> dict[str, int]:
        """Sizes by flag in `order` with `-1` filled; a `UserError` if they do not multiply to `num_devices`.

        `more` is what to type for as many devices as the mesh needs.
        """
        sizes = {axis: getattr(self, axis) for axis in self.order}
        known = math.prod(size for size in sizes.values() if size != -1)
        text = " x ".join(f"mesh.{axis} {size}" for axis, size in sizes.items() if size != 1) or "mesh.data 1"
        there = f"there {'is' if num_devices == 1 else 'are'} {num_devices:,}"
        simulate = f"{more} {known}"
        if -1 in sizes.values():
            if num_devices % known:
                raise UserError(
                    f"{text} needs a multiple of {plural(known, 'device')}, {there}; change the mesh, or {simulate}"
                )
            sizes = {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
        elif known != num_devices:
            raise UserError(
                f"{text} needs {plural(known, 'device')}, {there}; change the mesh, set one axis to -1, or {simulate}"
            )
        # the experts' view of the same devices
        self.refined(sizes)
        return sizes

    def refined(self, sizes: Mapping[str, int]) -> Refinement:
        """The axes of a mesh of these sizes by flag, none open; `UserError` where the experts' cuts do not fit."""
        return refine(sizes, self.expert, self.expert_tensor, self.order)


class ContextConfig(Config):
    """How attention sees the rest of a sequence that `mesh.context` splits."""

    method: Method = "ring"
    """ring: keys and values go round, a block a step; all_gather: they are gathered; all_to_all: heads are split
    instead of the sequence; hierarchical: all_to_all among `inner` neighbours, a ring across."""
    inner: int = Field(default=8, ge=2)
    """Neighbours of the hierarchical method, such as the GPUs of a node."""

    def groups(self, size: int) -> tuple[int, int]:
        """Devices that split heads, and devices of the ring, of so many along `mesh.context`."""
        if self.method == "all_to_all":
            return size, 1
        if self.method != "hierarchical":
            return 1, size
        if size % self.inner or size == self.inner:
            raise UserError(
                f"context.inner {self.inner} must divide mesh.context {size} and be smaller; "
                "use context.method all_to_all or ring for one group or groups of one"
            )
        return self.inner, size // self.inner

    def check_effect(self, parts: int) -> None:
        """`NoEffect` for settings that do nothing with so many parts of a sequence (-1: not known yet)."""
        if parts == 1 and self != ContextConfig():
            raise NoEffect("context", self, {"mesh.context": 1}, "leave it out, or set --mesh.context")

    def check(self, sizes: Mapping[str, int], sequence_length: int) -> None:
        """`UserError` where a mesh of these sizes by flag does not split sequences of so many tokens."""
        tensor, parts = sizes["tensor"], sizes["context"]
        if sequence_length % tensor:
            raise UserError(
                f"data.sequence_length {sequence_length} is not a multiple of mesh.tensor {tensor}; change one of them"
            )
        self.check_effect(parts)
        pieces = 2 * parts * tensor
        if parts > 1 and sequence_length % pieces:
            raise UserError(
                f"data.sequence_length {sequence_length} is not a multiple of 2 x mesh.context {parts} x "
                f"mesh.tensor {tensor} = {pieces}, for every device has two pieces of a sequence"
            )


class ShardingConfig(Config):
    """What the axes of batch and sequence do beyond splitting them."""

    zero: Zero = "optimizer"
    """What `mesh.data` and `mesh.context` shard (ZeRO): none; optimizer: states and master weights; parameters: all."""
    overlap_tensor: bool | None = None
    """Two halves of each microbatch (its rows; of an odd number, positions) go through attention and MLPs side by side:
    what one sends over mesh.tensor travels while the other multiplies (none: on GPUs, from 2048 tokens a half on)."""
