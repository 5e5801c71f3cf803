"""What the rest of the house knows of a family of models from its configuration alone; `program.py` has the rest.

A family is a package with two modules: `family.py`, whose `FAMILY` needs no JAX, and the module of a `Program` that it
names. `families.py` finds it by the name in `model.family`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from jaxtron.config import Config, UserError
from jaxtron.models.work.model import ModelWork
from jaxtron.models.work.shapes import Shapes
from jaxtron.roles import Role
from jaxtron.sharding.config import ContextConfig


class FamilyConfig(Config):
    """The settings of a model; a family adds its own, all with defaults."""

    family: str = "decoder"
    """decoder, or the dotted name of a package of your own (docs/families.md)."""

    # names of settings, with spaces between: a run may go on with other values of the first; the second only name
    # something that decides by itself, for shapes tell
    FREE: ClassVar[str] = ""
    CONTENT: ClassVar[str] = ""


Writing = Literal["continuation", "answer"]
ConfigT = TypeVar("ConfigT", bound=FamilyConfig)


class Cuts(NamedTuple):
    """Layers of each part of a pipeline, and the setting that says so, by its full name."""

    layers: tuple[int, ...]
    name: str
    value: str


class Experts(NamedTuple):
    """Of a layer the experts, and the width of one, each with the setting that says so, by its full name."""

    count: tuple[str, int]
    width: tuple[str, int]

    def check(self, expert: int, expert_tensor: int) -> None:
        """`UserError` where they are not shared out evenly over mesh.expert and mesh.expert_tensor."""
        for (name, size), flag, parts in ((self.count, "expert", expert), (self.width, "expert_tensor", expert_tensor)):
            if size % parts:
                raise UserError(f"{name} {size} is not a multiple of mesh.{flag} {parts}; change one of them")


@dataclass(frozen=True)
class Family(Generic[ConfigT]):
    """A family of models. Functions get its configuration first; `length` is data.sequence_length, in tokens."""

    config: type[ConfigT]
    program: str
    """The module whose `PROGRAM` computes; it needs JAX."""
    stacks: Callable[[ConfigT], dict[str, int]]
    """Layers of each stack in the order that a microbatch takes, by the stack's path in the parameters."""
    num_parameters: Callable[[ConfigT, int], int]
    """(config, length) -> parameters, exactly those that are made."""
    flops_per_token: Callable[[ConfigT, int], float]
    """(config, length) -> FLOPs of a token's forward and backward, without what is recomputed."""
    passes: Callable[[ConfigT, str, Role, tuple[str, ...]], float] = lambda config, name, role, axes: role == "kernel"
    """(config, name, role and axes of a parameter) -> how many products of a token each of its numbers is in, in the
    mean: 1 of a matrix, less of experts, 0 of what is looked up or added."""
    kinds: Callable[[ConfigT], tuple[tuple[str, ...], ...]] = lambda config: ()
    """Of each stack the kind of each layer, by which its parameters are apart under the stack's path, where they are of
    several (none, or an empty one: all are alike)."""
    leading: Callable[[ConfigT], int] = lambda config: 0
    """Layers before those of the first stack, as large, that what enters it has in it: they lie on the first stage."""
    check: Callable[[ConfigT, Mapping[str, int], int, ContextConfig], None] = lambda *_: None
    """(config, sizes of the mesh by flag, length, how sequences are split): `UserError` where they do not fit; that
    sequences split evenly is known already."""
    cuts: Callable[[ConfigT], Cuts | None] = lambda config: None
    """Where a setting of the model cuts it into the parts of a pipeline itself."""
    resolve: Callable[[ConfigT, int], ConfigT] = lambda config, length: config
    """(config, length) -> the same with defaults that follow from other settings; `UserError` for a length too long."""
    evaluated: Callable[[ConfigT], ConfigT] = lambda config: config
    """The same where nothing is trained: without dropout."""
    sizes: Callable[[ConfigT], str] = lambda config: f"model.family {config.family}"
    """The settings that decide how large the model is, for messages."""
    meaning: Callable[[ConfigT], dict[str, Any]] = lambda config: {}
    """What those settings mean, by name, that can say the same in other words."""
    vocabulary: str | None = None
    """The setting of how many tokens it knows, which are at least the tokenizer's (none: it reads no tokens)."""
    text_loss: str | None = None
    """The sum of its head that is the negative log-likelihood of the targets of a `TokenBatch`, which is its batch;
    texts are scored by it (none: they cannot be)."""
    work: Callable[[ConfigT, Shapes], ModelWork] | None = None
    """(config, sizes on a device) -> what a model takes of it; without it no step is predicted (`plan --gpu`)."""
    recompute: Callable[[ConfigT], tuple[str, ...]] = lambda config: ()
    """Values of its setting `recompute` for a search to try, those that keep most first (none: no such setting)."""
    padding_flops: Callable[[ConfigT], float] = lambda config: 0.0
    """Those of `flops_per_token` that entries of the vocabulary take which are no tokens."""
    experts: Callable[[ConfigT], Experts | None] = lambda config: None
    """What mesh.expert and mesh.expert_tensor split (none: no experts)."""
    no_experts: str = "leave it out"
    """What to do where these are asked for and there are no experts."""
    reads_files: bool = False
    """Whether its program opens files in forms of its own (`Program.open_data`), which only that can look at."""
    continues_text: bool = False
    """Whether its program can tell what follows a text (`Program.predict`), so that a run ends with a sample."""
    writes: Writing | None = None
    """What its models write (`Program.steps`): the continuation of a text, or the answer to one, which is a sequence of
    its own (none: nothing)."""
    of_any_length: Callable[[ConfigT], ConfigT] = lambda config: config
    """The same where sequences have lengths of their own, and none that a setting of the model says."""
