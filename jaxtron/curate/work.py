"""The work folder: what tasks leave for one another, each file or folder there in whole or not at all.

Documents that the filters keep ("survivors") are numbered through all parts in order. A part's folder has an array a
file, so that a task maps what it needs of every part and reads no more.
"""

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from jaxtron.curate.config import Curation
from jaxtron.curate.criteria.duplicates import Numbers, exact_jaccard
from jaxtron.curate.criteria.minhash import Bands, estimated_jaccard
from jaxtron.curate.records import FilePart


@dataclass(frozen=True)
class Job:
    """What every task is given: the settings, the parts of the input, and where tasks read and write."""

    config: Curation
    parts: tuple[FilePart, ...]
    folder: Path
    bands: Bands | None = None
    counts: tuple[int, ...] = field(default=())
    """Survivors of each part, known after the scan."""

    @property
    def output(self) -> Path:
        """Where curated documents go."""
        return Path(self.config.output) / "documents"

    @cached_property
    def bounds(self) -> Int64[np.ndarray, "Bounds"]:
        """The number of each part's first survivor, and how many there are."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    def path(self, stage: str, name: str) -> Path:
        """A task's file or folder."""
        return self.folder / stage / name

    def array(self, part: int, name: str) -> np.ndarray:
        """An array of a scanned part, mapped."""
        return load(self.path("scan", f"{part:05d}") / f"{name}.npy")

    def gather(self, name: str, numbers: Numbers) -> np.ndarray:
        """Rows of the scanned parts' arrays by the numbers of survivors."""
        first = self.array(0, name)
        rows = np.empty((len(numbers), *first.shape[1:]), first.dtype)
        parts = np.searchsorted(self.bounds, numbers, side="right") - 1
        for part in np.unique(parts).tolist():
            here = parts == part
            rows[here] = self.array(part, name)[numbers[here] - self.bounds[part]]
        return rows

    def estimate(self, left: Numbers, right: Numbers) -> Float64[np.ndarray, "N"]:
        """The Jaccard index of pairs of survivors by their signatures."""
        needed, places = np.unique(np.concatenate([left, right]), return_inverse=True)
        signatures = self.gather("signatures", needed)
        return estimated_jaccard(signatures[places[: len(left)]], signatures[places[len(left) :]])

    def exact(self, left: Numbers, right: Numbers) -> Float64[np.ndarray, "N"]:
        """The Jaccard index of pairs of survivors by their shingles, which a task before has written."""
        sets = self._shingle_sets(np.unique(np.concatenate([left, right])))
        return np.array([exact_jaccard(sets[a], sets[b]) for a, b in zip(left.tolist(), right.tolist(), strict=True)])

    def _shingle_sets(self, numbers: Numbers) -> dict[int, np.ndarray]:
        sets: dict[int, np.ndarray] = {}
        parts = np.searchsorted(self.bounds, numbers, side="right") - 1
        for part in np.unique(parts).tolist():
            folder = self.path("shingles", f"{part:05d}")
            known, bounds, hashes = (load(folder / f"{name}.npy") for name in ("numbers", "bounds", "hashes"))
            for number in numbers[parts == part].tolist():
                place = int(np.searchsorted(known, number))
                sets[number] = hashes[bounds[place] : bounds[place + 1]]
        return sets


def load(path: Path) -> np.ndarray:
    """An array file, mapped; a plain array where it is empty, which cannot be mapped."""
    try:
        return np.asarray(np.load(path, mmap_mode="r"))
    except ValueError:
        return np.load(path)


def save(path: Path, **arrays: np.ndarray) -> None:
    """A folder with a file for each array, which appears when whole."""
    write_folder(path, lambda folder: [np.save(folder / f"{name}.npy", array) for name, array in arrays.items()])


def write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """A folder that appears under its name once `write` has filled it; one that is there already stays."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    aside.mkdir(parents=True)
    try:
        write(aside)
        try:
            os.replace(aside, path)
        except OSError:
            # a task that an engine ran twice: both wrote the same
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
