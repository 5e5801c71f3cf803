"""What a training changes from step to step."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax

from jaxtron.optim.guard import Health
from jaxtron.optim.loss_scale import LossScale
from jaxtron.pipeline.model import merge
from jaxtron.roles import Status
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.typing import Array, Int, PyTree

# the state's fields that make up a model, with what is in each
MODEL: dict[str, Status] = {"params": "trained", "frozen": "frozen", "buffers": "buffer"}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "updates", "params", "frozen", "buffers", "optimizer", "loss_scale", "health"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TrainState:
    """All that a training is between two steps.

    `params`, `frozen` and `buffers` are trees of the model's parameters, each with None where another has the leaf.
    """

    step: Int[Array, ""]
    """Steps done."""
    updates: Int[Array, ""]
    """Those that were applied: where the learning rate's schedule is."""
    params: PyTree
    """Those that are trained: float32 master weights."""
    frozen: PyTree
    """Those that no step changes, in the type in which they are used."""
    buffers: PyTree
    """Float32 arrays of the model that a step updates without gradient."""
    optimizer: PyTree
    """Its state, of what is trained."""
    loss_scale: LossScale | None
    """With fp16 only."""
    health: Health | None = None
    """Where steps are guarded."""

    @property
    def model(self) -> PyTree:
        """All that the model computes with, in one tree."""
        return merged({name: getattr(self, name) for name in MODEL})


def divided(blueprint: Blueprint, tree: PyTree) -> dict[str, PyTree]:
    """A tree that is like the parameters as the fields of a state that make up the model."""
    return {name: blueprint.of(status, tree) for name, status in MODEL.items()}


def merged(fields: Mapping[str, PyTree]) -> PyTree:
    """The inverse of `divided`."""
    return functools.reduce(merge, (fields[name] for name in MODEL))
