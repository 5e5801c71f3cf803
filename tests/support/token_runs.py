"""Runs of the preprocess command, small tokenizers, and the documents of a pair of files, for the tests beside it."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxtron.data.megatron.indexed import IndexedReader
from jaxtron.preprocess.__main__ import main
from tests.support.commands import Ended, run_main

END = 256
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
WORDS = "the cat sat on a mät and then ran off to see what it was that made such noise 🙂\n".split(" ")


def run(*arguments: object) -> Ended:
    """The command in this process, on one worker unless it says otherwise."""
    words = [str(argument) for argument in arguments]
    if words[0].startswith("-") and "--workers" not in words:
        words += ["--workers", "1"]
    return run_main(main, words)


def texts(count: int, *, seed: int = 0, most_words: int = 60) -> list[str]:
    """Documents of random words."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, most_words))) for _ in range(count)]


def write_lines(path: Path, entries: Iterable[Any]) -> Path:
    """JSON lines, compressed as the name says; a string is a document, anything else stands as it is."""
    content = "".join(json.dumps({"text": e} if isinstance(e, str) else e) + "\n" for e in entries).encode()
    path.write_bytes(COMPRESS.get(path.suffix.lower(), bytes)(content))
    return path


def write_parquet(path: Path, columns: dict[str, list], **options: Any) -> Path:
    """A Parquet file of the columns."""
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def write_bpe(path: Path, sample: Iterable[str], *, size: int = 400) -> Path:
    """A small byte-level BPE trained on the sample, as tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.save(str(path))
    return path


def documents_of(prefix: object) -> list[list[list[int]]]:
    """The ids of each sequence of each document."""
    reader = IndexedReader(str(prefix))
    sequences = [reader.get(number).tolist() for number in range(len(reader))]
    bounds = reader.documents.tolist()
    return [sequences[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def texts_of(prefix: object) -> list[str]:
    """The text of each document of a file made with the bytes tokenizer."""
    return [
        bytes(token for sequence in document for token in sequence if token != END).decode()
        for document in documents_of(prefix)
    ]


def same_files(first: object, second: object) -> bool:
    """Whether two pairs are equal byte for byte."""
    return all(Path(f"{first}.{kind}").read_bytes() == Path(f"{second}.{kind}").read_bytes() for kind in ("bin", "idx"))
