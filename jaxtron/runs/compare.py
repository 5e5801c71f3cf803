"""How runs differ: settings that are not the same in all, and their losses at the same steps or tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtron.plan.table import aligned
from jaxtron.runs.folder import RunFolder
from jaxtron.runs.losses import LossLine
from jaxtron.runs.settings import differences

# lines of the table of losses
MOST_PLACES = 12
# steps that are looked for in files that were sampled
MOST_TRIED = 400
# of a value in a table
WIDEST = 40


@dataclass(frozen=True)
class RunComparison:
    """Differing settings by name with the value of each run, and each run's line at common places, the last included.

    `unknown` numbers the runs whose settings do not read; they have None in the place of values.
    """

    by: str
    settings: dict[str, list[Any]]
    unknown: tuple[int, ...]
    places: tuple[int, ...]
    lines: tuple[tuple[LossLine, ...], ...]

    def content(self) -> dict[str, Any]:
        """For machines."""
        return {
            "settings": self.settings,
            "losses": [
                {
                    self.by: place,
                    "loss": [line.loss for line in lines],
                    "validation_loss": [line.validation for line in lines],
                }
                for place, lines in zip(self.places, self.lines, strict=True)
            ],
        }


def comparison(runs: Sequence[RunFolder], by: str) -> RunComparison:
    """How they differ; places are steps, or tokens."""
    known = [run for run in runs if run.settings is not None]
    unknown = tuple(number for number, run in enumerate(runs) if run.settings is None)
    found = differences([run.settings for run in known if run.settings is not None]) if len(known) > 1 else {}
    for values in found.values():
        for number in unknown:
            values.insert(number, None)
    places, lines = _common(runs, by)
    return RunComparison(by, found, unknown, places, lines)


def _common(runs: Sequence[RunFolder], by: str) -> tuple[tuple[int, ...], tuple[tuple[LossLine, ...], ...]]:
    """Places at which every run has a line, evenly chosen, with some where validation was measured; those lines."""
    # the run with the fewest lines is tried first
    own = min((run.losses for run in runs), key=lambda log: len(log.lines))
    places = [place for line in own.lines if (place := line.at(by)) is not None]
    if any(run.losses.is_sample for run in runs):
        places = _evenly(places, MOST_TRIED)
    shared: dict[int, tuple[LossLine, ...]] = {}
    for place in places:
        found = [run.losses.find(place, by) for run in runs]
        lines = tuple(line for line in found if line is not None)
        if len(lines) == len(runs) and all(line.loss is not None for line in lines):
            shared[place] = lines
    measured = [place for place, lines in shared.items() if any(line.validation is not None for line in lines)]
    chosen = sorted({*_evenly(list(shared), MOST_PLACES), *_evenly(measured, MOST_PLACES // 2)})
    return tuple(chosen), tuple(shared[place] for place in chosen)


def _evenly(items: list[int], most: int) -> list[int]:
    """At most so many of a list, evenly, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[number * (len(items) - 1) // (most - 1)] for number in range(most)]


def comparison_lines(found: RunComparison, letters: str, text: Callable[[Any], str]) -> list[str]:
    """Tables for a person; `text` makes one of a value."""
    lines = []
    if found.unknown:
        named = ", ".join(letters[number] for number in found.unknown)
        lines += [f"settings of {named} do not read", ""]
    if found.settings:
        rows = [("settings that differ", *letters)]
        rows += [(f"  {name}", *(_cut(text(value)) for value in values)) for name, values in found.settings.items()]
        lines += aligned(rows)
    else:
        lines.append("no setting differs" if len(letters) - len(found.unknown) > 1 else "no settings to compare")
    lines.append("")
    if not found.places:
        other = "; give --by tokens" if found.by == "step" else ""
        return [*lines, f"no {found.by} at which all of them logged a loss{other}"]
    has_validation = any(line.validation is not None for row in found.lines for line in row)
    head = (
        f"loss at {found.by}",
        *letters,
        *((f"{letter} validation" for letter in letters) if has_validation else ()),
    )
    rows = [head]
    for place, row in zip(found.places, found.lines, strict=True):
        cells = [f"{line.loss:.4f}" for line in row]
        if has_validation:
            cells += ["-" if line.validation is None else f"{line.validation:.4f}" for line in row]
        rows.append((f"{place:,}", *cells))
    return [*lines, *aligned(rows, right=range(len(head)))]


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."
