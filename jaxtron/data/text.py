"""Text tokenized once, and kept as a memory-mapped file.

A cache entry is a folder named by the hash of what it was made from. It is written under another name and renamed when
whole, so no process ever sees half an entry, and of two processes that write at once the first one wins.
A writer that is killed leaves a `*.partial` folder, which nothing reads.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from jaxtron.config import UserError
from jaxtron.data.files.reader import read_document
from jaxtron.data.tokenizers import CharacterTokenizer, Tokenizer

FORMAT_VERSION = 2
TOKENS_FILE = "tokens.bin"
DESCRIPTION_FILE = "description.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenStream:
    """All documents as one row of ids, each followed by the end of document where the tokenizer has one."""

    tokens: Integer[np.ndarray, "T"]
    tokenizer: Tokenizer
    fingerprint: str


def open_tokens(files: Sequence[Path], *, tokenizer: Tokenizer | None, cache_directory: Path) -> TokenStream:
    """The files' tokens from the cache, made there first if need be; a tokenizer of None means characters."""
    entry = cache_directory / _cache_key(files, tokenizer)
    if not os.path.isdir(entry):
        _write_entry(entry, files, tokenizer)
    return _read_entry(entry, tokenizer)


def _cache_key(files: Sequence[Path], tokenizer: Tokenizer | None) -> str:
    description = {
        "version": FORMAT_VERSION,
        "tokenizer": "characters" if tokenizer is None else tokenizer.fingerprint,
        "files": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    }
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:32]


def _write_entry(entry: Path, files: Sequence[Path], tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        tokenizer = CharacterTokenizer("".join(sorted(set().union(*(read_document(file) for file in files)))))
    logger.info("tokenizing %d files into %s", len(files), entry)
    try:
        partial = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.partial")
        partial.mkdir(parents=True)
        try:
            description = _write_tokens(partial / TOKENS_FILE, files, tokenizer)
            (partial / DESCRIPTION_FILE).write_text(json.dumps(description), encoding="utf-8")
            _publish(partial, entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write the token cache in {entry.parent}: {error.strerror or error}; "
            "set --data.cache_directory to a writable folder with room"
        ) from error


def _write_tokens(path: Path, files: Iterable[Path], tokenizer: Tokenizer) -> dict:
    """Write the ids of every file; what describes them is returned."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    end = [] if tokenizer.end_of_document is None else [tokenizer.end_of_document]
    digest, num_tokens = hashlib.sha256(), 0
    with path.open("wb") as output:
        for file in files:
            ids = np.concatenate([tokenizer.encode(read_document(file)).astype(dtype), np.array(end, dtype)])
            output.write(ids.tobytes())
            digest.update(ids.tobytes())
            num_tokens += len(ids)
    return {
        "num_tokens": num_tokens,
        "dtype": dtype.str,
        "fingerprint": digest.hexdigest(),
        "vocabulary": tokenizer.vocabulary if isinstance(tokenizer, CharacterTokenizer) else None,
    }


def _publish(partial: Path, entry: Path) -> None:
    try:
        partial.rename(entry)
    except OSError:
        # another process was first, and its entry is the same as ours
        if not entry.is_dir():
            raise


def _read_entry(entry: Path, tokenizer: Tokenizer | None) -> TokenStream:
    try:
        description = json.loads((entry / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        num_tokens, dtype = description["num_tokens"], np.dtype(description["dtype"])
        size = (entry / TOKENS_FILE).stat().st_size
        if size != num_tokens * dtype.itemsize:
            raise UserError(f"{TOKENS_FILE} has {size:,} bytes, not {num_tokens * dtype.itemsize:,}")
        with (entry / TOKENS_FILE).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != description["fingerprint"]:
            raise UserError(f"{TOKENS_FILE} is not as it was written")
        tokens = np.memmap(entry / TOKENS_FILE, dtype, mode="r") if num_tokens else np.empty(0, dtype)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"the token cache {entry} is damaged ({error}); delete that folder and start again") from error
    if tokenizer is None:
        tokenizer = CharacterTokenizer(description["vocabulary"])
    # a plain view of the same memory: slices of a memmap are several times slower
    return TokenStream(np.asarray(tokens), tokenizer, description["fingerprint"])
