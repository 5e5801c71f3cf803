"""What changed between two plans."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from jaxtron.config import UserError
from jaxtron.config.json_text import each_once
from jaxtron.plan.memory_use import MemoryUse
from jaxtron.plan.plan import FORMAT, Plan
from jaxtron.plan.table import aligned
from jaxtron.words import readable_bytes, readable_seconds

# of a plan's memory, what is no class of bytes
_NO_CLASS = {"capacity", "stages", "total", "fits"}
_CLASSES = {field.name for field in dataclasses.fields(MemoryUse)} - _NO_CLASS | {"total"}


class _Row(BaseModel):
    key: tuple[str, tuple[str, ...], tuple[int, ...], Any]
    payload: FiniteFloat
    each: FiniteFloat


class _Prediction(BaseModel):
    step_seconds: FiniteFloat = Field(gt=0)
    mfu: FiniteFloat


class _Class(BaseModel):
    seconds: FiniteFloat


class _Bound(_Prediction):
    classes: dict[str, _Class]


class _SavedPlan(BaseModel):
    """What a comparison reads of a plan; it has more."""

    memory: dict[str, Any]
    communication: tuple[_Row, ...]
    prediction: _Prediction
    bound: _Bound

    @model_validator(mode="after")
    def _check(self) -> "_SavedPlan":
        for name in _CLASSES:
            if type(self.memory.get(name)) is not int:
                raise ValueError(f"memory.{name} is no number of bytes")
        return self


def read_plan(path: Path) -> dict[str, Any]:
    """A plan that `--json` wrote; a `UserError` for anything else."""
    try:
        found = json.loads(path.read_text(), object_pairs_hook=each_once)
    except OSError as error:
        raise UserError(f"cannot read the plan {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is no plan: it is not JSON; write one with --json") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path} is no plan of this version (format {FORMAT}); write it again with --json")
    try:
        _SavedPlan.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{path} is a damaged plan: {where and f'{where}: '}{what}; write it again with --json"
        ) from None
    return found


def changes_text(before: dict[str, Any], plan: Plan) -> str:
    """A line for each figure that differs, what the change adds with a plus."""
    after = json.loads(json.dumps(plan.json()))
    changes = (_memory, _communication, _prediction, _bound)
    rows = [row for of in changes for row in of(before, after)]
    if not rows:
        return "changes: none"
    return "\n".join(["changes:", *aligned([(f"  {name}", *cells) for name, *cells in rows], right=(1, 2, 3))])


def _memory(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    old, new = before["memory"], after["memory"]
    names = [name for name in new if name not in _NO_CLASS] + ["total"]
    return [
        (
            f"memory, {name.replace('_', ' ')}",
            readable_bytes(old[name]),
            readable_bytes(new[name]),
            _signed(new[name] - old[name]),
        )
        for name in names
        if new[name] != old[name]
    ]


def _communication(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Payload of a step, and of one round of the innermost loop, such as a layer, where the loops are the same."""
    old, new = ({_key(row): row for row in plan["communication"]} for plan in (before, after))
    found = []
    for key in dict.fromkeys((*new, *old)):
        was, now = (rows[key]["payload"] if key in rows else 0 for rows in (old, new))
        if was != now:
            found.append((f"{key} a step", readable_bytes(was), readable_bytes(now), _signed(now - was)))
        was, now = (rows[key]["each"] if key in rows else 0 for rows in (old, new))
        if was != now and "in loops" in key:
            found.append((f"{key} a round", readable_bytes(was), readable_bytes(now), _signed(now - was)))
    return found


def _key(row: dict[str, Any]) -> str:
    kind, axes, loops, _ = row["key"]
    place = f" in loops {' x '.join(str(trips) for trips in loops)}" if loops else " once"
    return f"{kind} over {','.join(axes) or 'nothing'}{place}"


def _prediction(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return _times(before["prediction"], after["prediction"], "")


def _bound(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The bound and, where it changed, the seconds of each class of kernels."""
    old, new = before["bound"], after["bound"]
    rows = _times(old, new, ", bound")
    for name in dict.fromkeys((*new["classes"], *old["classes"])):
        was, now = (plan["classes"].get(name, {"seconds": 0.0})["seconds"] for plan in (old, new))
        if rows and was != now:
            sign = "+" if now > was else "-"
            change = f"{sign}{readable_seconds(abs(now - was))}"
            rows.append((f"bound, {name}", readable_seconds(was), readable_seconds(now), change))
    return rows


def _times(old: dict[str, Any], new: dict[str, Any], kind: str) -> list[tuple[str, str, str, str]]:
    if old["step_seconds"] == new["step_seconds"]:
        return []
    was, now = old["step_seconds"], new["step_seconds"]
    rows = [(f"step time{kind}", readable_seconds(was), readable_seconds(now), f"{now / was - 1:+.1%}")]
    change = f"{100 * (new['mfu'] - old['mfu']):+.1f} points"
    return [*rows, (f"MFU{kind}", f"{old['mfu']:.1%}", f"{new['mfu']:.1%}", change)]


def _signed(change: float) -> str:
    return ("+" if change > 0 else "-") + readable_bytes(abs(change))
