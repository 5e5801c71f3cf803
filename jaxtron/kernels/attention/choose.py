"""Which implementation computes attention: the one that was named, or the fastest that can.

- `mosaic`: our kernels for Hopper.
- `cudnn`: other NVIDIA GPUs; for callers that do not ask for the log-sum-exp, which it cannot return.
- `xla`: plain JAX with linear memory, anywhere.
- `reference`: plain mathematics with quadratic memory; never chosen by `auto`.
"""

from types import ModuleType
from typing import Literal, NamedTuple

import jax

from jaxtron.config import UserError
from jaxtron.kernels.attention import chunked, cudnn, mosaic, reference
from jaxtron.kernels.attention.mask import Mask
from jaxtron.typing import Array

Implementation = Literal["auto", "mosaic", "cudnn", "xla", "reference"]
Shapes = tuple[Array | jax.ShapeDtypeStruct, Array | jax.ShapeDtypeStruct, Array | jax.ShapeDtypeStruct]

IMPLEMENTATIONS: dict[str, ModuleType] = {"mosaic": mosaic, "cudnn": cudnn, "xla": chunked, "reference": reference}
# of these `auto` takes the first that can
FASTEST_FIRST = ("mosaic", "cudnn", "xla")


class Choice(NamedTuple):
    """An implementation's module, and one line that says which it is and why."""

    module: ModuleType
    reason: str


def choose(implementation: str, shapes: Shapes, mask: Mask, device_kind: str, *, needs_lse: bool = True) -> Choice:
    """Who computes attention of `shapes` (queries, keys, values) on devices of this kind (`jax.Device.device_kind`).

    `UserError` where the one that was named cannot; `auto` falls through to the next that can.
    """
    if implementation != "auto":
        return _named(implementation, shapes, mask, device_kind, needs_lse)
    refusals = []
    for name in FASTEST_FIRST:
        if name not in IMPLEMENTATIONS:
            continue
        why = _refusal(name, shapes, mask, device_kind, needs_lse)
        if why is None:
            passed = "".join(f"; {refusal}" for refusal in refusals)
            return Choice(IMPLEMENTATIONS[name], f"attention: {name}, the fastest that can on {device_kind}{passed}")
        refusals.append(f"not {name}: {why}")
    raise UserError(f"no implementation of attention can do this on {device_kind}: {'; '.join(refusals)}")


def _named(name: str, shapes: Shapes, mask: Mask, device_kind: str, needs_lse: bool) -> Choice:
    if name not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise UserError(f"model.attention.implementation {name} is not known: use one of {known}")
    why = _refusal(name, shapes, mask, device_kind, needs_lse)
    if why is not None:
        raise UserError(f"model.attention.implementation {name} cannot: {why}; use auto, or xla which does all")
    return Choice(IMPLEMENTATIONS[name], f"attention: {name}, as asked")


def _refusal(name: str, shapes: Shapes, mask: Mask, device_kind: str, needs_lse: bool) -> str | None:
    module = IMPLEMENTATIONS[name]
    why = module.refusal(*shapes, mask, device_kind)
    if why is None and needs_lse and not hasattr(module, "forward"):
        return "it returns no log-sum-exp, which sinks and context parallelism need"
    return why
