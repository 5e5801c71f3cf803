"""What a family says a model takes of a device: of each stack a layer and what enters it, and the head."""

from dataclasses import dataclass

from jaxtron.models.work.operations import SlotWork


@dataclass(frozen=True)
class StackWork:
    """A layer of a stack (a period of a pattern, or of one kind), recomputation in its backward; made of the stack's
    own `Shapes`.

    Parameters are those on a device, split by `tensor` and whole over the other axes of the mesh. What a layer keeps
    for its backward is traced, not said.
    """

    layer: SlotWork
    parameters: float
    """Of a layer, without experts."""
    enter: SlotWork = SlotWork()
    """What makes the stream of its first layer."""
    temporaries: float = 0.0
    """Bytes that a layer's backward needs beside what was kept."""
    beside: float = 0.0
    """Bytes that a layer's forward needs beside what it keeps, where a backward runs at the same time."""
    transposed: int = 0
    """Bytes of one row that are kept a second time for weight gradients, which contract over tokens."""
    transposed_in_loop: int = 0
    """The same where a loop runs several layers."""
    expert_parameters: float = 0.0
    """Of a layer's experts, split by `expert` and `expert_tensor` and whole over `expert_data`."""
    expert_kept: float = 0.0
    """Bytes that a layer keeps of its experts' rows, which depend on how many devices share them."""
    recomputed: frozenset[str] = frozenset()
    """Modules whose forward runs again in the backward, by the names that parameters have them under; `layer`: all."""


@dataclass(frozen=True)
class ModelWork:
    """A model on a device whose stacks lie one after the other on the stages, as `Family.stacks` has them."""

    stacks: tuple[StackWork, ...]
    """Of each stack its layers that are alike: all, or those of each kind (`Partition.alike`), of which the first has
    what enters the stack."""
    head: SlotWork
    """With its gradients, which are formed at once in the last stage's forward."""
    outer_parameters: float
    """On a device, those outside of stacks: embedding, head."""
    stream: float
    """Bytes of the stream of a microbatch on a device, whole along `tensor`."""
    head_matrix: float = 0.0
    """Numbers of the head's matrix on a device."""
    logits: float = 0.0
    """Numbers of a microbatch's logits on a device; of all of these the loss has a chunk at a time."""
    exchanged: tuple[float, ...] = ()
    """Bytes of the arrays that devices with experts send each other in a layer."""
