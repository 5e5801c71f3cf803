"""What a step's layouts say of its collectives, held against those of the compiled program."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxtron.sharding.layout import Gathers, spec_axes
from jaxtron.sharding.parameters import ParameterSpec
from tests.conformance.runs import Found

FLOAT = 4
Axes = tuple[str, ...]


@dataclass(frozen=True)
class Communication:
    """Of a step in float32 on a mesh: bytes of its collectives, one execution of each instruction counted."""

    found: Found
    mesh: Mapping[str, int]

    def check(self) -> None:
        """Every parameter is gathered, and its gradient reduced, where its layout says, and along no other axis."""
        mesh = self.mesh
        split = {flag for flag, size in mesh.items() if size > 1}
        assert {axis.partition("/")[0] for entry in self.found.collectives for axis in entry.axes} <= split
        # once a step, whatever the number of microbatches
        for axes, size in self.gathered_once().items():
            assert self.moved("all_gather", axes, num_loops=0) == size, axes
            assert self.moved("reduce_scatter", axes, num_loops=0) == size, axes
        if split - {"tensor"}:
            entries = [entry for entry in self.found.collectives if entry.kind == "all_reduce" and not entry.loops]
            # what a stage's own work adds up is a branch of its tick
            entries = [entry for entry in entries if not entry.conditional and entry.axes]
            # the norm of all gradients is made outside of the region that makes them
            entries = [entry for entry in entries if "shard_map" in entry.source]
            along_tensor = sum(entry.bytes for entry in entries if "tensor" in entry.axes)
            summed = sum(entry.bytes for entry in entries) - along_tensor
            # beside gradients what is reported, and the counts that weights are divided by
            scalars = sum(map(np.size, self.found.reported.values())) + self.found.num_counts
            assert 0 < summed - self.summed_gradients(along_tensor=False) <= FLOAT * scalars
            assert along_tensor >= self.summed_gradients(along_tensor=True)
        # in the loop over layers each matrix once in the forward, and its gradient once in the backward
        for axes, size in {} if mesh.get("pipe", 1) > 1 else self.gathered_in_layers().items():
            assert self.moved("all_gather", axes, num_loops=2, forward_only=True) == size, axes
            assert self.moved("reduce_scatter", axes, num_loops=2) == size, axes

    def moved(self, kind: str, axes: Axes, *, num_loops: int, forward_only: bool = False) -> int:
        """Bytes of a kind of collectives over these axes in so many loops."""
        entries = [entry for entry in self.found.collectives if (entry.kind, entry.axes) == (kind, axes)]
        entries = [entry for entry in entries if len(entry.loops) == num_loops]
        return sum(entry.bytes for entry in entries if not (forward_only and entry.backward))

    def gathered_once(self) -> Counter[Axes]:
        """Bytes of what weights are on a device once gathered, by the axes; those gathered at use are split yet."""
        sizes: Counter[Axes] = Counter()
        for spec in self.found.parameters:
            later = math.prod(self.mesh[axis] for axis in self.axes(spec.layout.at_use))
            sizes[self.axes(spec.layout.once)] += self.used_bytes(spec) // later
        del sizes[()]
        return sizes

    def gathered_in_layers(self) -> Counter[Axes]:
        """Bytes of the weights of one layer of each stack that are gathered at their use, by the axes."""
        sizes: Counter[Axes] = Counter()
        for spec in self.found.parameters:
            if spec.is_stacked:
                sizes[self.axes(spec.layout.at_use)] += self.used_bytes(spec) // spec.shape[0]
        del sizes[()]
        return sizes

    def summed_gradients(self, *, along_tensor: bool) -> int:
        """Bytes of gradients that devices have the same part of, and add up: once a step, or, of experts that devices
        along tensor have the same of, over these at the same time."""
        total = 0
        for spec in self.found.parameters:
            parts = [axis for axes in spec_axes(spec.layout.spec) for axis in axes]
            copied = spec.layout.blocks is not None and "tensor" not in parts and self.mesh.get("tensor", 1) > 1
            if copied == along_tensor and any(
                size > 1 and flag not in (*parts, "tensor") for flag, size in self.mesh.items()
            ):
                total += FLOAT * math.prod(spec.layout.padded) // math.prod(self.mesh.get(axis, 1) for axis in parts)
        return total

    def used_bytes(self, spec: ParameterSpec) -> int:
        """Of a parameter, whole but for tensor parts and stages."""
        parts = math.prod(self.mesh.get(axis, 1) for axes in spec_axes(spec.layout.used) for axis in axes)
        return FLOAT * math.prod(spec.layout.padded) // parts

    def axes(self, gathers: Gathers) -> Axes:
        """Those that split something, in the order of the mesh, as a census has them."""
        found = {axis for gather in gathers for axis in gather.axes}
        return tuple(axis for axis, size in self.mesh.items() if size > 1 and axis in found)
