"""Tasks that compare documents of all parts: equal texts, candidates, their shingles, and pairs that are alike."""

from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64

from jaxtron.curate.criteria.duplicates import (
    Numbers,
    among,
    dropped_of_components,
    equal_documents,
    shared_keys,
    similar_pairs,
)
from jaxtron.curate.records import FilePart, read_records
from jaxtron.curate.scan import document_shingles
from jaxtron.curate.work import Job, load, save

SHINGLE_DOCUMENTS = 256


def num_shares(job: Job) -> int:
    """Into how many shares, by hash, documents are split so that a task can hold one."""
    return max(1, -(-int(job.bounds[-1]) // job.config.group_documents))


def group_equal(job: Job, share: int) -> None:
    """Finds documents that equal an earlier one, among those of one share of the hashes."""
    shares = num_shares(job)
    hashes, numbers = [], []
    for part in job.parts:
        found = job.array(part.number, "equality")
        mine = np.flatnonzero(found[:, 0] % np.uint64(shares) == share)
        hashes.append(found[mine])
        numbers.append(mine + job.bounds[part.number])
    rows = np.concatenate(hashes)
    dropped, keepers = equal_documents([rows[:, 0], rows[:, 1]], np.concatenate(numbers))
    save(job.path("equal", f"{share:03d}"), dropped=dropped, keepers=keepers)


def equal_drops(job: Job) -> tuple[Numbers, Numbers]:
    """All documents that equal an earlier one, in order, and that one."""
    if "exact" not in job.config.steps:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    dropped, keepers = _joined(job, "equal", "dropped"), _joined(job, "equal", "keepers")
    order = np.argsort(dropped)
    return dropped[order], keepers[order]


def find_candidates(job: Job, task: tuple[int, int]) -> None:
    """Writes which documents share a key of one band, within one share of the keys."""
    members, bounds = _shared(job, *task)
    save(job.path("candidates", task_name(task)), members=members, bounds=bounds)


def write_shingles(job: Job, part: FilePart) -> None:
    """Writes the distinct shingles of every candidate in a part, for exact Jaccard indices."""
    first, end = job.bounds[part.number], job.bounds[part.number + 1]
    members = _joined(job, "candidates", "members")
    wanted = np.unique(members[(members >= first) & (members < end)])
    places = set(job.array(part.number, "documents")[wanted - first].tolist())
    texts: list[str] = []
    sets: list[np.ndarray] = []
    records = enumerate(read_records(part, job.config.text_field)) if places else ()
    for place, record in records:
        if place in places:
            texts.append(record.text)
        if len(texts) == SHINGLE_DOCUMENTS:
            sets += _distinct(texts, job)
            texts = []
    sets += _distinct(texts, job)
    bounds = np.cumsum([0, *map(len, sets)])
    hashes = np.concatenate([np.empty(0, np.uint64), *sets])
    save(job.path("shingles", f"{part.number:05d}"), numbers=wanted, bounds=bounds, hashes=hashes)


def link_alike(job: Job, task: tuple[int, int]) -> None:
    """Writes the pairs of one band and share that are alike."""
    near = job.config.near
    if near.verify == "exact":
        folder = job.path("candidates", task_name(task))
        members, bounds, similarity = load(folder / "members.npy"), load(folder / "bounds.npy"), job.exact
    else:
        (members, bounds), similarity = _shared(job, *task), job.estimate
    save(job.path("alike", task_name(task)), pairs=similar_pairs(members, bounds, similarity, near.jaccard))


def alike_drops(job: Job) -> tuple[Numbers, Numbers]:
    """All documents but one of each component of alike pairs, in order, and that one."""
    if "near" not in job.config.steps:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    lengths = (lambda numbers: job.gather("characters", numbers)) if job.config.near.keep == "longest" else None
    return dropped_of_components(_joined(job, "alike", "pairs"), lengths)


def _shared(job: Job, band: int, share: int) -> tuple[Numbers, Int64[np.ndarray, "Bounds"]]:
    """Documents of a share that have a key of the band in common, without those that equal another."""
    equal, _ = equal_drops(job)
    shares = num_shares(job)
    keys, numbers = [], []
    for part in job.parts:
        found = job.array(part.number, "keys")[band]
        mine = np.flatnonzero(found % np.uint64(shares) == share)
        mine = mine[~among(mine + job.bounds[part.number], equal)]
        keys.append(found[mine])
        numbers.append(mine + job.bounds[part.number])
    return shared_keys(np.concatenate(keys), np.concatenate(numbers))


def _distinct(texts: list[str], job: Job) -> list[UInt64[np.ndarray, "N"]]:
    hashes, bounds = document_shingles(texts, job.config)
    return [np.unique(hashes[start:end]) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def _joined(job: Job, stage: str, name: str) -> np.ndarray:
    folders: list[Path] = sorted(path for path in (job.folder / stage).iterdir() if path.suffix != ".partial")
    return np.concatenate([load(folder / f"{name}.npy") for folder in folders])


def task_name(task: tuple[int, int]) -> str:
    """The folder of a band and a share."""
    return f"{task[0]:03d}-{task[1]:03d}"
