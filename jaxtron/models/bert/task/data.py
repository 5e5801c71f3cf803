"""Examples of a task from files: rows of TSV with a header, or JSON lines."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from jaxtron.config import NoEffect, UserError
from jaxtron.data.config import PYTHON_STDLIB, Blend, DataConfig
from jaxtron.data.dataset import Data, load_data_tokenizer, wrapped
from jaxtron.data.dataset import open_data as open_windows
from jaxtron.data.files.data_path import read_data_path
from jaxtron.data.files.reader import find_files, read_lines
from jaxtron.data.files.storage import cache_root
from jaxtron.data.masked.bert import SPECIAL_TOKENS, BertVocabulary
from jaxtron.data.masked.sample import pad
from jaxtron.data.source import NO_SAMPLES, Source
from jaxtron.data.tokenizers import Tokenizer
from jaxtron.models.bert.task.batch import TaskBatch
from jaxtron.models.bert.task.columns import check_columns, text_in
from jaxtron.models.bert.task.config import BertTaskConfig
from jaxtron.models.bert.task.questions import Question, questions_of_row, windows
from jaxtron.models.encoder.special_tokens import special_tokens
from jaxtron.models.encoder.windows import WindowSamples

# what examples do not read of the data's settings
UNREAD = ("split", "samples", "fill_in_middle", "chat", "mask_end_of_document", "reset_positions", "reset_attention")


class Example(NamedTuple):
    """Of each of its texts the first and the second part, and the number of the class or of the right text."""

    texts: tuple[tuple[str, str | None], ...]
    label: int


Ids = Integer[np.ndarray, "..."]
Row = tuple[Integer[np.ndarray, "S"], Integer[np.ndarray, "S"], Integer[np.ndarray, "S"]]


@dataclass(frozen=True)
class Examples:
    """Examples as token ids, cut to a sequence's length where they are longer."""

    texts: Sequence[tuple[tuple[Ids, Ids | None], ...]]
    labels: Sequence[int]
    sequence_length: int
    vocabulary: BertVocabulary

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> TaskBatch:
        rows = [make_row(a, b, self.sequence_length, self.vocabulary) for a, b in self.texts[index]]
        return example_of(rows, self.labels[index])


def example_of(rows: Sequence[Row], label: int, weight: float = 1.0) -> TaskBatch:
    """The sample of so many texts."""
    tokens, types, segments = (np.stack(arrays) for arrays in zip(*rows, strict=True))
    return TaskBatch(tokens, types, segments, np.asarray(label, np.int32), np.asarray(weight, np.float32))


def make_row(a: Ids, b: Ids | None, length: int, vocabulary: BertVocabulary) -> Row:
    """`[CLS] A [SEP] B [SEP]` with kinds of tokens and segments; of the longer part the end is cut off."""
    room = length - (SPECIAL_TOKENS if b is not None else SPECIAL_TOKENS - 1)
    if b is None:
        parts = [[vocabulary.classify], a[:room], [vocabulary.separate]]
        second = 0
    else:
        # as if tokens were taken one by one from the longer of the two
        second = min(len(b), max(room - len(a), room // 2))
        a, b = a[: room - second], b[:second]
        parts, second = [[vocabulary.classify], a, [vocabulary.separate], b, [vocabulary.separate]], len(b) + 1
    tokens = np.concatenate([np.asarray(part, np.int32) for part in parts])
    types = np.repeat(np.array([0, 1], np.int32), [len(tokens) - second, second])
    padded, padding = pad(tokens, length, vocabulary.pad)
    return padded, pad(types, length, 0)[0], 1 - padding.astype(np.int32)


def open_data(config: BertTaskConfig, data: DataConfig, *, seed: int, train_samples: int | None) -> Data:
    """Examples of the files that the settings name; `UserError` with file and line for what is none."""
    if data.format == "mock":
        found = open_windows(data, seed=seed, train_samples=train_samples)
        return wrapped(found, lambda source: examples_of_text(config, source, found.tokenizer))
    for name in (*UNREAD, "format"):
        # by value: a saved configuration names every field
        if getattr(data, name) != type(data).model_fields[name].default:
            raise NoEffect(f"data.{name}", getattr(data, name), {"model.family": config.family}, "leave it out")
    if data.train is None and data.path == PYTHON_STDLIB:
        raise UserError(
            f"model.family {config.family} reads examples: give --data.path FILE, or --data.train FILE and "
            "--data.validation FILE, of TSV or JSON lines"
        )
    tokenizer = load_data_tokenizer(data)
    vocabulary = special_tokens(config.vocab_size, tokenizer, whole_words=False)
    encode = functools.partial(_encoded, config, data.sequence_length, tokenizer=tokenizer, vocabulary=vocabulary)
    identity: list[Any] = [config.task, config.names, config.labels, data.sequence_length, seed]
    if config.task == "answer":
        identity += [config.window_step, config.question_tokens]
    digest = hashlib.sha256(json.dumps(identity).encode())
    parts: dict[str, Any] = {name: NO_SAMPLES for name in ("train", "validation", "test")}
    if data.train is not None:
        for name, blend in (("train", data.train), ("validation", data.validation), ("test", data.test)):
            if blend is not None:
                parts[name] = encode(_read(config, data, blend, f"data.{name}", digest if name == "train" else None))
    else:
        found = _read(config, data, data.path, "data.path", digest)
        # those of a class often stand together
        order = np.random.RandomState(seed % 2**32).permutation(len(found))
        count = len(found) - round(len(found) * data.validation_fraction)
        digest.update(str(count).encode())
        parts["train"] = encode([found[number] for number in order[:count]])
        if count < len(found):
            parts["validation"] = encode([found[number] for number in order[count:]])
    return Data(config=data, seed=seed, tokenizer=tokenizer, fingerprint=f"{digest.hexdigest()}", **parts)


def _encoded(
    config: BertTaskConfig,
    length: int,
    found: Sequence[Example] | Sequence[Question],
    *,
    tokenizer: Tokenizer,
    vocabulary: BertVocabulary,
) -> Examples:
    if config.task == "answer":
        asked = [one for one in found if isinstance(one, Question)]
        parts = [part for one in asked for part in windows(config, one, length, tokenizer)]
        places = [label_of(part.first, part.last, length) for part in parts]
        return Examples([((part.question, part.context),) for part in parts], places, length, vocabulary)
    examples = [one for one in found if isinstance(one, Example)]
    words = [text for example in examples for pair in example.texts for text in pair if text is not None]
    ids = iter([found.astype(np.int32)[:length] for found in tokenizer.encode_batch(words)])
    texts = [
        tuple((next(ids), None if second is None else next(ids)) for _, second in example.texts) for example in examples
    ]
    return Examples(texts, [example.label for example in examples], length, vocabulary)


def label_of(first: int, last: int, length: int) -> int:
    """An answer's first and last place in a sequence of so many tokens, as one number."""
    return first * length + last


def _read(
    config: BertTaskConfig, data: DataConfig, blend: Blend, setting: str, digest: Any
) -> list[Example] | list[Question]:
    """All examples of some files; `digest` is told of their lines."""
    path = read_data_path(blend, setting)
    if path.weights is not None:
        raise UserError(f"{setting} has weights, which examples are not blended by: leave them out")
    examples: list[Any] = []
    for file in find_files(path.files(), cache=cache_root(data.cache_directory)):
        for place, row in _rows(file, digest):
            made = (
                questions_of_row(config, row, place) if config.task == "answer" else [make_example(config, row, place)]
            )
            examples.extend(made)
    if not examples:
        raise UserError(f"{setting} has no example: give files with a row for each")
    return examples


def _rows(file: Path, digest: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each row is, and its values by name."""
    header: list[str] | None = None
    is_json: bool | None = None
    for number, line in read_lines(file):
        place = f"{file} line {number}"
        if digest is not None:
            digest.update(line + b"\n")
        try:
            text = line.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"{place} is not UTF-8: {error.reason}; convert the file") from None
        if not text.strip():
            continue
        is_json = text.lstrip().startswith("{") if is_json is None else is_json
        if is_json:
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place} is not JSON: {error}; mend or remove it") from None
            if not isinstance(row, dict):
                raise UserError(f"{place} is no JSON object of columns; mend or remove it")
            yield place, row
            continue
        values = text.split("\t")
        if header is None:
            header = values
            continue
        if len(values) != len(header):
            raise UserError(f"{place} has {len(values)} columns and its header {len(header)}; mend or remove it")
        yield place, dict(zip(header, values, strict=True))


def make_example(config: BertTaskConfig, row: Mapping[str, Any], place: str) -> Example:
    """The example of a row; `UserError` for a column that is not there or means nothing."""
    check_columns(row, config.names, place)
    if config.task == "choose":
        return _question(config, row, place)
    *names, last = config.names
    first, *second = (text_in(row, name, place) for name in names)
    label = row[last]
    spelled = str(label).lower() if isinstance(label, bool) else str(label)
    if spelled not in config.labels:
        raise UserError(
            f"{place} has the class {spelled!r} in {last}: classes are {', '.join(config.labels)}; give "
            "--model.labels, or remove the row"
        )
    return Example(((first, second[0] if second else None),), config.labels.index(spelled))


def _question(config: BertTaskConfig, row: Mapping[str, Any], place: str) -> Example:
    """A text before each answer, which stands in the question's gap or after it."""
    article, question, options, right = config.names
    answers, asked = row[options], text_in(row, question, place)
    if not (isinstance(answers, list) and all(isinstance(one, str) for one in answers)):
        raise UserError(f"{place} has no list of texts in {options}; mend or remove it")
    if len(answers) != config.choices:
        raise UserError(
            f"{place} has {len(answers)} answers, and model.choices is {config.choices}; set that, or remove it"
        )
    letters = [chr(ord("A") + number) for number in range(config.choices)]
    told = row[right]
    number = letters.index(told) if told in letters else told
    if type(number) is not int or not 0 <= number < config.choices:
        raise UserError(f"{place} has {told!r} in {right}: it is a letter from A to {letters[-1]}, or a number from 0")
    # the gap of a cloze is filled
    seconds = [asked.replace("_", one) if "_" in asked else f"{asked} {one}" for one in answers]
    return Example(tuple((text_in(row, article, place), second) for second in seconds), number)


@dataclass(frozen=True)
class WindowsAsExamples(WindowSamples):
    """Windows of a text as examples of a task that needs no file: whether its two parts were swapped, which of several
    second parts is its own, or where a part of it stands. Sample i draws from `RandomState(i)`."""

    config: BertTaskConfig
    vocabulary: BertVocabulary

    def __getitem__(self, index: int) -> TaskBatch:
        rng = np.random.RandomState(index % 2**32)
        text = self.text(index)
        if self.config.task == "answer":
            return self._place_of_part(text, rng)
        cut = int(rng.randint(1, max(len(text), 2)))
        label = int(rng.randint(self.config.choices if self.config.task == "choose" else 2))
        pair = (text[:cut], text[cut:])
        pairs = [pair[::-1] if label else pair]
        if self.config.task == "choose":
            others = [self.text(int(rng.randint(len(self)))) for _ in range(self.config.choices)]
            pairs = [(pair[0], pair[1] if number == label else other) for number, other in enumerate(others)]
        rows = [make_row(a, b, self.sequence_length, self.vocabulary) for a, b in pairs]
        return example_of(rows, label, float(len(text) > 1))

    def _place_of_part(self, text: Ids, rng: np.random.RandomState) -> TaskBatch:
        """A question that is a few tokens of a text, which stand in it; the answer is where."""
        length = self.sequence_length
        asked = max(1, (length - SPECIAL_TOKENS) // 4)
        text = text[: length - SPECIAL_TOKENS - asked]
        size = min(asked, self.config.question_tokens, self.config.answer_tokens, max(len(text), 1))
        begin = int(rng.randint(max(len(text) - size, 0) + 1))
        question = text[begin : begin + size]
        first = len(question) + 2 + begin
        label = label_of(first, first + len(question) - 1, length) if len(text) else 0
        return example_of([make_row(question, text, length, self.vocabulary)], label, float(len(text) > 0))


def examples_of_text(config: BertTaskConfig, source: Source, tokenizer: Tokenizer | None) -> Source:
    """Windows of text as examples."""
    return WindowsAsExamples(source, config, special_tokens(config.vocab_size, tokenizer, whole_words=False))
