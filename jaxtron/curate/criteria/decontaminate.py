"""Words that documents share with evaluation tasks, and the text around them (2005.14165, appendix C)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from jaxtron.config import UserError
from jaxtron.curate.config import Decontaminate
from jaxtron.curate.criteria.hashing import WORD, Units, ngrams_of_sizes, words
from jaxtron.preprocess.documents import Damage, read_documents
from jaxtron.preprocess.inputs import InputFile, Position, find_inputs, read_chunks

FILTER_BITS = 22


@dataclass(frozen=True)
class TaskNgrams:
    """Hashes of the tasks' n-grams in rising order, and the words of each."""

    hashes: UInt64[np.ndarray, "N"]
    sizes: Int64[np.ndarray, "N"]

    @cached_property
    def marks(self) -> Bool[np.ndarray, "Bits"]:
        """Marks the low bits of the hashes: most n-grams of a corpus are told apart by one look."""
        marks = np.zeros(1 << FILTER_BITS, bool)
        marks[_low_bits(self.hashes)] = True
        return marks


@dataclass(frozen=True)
class Cut:
    """Parts of a text, from character to character, that stay and that go."""

    kept: list[tuple[int, int]]
    removed: list[tuple[int, int]]


def read_tasks(config: Decontaminate, say: Callable[[str], None] = print) -> TaskNgrams:
    """The n-grams of all fields of all tasks; UserError if a file does not read or gives none."""
    if not config.tasks:
        raise UserError("the step decontaminate needs task files; say --decontaminate.tasks lambada.jsonl ...")
    hashes, sizes = [], []
    for file in find_inputs(config.tasks, config.fields, say):
        units = words(_task_texts(file, config.fields))
        lengths = np.diff(units.bounds)
        sizes_wanted = range(config.min_ngram, config.ngram + 1)
        for size, (found, places) in ngrams_of_sizes(units, sizes_wanted).items():
            documents = np.searchsorted(units.bounds, places, side="right") - 1
            # tasks that are shorter than the n-gram count as a whole
            wanted = np.full(len(found), True) if size == config.ngram else lengths[documents] == size
            hashes.append(found[wanted])
            sizes.append(np.full(int(wanted.sum()), size, np.int64))
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    if not len(unique):
        raise UserError(
            f"{' '.join(config.tasks)}: no text of {config.min_ngram} words in the fields {', '.join(config.fields)}; "
            "set --decontaminate.fields, or lower --decontaminate.min_ngram"
        )
    return TaskNgrams(unique, np.concatenate(sizes)[first])


def _task_texts(file: InputFile, fields: Sequence[str]) -> list[str]:
    if file.taken_for.kind == "text":
        raise UserError(f"the task file {file.path} is not JSONL or Parquet; convert it")
    texts: list[str] = []
    for chunk in read_chunks([file], Position(), fields):
        for piece in chunk.pieces:
            for document in read_documents(piece, fields):
                if isinstance(document, Damage):
                    raise UserError(f"{document}; mend the task file, or set --decontaminate.fields")
                texts.extend(document)
    return texts


def find_hits(
    units: Units, tasks: TaskNgrams
) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
    """Every n-gram of documents that is a task's: its document, its first word there, and its number in `tasks`."""
    documents, firsts, numbers = [], [], []
    for size, (found, places) in ngrams_of_sizes(units, np.unique(tasks.sizes).tolist()).items():
        likely = np.flatnonzero(tasks.marks[_low_bits(found)])
        number = np.minimum(np.searchsorted(tasks.hashes, found[likely]), len(tasks.hashes) - 1)
        hit = (tasks.hashes[number] == found[likely]) & (tasks.sizes[number] == size)
        place = places[likely[hit]]
        document = np.searchsorted(units.bounds, place, side="right") - 1
        documents.append(document)
        firsts.append(place - units.bounds[document])
        numbers.append(number[hit])
    return np.concatenate(documents), np.concatenate(firsts), np.concatenate(numbers)


def cut(text: str, hits: Sequence[tuple[int, int]], config: Decontaminate) -> Cut:
    """What is left of a text without its hits (first word, number of words).

    Each hit goes with `margin` characters on both sides, and on to the next white space, so that no word is cut. What
    overlaps or touches is one cut. Parts are without white space at their ends, and those of fewer than `least`
    characters are left out.
    """
    spans = [match.span() for match in WORD.finditer(text)]
    removed: list[tuple[int, int]] = []
    for first, size in sorted(hits):
        start = _space_before(text, spans[first][0] - config.margin)
        end = _space_after(text, spans[first + size - 1][1] + config.margin)
        if removed and start <= removed[-1][1]:
            start, end = removed[-1][0], max(end, removed[-1][1])
            removed.pop()
        removed.append((start, end))
    starts = [0, *(end for _, end in removed)]
    ends = [*(start for start, _ in removed), len(text)]
    kept = [_stripped(text, start, end) for start, end in zip(starts, ends, strict=True)]
    return Cut([(start, end) for start, end in kept if end - start >= max(config.least, 1)], removed)


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), start + max(len(part.rstrip()), len(part) - len(part.lstrip()))


def _space_before(text: str, place: int) -> int:
    while place > 0 and not text[place - 1].isspace():
        place -= 1
    return max(place, 0)


def _space_after(text: str, place: int) -> int:
    while place < len(text) and not text[place].isspace():
        place += 1
    return min(place, len(text))


def _low_bits(hashes: UInt64[np.ndarray, "N"]) -> Int64[np.ndarray, "N"]:
    return (hashes & np.uint64((1 << FILTER_BITS) - 1)).astype(np.int64)
