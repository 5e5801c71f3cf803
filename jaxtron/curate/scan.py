"""The first look at a part of the input: filters, hashes, signatures and hits of all its documents."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from jaxtron.config import UserError
from jaxtron.curate.config import Curation
from jaxtron.curate.criteria import hashing, language, minhash, quality
from jaxtron.curate.criteria.decontaminate import TaskNgrams, find_hits
from jaxtron.curate.criteria.hashing import Units
from jaxtron.curate.criteria.minhash import Bands
from jaxtron.curate.criteria.quality import Broken
from jaxtron.curate.records import FilePart, Record, count_lines, read_records
from jaxtron.curate.work import Job, load, write_folder

# whose words are hashed at once: more are no faster and leave the cache
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What is found of a batch of texts.

    `broken` has the rule that each text breaks; `arrays` have a row for each text that breaks none, a survivor;
    `hits` are rows of survivor, first word and number of the task's n-gram, none where no tasks are given.
    """

    broken: list[Broken | None]
    arrays: dict[str, np.ndarray]
    hits: Int64[np.ndarray, "N 3"] | None


def examine(texts: list[str], config: Curation, bands: Bands | None, tasks: TaskNgrams | None) -> Facts:
    """All that the steps need to know of the texts; a pure function, the same wherever it runs."""
    broken: list[Broken | None] = [None] * len(texts)
    units = hashing.words(texts) if _needs_words(config) else None

    def apply(rule: Callable[[list[str], Int64[np.ndarray, "N"]], Sequence[Broken | None]]) -> None:
        places = _unbroken(broken)
        for place, found in zip(places.tolist(), rule([texts[i] for i in places], places), strict=True):
            broken[place] = found

    if "length" in config.steps:
        apply(lambda texts, _: [quality.broken_length(text, config.length) for text in texts])
    if "quality" in config.steps and units is not None:
        apply(lambda texts, places: quality.broken_rules(texts, units.of(places), config.quality))
    if "language" in config.steps:
        apply(lambda texts, _: language.broken_language(texts, config.language))
    survivors = _unbroken(broken)
    texts = [texts[i] for i in survivors]
    arrays: dict[str, np.ndarray] = {"characters": np.array([len(text) for text in texts], np.int64)}
    if "exact" in config.steps:
        plain = map(hashing.normalized, texts) if config.exact.normalize else texts
        arrays["equality"] = np.array([hashing.text_hash(text) for text in plain], np.uint64).reshape(-1, 2)
    if "near" in config.steps and bands is not None:
        shingles, bounds = document_shingles(texts, config, None if units is None else units.of(survivors))
        arrays["signatures"] = minhash.signatures(shingles, bounds, config.near.hashes, config.near.seed)
        # a document without shingles is like no other
        arrays["keys"] = minhash.band_keys(arrays["signatures"], bands) * (np.diff(bounds) > 0)[:, None]
    hits = None
    if tasks is not None and units is not None:
        hits = np.stack(find_hits(units.of(survivors), tasks), axis=1)
    return Facts(broken, arrays, hits)


def document_shingles(
    texts: Sequence[str], config: Curation, words: Units | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the shingles of each text, and where each text's begin."""
    if config.near.unit == "characters":
        return hashing.shingles(hashing.characters(texts), config.near.shingle)
    return hashing.shingles(hashing.words(texts) if words is None else words, config.near.shingle)


def scan_part(job: Job, part: FilePart) -> None:
    """Writes what is found of a part's documents to the work folder."""
    tasks = None
    if "decontaminate" in job.config.steps:
        folder = job.path("tasks", "ngrams")
        tasks = TaskNgrams(load(folder / "hashes.npy"), load(folder / "sizes.npy"))
    # an empty batch first: the arrays of a part without documents have their types and shapes
    empty = examine([], job.config, job.bands, tasks)
    columns = {
        name: [array] for name, array in (empty.arrays | {"documents": _integers(), "lines": _integers()}).items()
    }
    sizes, hits = [_integers()], [np.empty((0, 3), np.int64)]
    filtered: list[tuple[int, str, Any]] = []
    documents = survivors = 0
    for batch in _batches(read_records(part, job.config.text_field)):
        sound = [place for place, record in enumerate(batch) if record.damage is None]
        if len(sound) < len(batch) and job.config.damaged == "error":
            raise _damage_error(part, next(record for record in batch if record.damage is not None))
        filtered += [(documents + i, "damaged", record.damage) for i, record in enumerate(batch) if record.damage]
        facts = examine([batch[i].text for i in sound], job.config, job.bands, tasks)
        filtered += [(documents + i, *broken) for i, broken in zip(sound, facts.broken, strict=True) if broken]
        kept = [i for i, broken in zip(sound, facts.broken, strict=True) if broken is None]
        numbers = {"documents": _integers(documents + i for i in kept), "lines": _integers(batch[i].line for i in kept)}
        for name, array in (facts.arrays | numbers).items():
            columns[name].append(array)
        if facts.hits is not None:
            hits.append(facts.hits + np.array([survivors, 0, 0]))
        sizes.append(_integers(len(record.raw if record.damage else record.text.encode()) for record in batch))
        documents += len(batch)
        survivors += len(kept)
    lines = None if part.end is None else count_lines(part.path, part.start, part.end)
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    arrays |= {"bytes": np.concatenate(sizes), "hits": np.concatenate(hits)}
    if "keys" in arrays:
        # a band after another: one task reads one band of every part
        arrays["keys"] = np.ascontiguousarray(arrays["keys"].T)
    summary = {"documents": documents, "survivors": survivors, "lines": lines, "filtered": sorted(filtered)}
    _write(job.path("scan", f"{part.number:05d}"), summary, arrays)


def _write(path: Path, summary: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    def write(folder: Path) -> None:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        (folder / "summary.json").write_text(json.dumps(summary))

    write_folder(path, write)


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.text)
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _damage_error(part: FilePart, record: Record) -> UserError:
    before = 0 if part.end is None else count_lines(part.path, 0, part.start)
    unit = "line" if record.raw else "row"
    return UserError(
        f"{part.path} {unit} {before + record.line}: {record.damage}; mend it, set --text_field, or say --damaged drop"
    )


def _needs_words(config: Curation) -> bool:
    by_words = "near" in config.steps and config.near.unit == "words"
    return by_words or bool({"quality", "decontaminate"} & set(config.steps))


def _unbroken(broken: Sequence[Broken | None]) -> Int64[np.ndarray, "N"]:
    return _integers(place for place, found in enumerate(broken) if found is None)


def _integers(values: Any = ()) -> Int64[np.ndarray, "N"]:
    return np.fromiter(values, np.int64)
