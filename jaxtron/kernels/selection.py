"""Which implementation of a kernel computes, selected before anything is traced: the one named, or the fastest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from jaxtron.config import UserError

Kernel = TypeVar("Kernel")

AUTO = "auto"


@dataclass(frozen=True)
class Backend(Generic[Kernel]):
    """An implementation by name, and one line that says which it is and why."""

    name: str
    implementation: Kernel
    """What computes."""
    reason: str


def select(
    name: str,
    implementations: Mapping[str, Kernel],
    unsupported_reason: Callable[[Kernel], str | None],
    device_kind: str,
    *,
    what: str,
    setting: str,
    order: Sequence[str] = (),
) -> Backend[Kernel]:
    """The implementation of this name; for `auto` the first, in `order` if given, that can on devices of this kind.

    `unsupported_reason` says why one cannot, none if it can. For a reader, `what` they compute and the `setting` that
    names one. `UserError` where the one that was named is not known or cannot, or where none can.
    """
    if name != AUTO:
        if name not in implementations:
            known = ", ".join([AUTO, *implementations])
            raise UserError(f"{setting} {name} is not known to {what}: use one of {known}")
        reason = unsupported_reason(implementations[name])
        if reason is not None:
            raise UserError(f"{setting} {name} cannot: {reason}; use {AUTO}")
        return Backend(name, implementations[name], f"{what}: {name}, as asked")
    passed = []
    for candidate in order or implementations:
        reason = unsupported_reason(implementations[candidate])
        if reason is None:
            why = f"{what}: {candidate}, the fastest that runs on {device_kind}"
            return Backend(candidate, implementations[candidate], "; ".join([why, *passed]))
        passed.append(f"not {candidate}: {reason}")
    raise UserError(f"no implementation of {what} can do this on {device_kind}: {'; '.join(passed)}")
