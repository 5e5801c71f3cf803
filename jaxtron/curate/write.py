"""The second look at a part of the input: what stays is written, what goes is listed with its reason."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from jaxtron.curate import rows
from jaxtron.curate.criteria import decontaminate
from jaxtron.curate.criteria.decontaminate import Cut
from jaxtron.curate.criteria.duplicates import Numbers, among
from jaxtron.curate.group import alike_drops, equal_drops
from jaxtron.curate.records import FilePart, Record, read_records, record_id, with_text, write_json, written_whole
from jaxtron.curate.work import Job, load, save

EXAMPLES = 3
EXAMPLE_CHARACTERS = 100


@dataclass
class Tally:
    """Documents and UTF-8 bytes of text: read, written, and dropped for each reason, with a few examples."""

    documents: int = 0
    bytes: int = 0
    kept_documents: int = 0
    kept_bytes: int = 0
    cut_documents: int = 0
    cut_bytes: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        """Adds what another part has."""
        for name in ("documents", "bytes", "kept_documents", "kept_bytes", "cut_documents", "cut_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, (documents, size) in other.dropped.items():
            mine = self.dropped.setdefault(reason, [0, 0])
            mine[0] += documents
            mine[1] += size
        for reason, examples in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + examples)[:EXAMPLES]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a document: its line as it is (texts is none), or other texts, or nothing; and why."""

    record: Record
    size: int
    texts: list[str] | None
    entry: dict[str, Any] | None


def decide(job: Job) -> None:
    """Writes which survivors go and for whom, how often the corpus has each n-gram of the tasks, and lines before."""
    equal, equal_keepers = equal_drops(job)
    alike, alike_keepers = alike_drops(job)
    # the keeper of an equal document may itself have gone for one that is alike
    gone = among(equal_keepers, alike)
    equal_keepers = np.array(equal_keepers)
    equal_keepers[gone] = alike_keepers[np.searchsorted(alike, equal_keepers[gone])]
    dropped, keepers = np.concatenate([equal, alike]), np.concatenate([equal_keepers, alike_keepers])
    jaccard = np.concatenate([np.ones(len(equal)), job.estimate(alike, alike_keepers) if len(alike) else np.empty(0)])
    is_alike = np.repeat([False, True], [len(equal), len(alike)])
    order = np.argsort(dropped)
    arrays = {"dropped": dropped, "keepers": keepers, "jaccard": jaccard, "is_alike": is_alike}
    arrays = {name: array[order] for name, array in arrays.items()}
    if "decontaminate" in job.config.steps:
        arrays["counts"] = _ngram_counts(job, arrays["dropped"])
    save(job.path("decisions", "all"), **arrays, first_lines=_first_lines(job))


def _ngram_counts(job: Job, dropped: Numbers) -> np.ndarray:
    counts = np.zeros(len(load(job.path("tasks", "ngrams") / "hashes.npy")), np.int64)
    for part in job.parts:
        hits = job.array(part.number, "hits")
        counts += np.bincount(hits[~among(hits[:, 0] + job.bounds[part.number], dropped), 2], minlength=len(counts))
    return counts


def _first_lines(job: Job) -> np.ndarray:
    """Lines of each part's file before it."""
    before, path, first_lines = 0, None, []
    for part in job.parts:
        # the same file may be given twice in a row
        before = before if part.path == path and part.start else 0
        first_lines.append(before)
        path, before = part.path, before + (read_summary(job, part.number)["lines"] or 0)
    return np.array(first_lines, np.int64)


def read_summary(job: Job, part: int) -> dict[str, Any]:
    """What the scan wrote of a part beside arrays."""
    return json.loads((job.path("scan", f"{part:05d}") / "summary.json").read_text())


def write_part(job: Job, part: FilePart) -> None:
    """Writes the curated documents of a part, its list of what went, and its tally, in this order."""
    tally = Tally()
    target = job.output / part.output_name
    with written_whole(job.path("dropped", f"{part.number:05d}.jsonl")) as dropped:

        def told() -> Iterator[Verdict]:
            for verdict in _verdicts(job, part):
                _count(tally, verdict)
                if verdict.entry is not None:
                    dropped.write(json.dumps(verdict.entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                yield verdict

        if part.has_rows:
            rows.write_rows(part.path, target, job.config.text_field, (verdict.texts for verdict in told()))
        else:
            with written_whole(target, part.taken_for.compression) as file:
                for verdict in told():
                    for line in _lines(job, verdict):
                        file.write(line + b"\n")
    write_json(job.path("written", f"{part.number:05d}.json"), asdict(tally))


def _lines(job: Job, verdict: Verdict) -> Iterator[bytes]:
    if verdict.texts is None:
        yield verdict.record.raw
        return
    for number, text in enumerate(verdict.texts):
        several = number if len(verdict.texts) > 1 else None
        yield with_text(verdict.record, job.config.text_field, job.config.id_field, text, several)


def _count(tally: Tally, verdict: Verdict) -> None:
    tally.documents += 1
    tally.bytes += verdict.size
    kept = verdict.size
    if verdict.texts is not None:
        kept = sum(len(text.encode()) for text in verdict.texts)
    if verdict.texts is None or verdict.texts:
        tally.kept_documents += 1 if verdict.texts is None else len(verdict.texts)
        tally.kept_bytes += kept
        if verdict.texts is not None:
            tally.cut_documents += 1
            tally.cut_bytes += verdict.size - kept
        return
    assert verdict.entry is not None
    reason = tally.dropped.setdefault(verdict.entry["reason"], [0, 0])
    reason[0] += 1
    reason[1] += verdict.size
    examples = tally.examples.setdefault(verdict.entry["reason"], [])
    if len(examples) < EXAMPLES:
        examples.append(verdict.entry | {"text": verdict.record.text[:EXAMPLE_CHARACTERS]})


def _verdicts(job: Job, part: FilePart) -> Iterator[Verdict]:
    """What becomes of every document of a part, in order."""
    drops = _Drops(job, part)
    hits = _Hits(job, part)
    filtered = {document: (reason, detail) for document, reason, detail in read_summary(job, part.number)["filtered"]}
    survivors = {document: i for i, document in enumerate(job.array(part.number, "documents").tolist())}
    sizes = job.array(part.number, "bytes").tolist()
    ids = _ids(job, part)
    for document, record in enumerate(read_records(part, job.config.text_field)):
        column_id = next(ids)
        entry: dict[str, Any] | None = None
        texts: list[str] | None = None
        if document in filtered:
            reason, detail = filtered[document]
            entry, texts = {"reason": reason, "detail": detail}, []
        elif survivors[document] in drops.of:
            entry, texts = drops.of[survivors[document]], []
        elif survivors[document] in hits.of:
            found = decontaminate.cut(record.text, hits.of[survivors[document]], job.config.decontaminate)
            entry, texts = _cut_entry(found, record.text, job.config.decontaminate.max_cuts)
        if entry is not None:
            place = {"file": part.path, "line": drops.first_line + record.line}
            name = record_id(record, job.config.id_field) if record.raw else column_id
            entry = place | ({} if name is None else {"id": name}) | entry
        yield Verdict(record, sizes[document], texts, entry)


def _cut_entry(found: Cut, text: str, max_cuts: int) -> tuple[dict[str, Any], list[str]]:
    """Why a document with hits goes, or how it is cut; and the texts that stay."""
    if len(found.removed) > max_cuts:
        return {"reason": "decontaminate.max_cuts", "detail": len(found.removed)}, []
    entry = {"reason": "decontaminate.cut", "removed": found.removed, "kept": found.kept}
    if not found.kept:
        entry["reason"] = "decontaminate.least"
    return entry, [text[start:end] for start, end in found.kept]


class _Drops:
    """Entries of a part's survivors that go for another document, by their place among its survivors."""

    def __init__(self, job: Job, part: FilePart):
        folder = job.path("decisions", "all")
        names = ("dropped", "keepers", "jaccard", "is_alike", "first_lines")
        dropped, keepers, jaccard, is_alike, first_lines = (load(folder / f"{name}.npy") for name in names)
        self.first_line = int(first_lines[part.number])
        start, end = job.bounds[part.number], job.bounds[part.number + 1]
        mine = slice(*np.searchsorted(dropped, [start, end]))
        parts = np.searchsorted(job.bounds, keepers[mine], side="right") - 1
        lines = job.gather("lines", keepers[mine]) + first_lines[parts] if len(parts) else parts
        found = zip(dropped[mine], parts, lines, jaccard[mine], is_alike[mine], strict=True)
        self.of: dict[int, dict[str, Any]] = {}
        for number, keeper_part, line, similarity, alike in found:
            keeper = {"file": job.parts[keeper_part].path, "line": int(line)}
            detail = {"estimated_jaccard": round(float(similarity), 4)} if alike else {}
            self.of[int(number - start)] = {"reason": "near" if alike else "exact", "keeper": keeper, **detail}


class _Hits:
    """First words and sizes of a part's hits that are cut, by their place among its survivors."""

    def __init__(self, job: Job, part: FilePart):
        self.of: dict[int, list[tuple[int, int]]] = {}
        if "decontaminate" in job.config.steps:
            counts = load(job.path("decisions", "all") / "counts.npy")
            sizes = load(job.path("tasks", "ngrams") / "sizes.npy")
            hits = job.array(part.number, "hits")
            rare = hits[counts[hits[:, 2]] <= job.config.decontaminate.max_count]
            for survivor, first, size in zip(rare[:, 0].tolist(), rare[:, 1].tolist(), sizes[rare[:, 2]], strict=True):
                self.of.setdefault(survivor, []).append((first, int(size)))


def _ids(job: Job, part: FilePart) -> Iterator[Any]:
    if part.has_rows:
        yield from rows.read_column(part.path, job.config.id_field)
    while True:
        yield None
