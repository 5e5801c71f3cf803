"""Restoring: the newest checkpoint that is whole, or an error; never silently something else."""

import json
import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxtron.checkpoint import record as records
from jaxtron.checkpoint.names import first_difference, name_of, signature
from jaxtron.checkpoint.processes import gather_texts
from jaxtron.checkpoint.record import CheckpointRecord, DamageError, Signature
from jaxtron.checkpoint.storage import read_arrays
from jaxtron.config import UserError

logger = logging.getLogger(__name__)

_COMMITTED = re.compile(r"step_(\d{8,})")
_UNFINISHED = re.compile(r"step_(\d{8,})\.orbax-checkpoint-tmp.*")

MOST_TRIES = 5
Check = Callable[[dict[str, Any]], None]
Choose = Callable[[Signature, Signature], Collection[str]]
# what else than the model differs, by the first part of an array's name
_PARTS = {"optimizer": "optimizer", "loss_scale": "train.precision", "updates": "version of Jaxtron"}
# a part that begins anew where a checkpoint has none, or another
OPTIONAL = "health"


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was not used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint; `skipped` are the newer ones that could not be used."""

    step: int
    state: PyTree
    extra: dict[str, Any]
    skipped: tuple[Skipped, ...]


def step_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return directory / f"step_{step:08d}"


def committed_steps(directory: Path) -> list[int]:
    """The steps that have a finished checkpoint on disk, oldest first; damaged ones are among them.

    All processes call this, and get what the first one sees.
    """
    return _matching_steps(directory, _COMMITTED)


def _matching_steps(directory: Path, pattern: re.Pattern[str]) -> list[int]:
    paths = directory.iterdir() if directory.is_dir() else ()
    steps = sorted(int(match[1]) for path in paths if (match := pattern.fullmatch(path.name)))
    return json.loads(gather_texts(json.dumps(steps))[0])


def restore_newest(
    directory: Path, abstract_state: PyTree, check: Check = lambda _: None, on_disk: Signature | None = None
) -> Restored | None:
    """Restore the newest whole checkpoint of a directory, or None where none was ever finished.

    `abstract_state` has a `jax.ShapeDtypeStruct` with a sharding, of any mesh, for each array. All processes call this.
    `check` sees what was saved beside the arrays before these are read, and may refuse it. `on_disk` is the signature
    without padding, where arrays have some: it is zeros. What is `OPTIONAL` is zeros where it is not there as here. A
    `UserError` if every checkpoint is damaged, or the newest whole one is of another model or optimizer.
    """
    found, skipped = _newest_whole(directory)
    if found is not None:
        step, record = found
        path = step_path(directory, step)
        _tell(skipped)
        check(record.extra)
        wanted = on_disk or signature(abstract_state)
        stored, rest, wanted = _without_other_optional(record.arrays, abstract_state, wanted)
        _check_model(path, stored, wanted)
        state = jax.tree.map(
            lambda like, leaf: (
                jax.device_put(np.zeros(like.shape, like.dtype), like.sharding) if leaf is None else leaf
            ),
            abstract_state,
            read_arrays(path, rest, stored),
        )
        return Restored(step, state, record.extra, skipped)
    if committed_steps(directory):
        raise UserError(
            f"every checkpoint in {directory} is damaged ({_reasons(skipped)}); "
            "bring back a good copy, or start anew in another --run.directory"
        )
    _tell(skipped)
    return None


def restore_part(
    directory: Path,
    abstract_part: dict[str, PyTree],
    *,
    step: int | None = None,
    check: Check = lambda _: None,
    on_disk: Signature | None = None,
    choose: Choose | None = None,
) -> Restored:
    """Restore some of a state, such as `{"params": ...}` whole, of the newest whole checkpoint or that of `step`.

    `abstract_part`, `check`, `on_disk` and the callers are as in `restore_newest`. A `UserError` if there is no such
    checkpoint, it is damaged, or this part of it is of another model. `choose` gets what is there and what is wanted,
    and gives the names of what is read; all else is None.
    """
    wanted = on_disk or signature(abstract_part)
    for _ in range(MOST_TRIES):
        committed = committed_steps(directory)
        try:
            return _restore_part(directory, abstract_part, committed, step, check, wanted, choose)
        except (OSError, ValueError):
            # a run that goes on may have replaced the checkpoint by a newer one while it was read; of several
            # processes others may have read it
            if step is not None or jax.process_count() > 1 or committed_steps(directory) == committed:
                raise
    raise UserError(
        f"checkpoints in {directory} are replaced faster than one can be read; raise --checkpoint.keep there"
    )


def _restore_part(
    directory: Path,
    abstract_part: dict[str, PyTree],
    committed: list[int],
    step: int | None,
    check: Check,
    wanted: Signature,
    choose: Choose | None,
) -> Restored:
    if step is not None and step not in committed:
        there = f"there are those of {', '.join(map(str, committed))}" if committed else "there is none at all"
        raise UserError(f"no finished checkpoint of step {step} in {directory}; {there}")
    found, skipped = _newest_whole(directory, only=step)
    if found is None:
        reasons = f" ({_reasons(skipped)})" if skipped else ""
        raise UserError(f"no checkpoint in {directory} can be used{reasons}; train first, or bring back a good copy")
    newest, record = found
    path = step_path(directory, newest)
    _tell(skipped)
    check(record.extra)
    stored = {name: array for name, array in record.arrays.items() if name.partition(".")[0] in abstract_part}
    if choose is not None:
        names = choose(stored, wanted)
        stored = {name: array for name, array in stored.items() if name in names}
        wanted = {name: array for name, array in wanted.items() if name in names}
        abstract_part = jax.tree.map_with_path(
            lambda where, leaf: leaf if name_of(where) in names else None, abstract_part
        )
    difference = first_difference(stored, wanted)
    if difference:
        raise UserError(f"checkpoint {path} is of another model than the configuration here: {difference}")
    return Restored(newest, read_arrays(path, abstract_part, record.arrays), record.extra, skipped)


def _newest_whole(
    directory: Path, *, only: int | None = None
) -> tuple[tuple[int, CheckpointRecord] | None, tuple[Skipped, ...]]:
    """Step and record of the newest whole checkpoint (`only`: if it is this one's), and the newer ones that are not."""
    committed = committed_steps(directory)
    unfinished = _matching_steps(directory, _UNFINISHED)
    skipped: list[Skipped] = []
    for step in sorted({*committed, *unfinished} if only is None else {only}, reverse=True):
        if step in unfinished:
            reason = "unfinished: a run ended while writing it, or is writing it"
            skipped.append(Skipped(step_path(directory, step), reason))
        if step not in committed:
            continue
        path = step_path(directory, step)
        record, damage = _examine(path)
        if damage and not path.exists():
            # a run that goes on replaced it by a newer one
            continue
        if record is None or damage:
            skipped.append(Skipped(path, damage))
            continue
        return (step, record), tuple(skipped)
    return None, tuple(skipped)


def _reasons(skipped: tuple[Skipped, ...]) -> str:
    return "; ".join(f"{one.path.name}: {one.reason}" for one in skipped)


def _examine(path: Path) -> tuple[CheckpointRecord | None, str]:
    """The record of a checkpoint and what is damaged in it, "" for nothing; the same on all processes."""
    record, damage = None, ""
    try:
        record = records.read(path)
        records.verify(path, record.files, share=jax.process_index(), num_shares=jax.process_count())
    except DamageError as error:
        damage = str(error)
    return record, next((text for text in gather_texts(damage) if text), "")


def _tell(skipped: tuple[Skipped, ...]) -> None:
    """Says what was passed over; an error has the reasons itself."""
    for one in skipped if jax.process_index() == 0 else ():
        logger.warning("checkpoint %s is not used: %s", one.path, one.reason)


def _without_other_optional(
    stored: Signature, abstract_state: PyTree, wanted: Signature
) -> tuple[Signature, PyTree, Signature]:
    """The same, all three without what is `OPTIONAL` where that differs."""
    there, here = (
        {name: array for name, array in one.items() if name.startswith(f"{OPTIONAL}.")} for one in (stored, wanted)
    )
    if there == here:
        return stored, abstract_state, wanted
    rest = jax.tree.map_with_path(lambda path, leaf: None if name_of(path) in here else leaf, abstract_state)
    stored, wanted = (
        {name: array for name, array in one.items() if name not in own}
        for one, own in ((stored, there), (wanted, here))
    )
    return stored, rest, wanted


def _check_model(path: Path, stored: Signature, wanted: Signature) -> None:
    difference = first_difference(stored, wanted)
    if difference:
        differing = {
            name.partition(".")[0] for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name)
        }
        what = "model" if differing - _PARTS.keys() else " and ".join(_PARTS[part] for part in sorted(differing))
        raise UserError(
            f"checkpoint {path} is of another {what}: {difference}; "
            "choose another --run.directory, or the configuration that wrote it"
        )
