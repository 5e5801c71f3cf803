"""Parameters that a run begins with, where not all of them need be there, nor all be used that are."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.config import UserError, shown

MOST_NAMES = 3


@dataclass(frozen=True)
class Allowance:
    """What of a model may be missing, by patterns of its names here, and what of the other left over, by its names."""

    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: CheckpointConfig) -> "Allowance | None":
        """That of the settings; None where they allow nothing."""
        found = cls(config.allow_missing, config.allow_unused)
        return found if found.missing or found.unused else None

    def check(self, directory: Path, missing: Collection[str], unused: Collection[str], known: Iterable[str]) -> None:
        """`UserError` for what is not allowed, and for a pattern that allows nothing; `known` are all names here."""
        refused = [f"needs {listed(found)}, not there" for found in [_without(missing, self.missing)] if found]
        refused += [f"has no place for {listed(found)}" for found in [_without(unused, self.unused)] if found]
        if refused:
            raise UserError(
                f"{directory}: the model here {' and '.join(refused)}; give the model's settings as they are there, or "
                "allow these by --checkpoint.allow_missing and --checkpoint.allow_unused"
            )
        for name, patterns, names in (("allow_missing", self.missing, missing), ("allow_unused", self.unused, unused)):
            for pattern in patterns:
                if not any(fnmatchcase(one, pattern) for one in names):
                    there = [one for one in known if fnmatchcase(one, pattern)]
                    why = f"{listed(there)} is there" if there and name == "allow_missing" else "it matches no name"
                    raise UserError(f"checkpoint.{name} {shown(pattern)} allows nothing, for {why}: leave it out")


def listed(names: Sequence[str]) -> str:
    """Some of the names, and how many there are."""
    some = ", ".join(names[:MOST_NAMES])
    return some if len(names) <= MOST_NAMES else f"{some} and {len(names) - MOST_NAMES:,} more"


def _without(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    """Those that match no pattern."""
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
