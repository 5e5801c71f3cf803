"""One grid of devices seen two ways: the factors of either view as axes of a mesh that has the cuts of both.

The layers' view is (pipe, data, fsdp, context, tensor) unless `mesh.order` says another, the experts' (pipe,
expert_data, expert, expert_tensor), both from least to most communication (MoE Parallel Folding, 2504.14960). A factor
is named by its setting, its flag.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from jaxtron.config import UserError
from jaxtron.words import plural

Axes = tuple[str, ...]

# names of settings, not of mesh axes, which are `Rules.axes(flag)`
Flag = Literal["pipe", "data", "fsdp", "context", "tensor"]
FLAGS: tuple[Flag, ...] = get_args(Flag)
EXPERT_FLAGS = ("expert_data", "expert", "expert_tensor")
BATCH_FLAGS = ("data", "fsdp")
# those that may share a parameter and its state: gradients are summed over them
SHARD_FLAGS = (*BATCH_FLAGS, "context")


class Refinement(NamedTuple):
    """Sizes of the refined axes, outermost first, and the axes that each flag of either view is made of: flags of the
    layers' view first, outermost first."""

    sizes: dict[str, int]
    flags: dict[str, Axes]


def refine(
    sizes: Mapping[str, int], expert: int = 1, expert_tensor: int = 1, order: Sequence[Flag] = FLAGS
) -> Refinement:
    """The coarsest axes that make up the flags of both views; `UserError` where there are none.

    `sizes` are those of the layers' flags, `order` has them outermost first. Devices that are in no part of the
    experts' view are its `expert_data`. Along the devices of a stage, which need not be neighbours, a view is cut at
    the products of its sizes from the innermost on; the axes are cut at those of both views, so each cut must divide
    the next. An axis has its flag's name, or `data_0`, `data_1` where the experts' view cuts it.
    """
    dense = {flag: sizes[flag] for flag in order if flag != "pipe"}
    devices = math.prod(dense.values())
    if devices % (expert * expert_tensor):
        asked = _text({"expert": expert, "expert_tensor": expert_tensor})
        raise UserError(
            f"{asked} needs a multiple of {plural(expert * expert_tensor, 'device')} in a stage, there "
            f"{'is' if devices == 1 else 'are'} {devices:,} ({_text(dense)}); change one of them"
        )
    view = {"expert_data": devices // (expert * expert_tensor), "expert": expert, "expert_tensor": expert_tensor}
    ours, theirs = _spans(dense), _spans(view)
    cuts = sorted({cut for span in (*ours.values(), *theirs.values()) for cut in span})
    for inner, outer in zip(cuts, cuts[1:], strict=False):
        if outer % inner:
            raise UserError(
                f"the devices of a stage cannot be {_text(dense)} and {_text(view)} at once: these cut them every "
                f"{inner} and every {outer}, which is not a multiple; change one of the sizes"
            )
    pieces = list(zip(cuts, cuts[1:], strict=False))[::-1]
    found: dict[str, int] = {}
    flags: dict[str, Axes] = {}
    names: dict[tuple[int, int], str] = {}
    for flag in order:
        if flag == "pipe":
            found[flag], flags[flag] = sizes[flag], (flag,)
            continue
        own = [piece for piece in pieces if _inside(piece, ours[flag])]
        flags[flag] = tuple(f"{flag}_{number}" for number in range(len(own))) if len(own) > 1 else (flag,)
        found |= zip(flags[flag], [outer // inner for inner, outer in own] or [1], strict=True)
        names |= zip(own, flags[flag], strict=False)
    flags |= {flag: tuple(names[piece] for piece in pieces if _inside(piece, span)) for flag, span in theirs.items()}
    assert tuple(flags) == (*order, *EXPERT_FLAGS)
    return Refinement(found, flags)


def _spans(sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Of each factor, outermost first, the devices of a step along it and along the next outer one."""
    spans, inner = {}, 1
    for flag, size in reversed(list(sizes.items())):
        spans[flag] = (inner, inner * size)
        inner *= size
    return dict(reversed(spans.items()))


def _inside(piece: tuple[int, int], span: tuple[int, int]) -> bool:
    return span[0] <= piece[0] and piece[1] <= span[1]


def _text(sizes: Mapping[str, int]) -> str:
    named = {flag: f"{size} copies" if flag == "expert_data" else f"mesh.{flag} {size}" for flag, size in sizes.items()}
    return " x ".join(named[flag] for flag, size in sizes.items() if size > 1) or "one device"
