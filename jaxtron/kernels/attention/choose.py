"""Which implementation computes attention: the one that was named, or the fastest that can.

- `mosaic`: our kernels for Hopper.
- `cudnn`: other NVIDIA GPUs; for callers that do not ask for the log-sum-exp, which it cannot return.
- `xla`: plain JAX with linear memory, anywhere.
- `reference`: plain mathematics with quadratic memory; never chosen by `auto`.
"""

from dataclasses import dataclass
from types import ModuleType

import jax

from jaxtron.config import UserError
from jaxtron.kernels.attention import chunked, cudnn, mosaic, reference
from jaxtron.kernels.attention.mask import Mask
from jaxtron.typing import Array, Float

Shapes = tuple[Array | jax.ShapeDtypeStruct, Array | jax.ShapeDtypeStruct, Array | jax.ShapeDtypeStruct]

IMPLEMENTATIONS: dict[str, ModuleType] = {"mosaic": mosaic, "cudnn": cudnn, "xla": chunked, "reference": reference}
# of these `auto` takes the first that can
FASTEST_FIRST = ("mosaic", "cudnn", "xla")


@dataclass(frozen=True)
class Choice:
    """An implementation, and one line that says which it is and why."""

    name: str
    reason: str
    deterministic: bool = False

    @property
    def module(self) -> ModuleType:
        """Where it is."""
        return IMPLEMENTATIONS[self.name]

    @property
    def has_lse(self) -> bool:
        """Whether it is a pair of `forward` and `backward`, the first of which tells the log-sum-exp."""
        return hasattr(self.module, "forward")

    def forward(
        self, q: Float[Array, "B S H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K V"], mask: Mask
    ) -> tuple[Float[Array, "B S H V"], Float[Array, "B H S"]]:
        """Output and log-sum-exp."""
        return self.module.forward(q, k, v, mask)

    def backward(
        self,
        q: Float[Array, "B S H D"],
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K V"],
        lse: Float[Array, "B H S"],
        delta: Float[Array, "B H S"],
        dout: Float[Array, "B S H V"],
        mask: Mask,
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B T K D"], Float[Array, "B T K V"]]:
        """dq, dk, dv; `delta` is rowsum(dout * out) less the gradient of `lse`."""
        # the others add up in one order in any case
        options = {"deterministic": True} if self.deterministic and self.name == "mosaic" else {}
        return self.module.backward(q, k, v, lse, delta, dout, mask, **options)


def choose(
    implementation: str,
    shapes: Shapes,
    mask: Mask,
    device_kind: str,
    *,
    needs_lse: bool = True,
    deterministic: bool = False,
) -> Choice:
    """Who computes attention of `shapes` (queries, keys, values) on devices of this kind (`jax.Device.device_kind`).

    `UserError` where the one that was named cannot; `auto` falls through to the next that can. `deterministic`: the
    gradients' bits are the same in every run.
    """
    asked = (shapes, mask, device_kind, needs_lse, deterministic)
    if implementation != "auto":
        return _named(implementation, *asked)
    refusals = []
    for name in FASTEST_FIRST:
        if name not in IMPLEMENTATIONS:
            continue
        why = _refusal(name, *asked)
        if why is None:
            passed = "".join(f"; {refusal}" for refusal in refusals)
            return Choice(name, f"attention: {name}, the fastest that runs on {device_kind}{passed}", deterministic)
        refusals.append(f"not {name}: {why}")
    raise UserError(f"no implementation of attention can do this on {device_kind}: {'; '.join(refusals)}")


def _named(name: str, shapes: Shapes, mask: Mask, device_kind: str, needs_lse: bool, deterministic: bool) -> Choice:
    if name not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise UserError(f"model.attention.implementation {name} is not known: use one of {known}")
    why = _refusal(name, shapes, mask, device_kind, needs_lse, deterministic)
    if why is not None:
        raise UserError(f"model.attention.implementation {name} cannot: {why}; use auto, or xla which does all")
    return Choice(name, f"attention: {name}, as asked", deterministic)


def _refusal(
    name: str, shapes: Shapes, mask: Mask, device_kind: str, needs_lse: bool, deterministic: bool
) -> str | None:
    module = IMPLEMENTATIONS[name]
    why = module.refusal(*shapes, mask, device_kind)
    if why is None and needs_lse and not hasattr(module, "forward"):
        return "it returns no log-sum-exp, which sinks and context parallelism need"
    if why is None and deterministic and name == "cudnn":
        return "its backward adds up in any order"
    return why
