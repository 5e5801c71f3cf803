"""Copies of the state beside its checkpoints: in the hosts' memory and on their own disks, more often and nearer by.

Each process writes what its devices have to a file, which outlives it: a lost process ends all others, and what they
hold in themselves is gone with them. Files in memory stay for as long as their host; against the loss of a host each
part is in the memory of another one too. A step's copy is whole where every process's part is somewhere.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.checkpoint.processes import gather_texts
from jaxtron.checkpoint.record import DamageError
from jaxtron.checkpoint.tiers.part_file import TEMPORARY, PartHead, Pieces, read_head, read_part, write_part
from jaxtron.checkpoint.tiers.peers import Peers, fetch, keepers
from jaxtron.checkpoint.tiers.pieces import layout_of, local_bytes, names_needed, put, take
from jaxtron.checkpoint.tiers.places import IDENTITY_FILE, check_room, homes
from jaxtron.command import write_whole
from jaxtron.config import UserError
from jaxtron.typing import PyTree

# two that are whole, while a third is written: another process may be one copy behind
KEPT = 2
WORD = re.compile("[0-9a-f]{16}")
PATTERN = "step_{:08d}.part_{:05d}"


@dataclass(frozen=True)
class CopyTier:
    """One place for copies: `memory` or `local`, its directory on this host for this run, and every how many steps."""

    name: str
    directory: Path
    every: int
    synced: bool
    peers: Peers | None = None


@dataclass(frozen=True)
class FoundCopy:
    """A copy that was restored: from which tier, the step's state, and what its checkpoint would say beside it."""

    tier: str
    step: int
    state: PyTree
    extra: dict[str, Any]


class Copies:
    """The copies of one run; every process has one and calls its methods at the same steps. `close` it in the end.

    `abstract` is the state's, with shardings, and `order` says how layers lie in it, where that is not in the shapes.
    A `UserError` on every process where a place cannot be written to, or has no room.
    """

    def __init__(
        self, config: CheckpointConfig, run_directory: Path, mesh: Mesh, abstract: PyTree, order: str = ""
    ) -> None:
        self._abstract, self._layout = abstract, layout_of(abstract, order, str(jax.process_count()))
        self._identity = run_directory / IDENTITY_FILE
        self._run = _run_of(self._identity)
        self._tiers = tuple(_tiers(config, self._run, mesh))
        for tier in self._tiers:
            for left in tier.directory.glob(f"*{TEMPORARY}"):
                # by a process that was killed
                left.unlink(missing_ok=True)
            share = local_bytes(abstract) * (1 if tier.peers is None else 2) * (KEPT + 1)
            try:
                check_room(f"checkpoint.{tier.name}_every {tier.every}", tier.directory, share)
            except UserError:
                self._leave()
                raise
        self._background = ThreadPoolExecutor(1, thread_name_prefix="copies")
        self._writing: dict[str, tuple[int, Future[None]]] = {}
        self._problems: list[tuple[int, str]] = []
        self.count, self.seconds = 0, 0.0

    def is_due(self, step: int) -> bool:
        """Whether any place gets a copy after this step."""
        return any(step % tier.every == 0 for tier in self._tiers)

    def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
        """Copy the state for the tiers that are due; returns when it may be donated, before files are written.

        A copy that cannot be written costs nobody the run: `take_problems` tells of it.
        """
        begun = time.perf_counter()
        if self.count == 0 and jax.process_index() == 0:
            # only now: a run that could not begin leaves nothing
            write_whole(self._identity, self._run + "\n")
        due = [tier for tier in self._tiers if step % tier.every == 0]
        for tier in due:
            self._finish(tier.name)
        own = take(state)
        for tier in due:
            # this step is done, so every process has written the copy before the last
            _prune(tier.directory, KEPT)
        head = PartHead(self._run, step, jax.process_index(), jax.process_count(), self._layout, extra)
        for tier in due:
            parts = [(head, own)]
            if tier.peers is not None:
                parts.append((replace(head, process=tier.peers.of), tier.peers.receive(state)))
            self._writing[tier.name] = (step, self._background.submit(_write, tier, parts))
        self.count += 1
        self.seconds += time.perf_counter() - begun

    def restore(self, *, newer_than: int, check: Callable[[dict[str, Any]], None] = lambda _: None) -> FoundCopy | None:
        """The newest whole copy of a step after this one; None where there is none. All processes call this.

        Of equal steps that in memory. Parts that a process has not are fetched from whoever has them. `check` may
        refuse what is beside the arrays.
        """
        self.wait()
        found = []
        for tier in self._tiers:
            everybody = [json.loads(text) for text in gather_texts(json.dumps(self._parts(tier)))]
            for step in {step for parts in everybody for step in parts}:
                holders = [
                    [process for process, parts in enumerate(everybody) if part in parts.get(step, [])]
                    for part in range(jax.process_count())
                ]
                if int(step) > newer_than and all(holders):
                    found.append((int(step), tier, holders))
        for step, tier, holders in sorted(found, key=lambda one: (-one[0], one[1].name != "memory")):
            part = self._read(tier, step, holders)
            if part is not None:
                head, pieces = part
                check(head.extra)
                return FoundCopy(tier.name, step, put(pieces, self._abstract), head.extra)
        return None

    def drop_after(self, step: int) -> None:
        """Remove copies of later steps, which the run will take again, perhaps otherwise."""
        self.wait()
        for tier in self._tiers:
            for path, found in _files(tier.directory):
                if found > step:
                    path.unlink(missing_ok=True)

    def take_problems(self) -> list[tuple[int, str]]:
        """Steps whose copies could not be written since the last call, and why."""
        problems, self._problems = self._problems, []
        return problems

    def wait(self) -> None:
        """Block until the files are written."""
        for name in list(self._writing):
            self._finish(name)

    def close(self, *, remove: bool = False) -> None:
        """End the background thread; with `remove` the copies go, for a checkpoint has taken their place."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
        if remove:
            for tier in self._tiers:
                shutil.rmtree(tier.directory, ignore_errors=True)
        self._leave()

    def _leave(self) -> None:
        """Remove directories with nothing in them."""
        for tier in self._tiers:
            with contextlib.suppress(OSError):
                tier.directory.rmdir()

    def _finish(self, name: str) -> None:
        writing = self._writing.pop(name, None)
        if writing is None:
            return
        step, future = writing
        try:
            future.result()
        except OSError as error:
            self._problems.append((step, f"{name}: {error.strerror or error}"))

    def _parts(self, tier: CopyTier) -> dict[str, list[int]]:
        """By step, the parts here that say they are of this run and this layout."""
        parts: dict[str, list[int]] = {}
        for path, step in _files(tier.directory):
            try:
                head = read_head(path)
            except DamageError:
                continue
            if (head.run, head.step, head.layout) == (self._run, step, self._layout):
                parts.setdefault(str(step), []).append(head.process)
        return parts

    def _read(self, tier: CopyTier, step: int, holders: list[list[int]]) -> tuple[PartHead, Pieces] | None:
        """This process's part, fetched where it is not here; None on all where one process's cannot be had whole."""
        me = jax.process_index()
        part = self._own(tier, step) if me in holders[me] else None
        for _ in range(1 + max(map(len, holders))):
            lacking = [process for process, text in enumerate(gather_texts("" if part else "lacks it")) if text]
            if not lacking:
                return part
            for process in lacking:
                others = [holder for holder in holders[process] if holder != process]
                if not others:
                    return None
                holders[process] = others[1:]
                fetch(tier.directory / PATTERN.format(step, process), others[0], process)
            if me in lacking:
                part = self._own(tier, step)
        return None

    def _own(self, tier: CopyTier, step: int) -> tuple[PartHead, Pieces] | None:
        try:
            head, pieces = read_part(tier.directory / PATTERN.format(step, jax.process_index()))
        except DamageError:
            return None
        fits = (head.run, head.step, head.layout) == (self._run, step, self._layout)
        return (head, pieces) if fits and names_needed(self._abstract) <= pieces.keys() else None


def _tiers(config: CheckpointConfig, run: str, mesh: Mesh) -> Iterator[CopyTier]:
    """Those that the settings name; every process has all of them or none."""
    for name, above in homes(config).items():
        directory = above / run
        directory.mkdir(mode=0o700, exist_ok=True)
        if name == "local":
            yield CopyTier(name, directory, config.local_every, synced=True)
            continue
        to = keepers(gather_texts(f"{os.uname().nodename}:{directory}"))
        peers = None if to is None else Peers(mesh, to)
        yield CopyTier(name, directory, config.memory_every, synced=False, peers=peers)


def _run_of(path: Path) -> str:
    """What tells a run from another that was in its directory before: what the file says, or a new word."""
    found = ""
    if jax.process_index() == 0:
        said = path.read_text(errors="replace").strip() if path.is_file() else ""
        # it becomes the name of a directory
        found = said if WORD.fullmatch(said) else secrets.token_hex(8)
    return gather_texts(found)[0]


def _write(tier: CopyTier, parts: list[tuple[PartHead, Pieces]]) -> None:
    """In the background: a file for each part, if all numbers in it are finite."""
    for head, pieces in parts:
        if all(_is_finite(piece) for piece in pieces.values()):
            write_part(tier.directory / PATTERN.format(head.step, head.process), head, pieces, synced=tier.synced)


def _is_finite(piece: np.ndarray) -> bool:
    return not jnp.issubdtype(piece.dtype, jnp.inexact) or bool(np.isfinite(piece).all())


def _files(directory: Path) -> list[tuple[Path, int]]:
    """Files of parts with their steps; what is half written is none."""
    names = directory.glob("step_*.part_*") if directory.is_dir() else ()
    found = ((path, path.name[len("step_") :].partition(".")[0]) for path in names)
    return [(path, int(step)) for path, step in found if step.isdigit() and path.suffix != TEMPORARY]


def _prune(directory: Path, keep: int) -> None:
    """Remove all but the files of the newest steps."""
    files = _files(directory)
    kept = sorted({step for _, step in files})[-keep:]
    for path, step in files:
        if step not in kept:
            path.unlink(missing_ok=True)
