"""A worker's part: a chunk of text to token ids."""

import importlib
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import parent_process
from typing import Any

import numpy as np
from jaxtyping import Int32, Shaped

from jaxtron.config import UserError
from jaxtron.data.megatron.indexed import token_dtype
from jaxtron.data.tokenizers import Tokenizer, load_tokenizer
from jaxtron.preprocess.documents import Damage, read_documents
from jaxtron.preprocess.inputs import InputPiece

# damages that are told in full where they are skipped
MOST_DAMAGES = 10
PARAGRAPH_END = re.compile(r"\n\s*\n")
# characters of a paragraph that are split at once: the splitter's time grows with their square
MOST_CHARACTERS = 20_000


@dataclass(frozen=True)
class EncodeSettings:
    """What decides the ids of a text; `language` (of ISO 639) is None unless documents are split into sentences."""

    tokenizer: str
    end_of_document: str | None
    keys: tuple[str, ...]
    append_eod: bool
    language: str | None
    skip_damaged: bool


@dataclass(frozen=True)
class EncodedKey:
    """All ids of one key, the length of each sequence, and the number of sequences of each document."""

    ids: Shaped[np.ndarray, "T"]
    lengths: Int32[np.ndarray, "N"]
    sequences: Int32[np.ndarray, "D"]


@dataclass(frozen=True)
class Encoded:
    """A chunk done: ids by key, bytes of its text (UTF-8), and what was damaged: how often, and the first of it."""

    keys: list[EncodedKey]
    text_bytes: int
    num_damaged: int
    damages: list[Damage] = field(default_factory=list)


class Encoder:
    """Encodes chunks; `UserError` for settings that do not go together or packages that are missing."""

    def __init__(self, settings: EncodeSettings):
        tokenizer = load_tokenizer(settings.tokenizer, end_of_document=settings.end_of_document)
        if tokenizer is None:
            raise UserError(
                "characters have no vocabulary before training; give another --tokenizer, such as bytes, or train on "
                "the text itself with --data.tokenizer characters"
            )
        if settings.append_eod and tokenizer.end_of_document is None:
            raise UserError(
                f"--append-eod: the tokenizer {settings.tokenizer} has no usual end of document; name its token with "
                "--end-of-document, or leave --append-eod out"
            )
        self.tokenizer: Tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._settings = settings
        self._splitter = None if settings.language is None else _import_splitter()

    def encode(self, pieces: Sequence[InputPiece]) -> Encoded:
        """The ids of the pieces' documents in order; ends at the first damage unless damage is skipped."""
        documents: list[tuple[str, ...]] = []
        damages: list[Damage] = []
        for piece in pieces:
            for document in read_documents(piece, self._settings.keys):
                if not isinstance(document, Damage):
                    documents.append(document)
                    continue
                damages.append(document)
                if not self._settings.skip_damaged:
                    return Encoded([], 0, 1, damages)
        columns = list(zip(*documents, strict=True)) or [()] * len(self._settings.keys)
        # characters of ASCII text are its bytes: no copy
        sizes = (len(text) if text.isascii() else len(text.encode("utf-8")) for column in columns for text in column)
        encoded = [self._encode_texts(column) for column in columns]
        return Encoded(encoded, sum(sizes), len(damages), damages[:MOST_DAMAGES])

    def _encode_texts(self, texts: Sequence[str]) -> EncodedKey:
        parts, sequences = (texts, np.ones(len(texts), np.int32)) if self._splitter is None else self._sentences(texts)
        rows = self.tokenizer.encode_batch(parts)
        lengths = np.array([len(row) for row in rows], np.int32)
        # an empty document has no sequence, though it counts as a document
        owners = np.repeat(np.arange(len(texts)), sequences)[lengths > 0]
        rows = [row for row in rows if len(row)]
        if self._settings.append_eod:
            end = np.array([self.tokenizer.end_of_document], self.dtype)
            last = np.append(owners[1:] != owners[:-1], True) if len(owners) else owners
            rows = [np.append(row, end) if is_last else row for row, is_last in zip(rows, last, strict=True)]
        return EncodedKey(
            ids=np.concatenate([np.empty(0, self.dtype), *rows], dtype=self.dtype, casting="unsafe"),
            lengths=np.array([len(row) for row in rows], np.int32),
            sequences=np.bincount(owners, minlength=len(texts)).astype(np.int32),
        )

    def _sentences(self, texts: Sequence[str]) -> tuple[list[str], Int32[np.ndarray, "D"]]:
        """All sentences, without the white space around them, and how many each text has."""
        assert self._splitter is not None
        split = [
            [
                sentence.strip()
                for paragraph in _paragraphs(text)
                for sentence in self._splitter(self._settings.language, paragraph)
                if not sentence.isspace()
            ]
            for text in texts
        ]
        return [sentence for sentences in split for sentence in sentences], np.array([*map(len, split)], np.int32)


_encoder: Encoder | None = None


def start_worker(settings: EncodeSettings) -> None:
    """Makes this process a worker, which ends with the process that started it."""
    global _encoder
    # Ctrl-C is for the first process, which then stops the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(settings)


def encode_in_worker(pieces: Sequence[InputPiece]) -> Encoded:
    """`Encoder.encode` in a worker."""
    assert _encoder is not None
    return _encoder.encode(pieces)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps the tokenizers library, which would take all cores, on one thread of this process."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _paragraphs(text: str) -> Iterator[str]:
    """The text between blank lines; long paragraphs are cut at the end of a line or word."""
    for paragraph in PARAGRAPH_END.split(text):
        while len(paragraph) > MOST_CHARACTERS:
            cut = max(paragraph.rfind(space, 0, MOST_CHARACTERS) for space in "\n ") + 1 or MOST_CHARACTERS
            yield paragraph[:cut]
            paragraph = paragraph[cut:]
        yield paragraph


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _import_splitter() -> Any:
    try:
        return importlib.import_module("sentencex").segment
    except ImportError as error:
        raise UserError(
            f'--split-sentences needs the package sentencex ({error}): pip install "jaxtron[sentences]"'
        ) from error
