"""SentencePiece and tiktoken behind the protocol of `tokenizers.py`: the one file that imports these packages."""

import base64
import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Integer

from jaxtron.config import UserError, expand_home

ENCODING_NAMES = frozenset(
    ("gpt2", "r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base", "o200k_harmony")
)
END_OF_TEXT = "<|endoftext|>"
DEFAULT_PATTERN = "cl100k_base"
# How text falls into words before ranks merge their bytes: the published patterns of OpenAI's encodings. A file of
# ranks does not say which one it was made with.
_LETTERS_UPPER, _LETTERS_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS, _BEFORE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"[^\r\n\p{L}\p{N}]?"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k_base": "|".join(
        (
            f"{_BEFORE}{_LETTERS_UPPER}*{_LETTERS_LOWER}+{_ENDINGS}",
            f"{_BEFORE}{_LETTERS_UPPER}+{_LETTERS_LOWER}*{_ENDINGS}",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
}


class SentencePieceTokenizer:
    """A `.model` of SentencePiece; its `</s>` ends a document unless another piece is named."""

    def __init__(self, path: Path, *, end_of_document: str | None = None):
        content = _read(path)
        sentencepiece = _import("sentencepiece", path)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model: {error}") from None
        self.vocab_size: int = self._processor.get_piece_size()
        self.end_of_document = self._end_of_document(path, end_of_document)
        pad = self._processor.pad_id()
        self.pad = None if pad in (-1, self.end_of_document) else pad
        self.special_tokens = self._special_tokens()
        controls = filter(self._processor.is_control, range(self.vocab_size))
        self.special_texts = frozenset(map(self._processor.id_to_piece, controls))
        self.fingerprint = f"sentencepiece:{hashlib.sha256(content).hexdigest()}:{self.end_of_document}"

    def _special_tokens(self) -> dict[str, str]:
        model = self._processor
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "pad_token": model.pad_id()}
        if ids["eos_token"] < 0 and self.end_of_document is not None:
            ids["eos_token"] = self.end_of_document
        return {role: model.id_to_piece(token) for role, token in ids.items() if token >= 0}

    @property
    def pieces(self) -> list[str]:
        """How each id is spelled in the vocabulary."""
        return [self._processor.id_to_piece(token) for token in range(self.vocab_size)]

    def token_id(self, text: str) -> int | None:
        token = self._processor.piece_to_id(text)
        return token if self._processor.id_to_piece(token) == text else None

    def _end_of_document(self, path: Path, name: str | None) -> int | None:
        if name is None:
            token = self._processor.eos_id()
            return None if token < 0 else token
        token = self._processor.piece_to_id(name)
        if self._processor.id_to_piece(token) != name:
            raise UserError(
                f"{path} has no token {name!r}; set the end of document to one of its {self.vocab_size} pieces"
            )
        return token

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        return np.array(self._processor.encode(text), dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        return [np.array(ids, dtype=np.int64) for ids in self._processor.encode(list(texts), num_threads=1)]

    def decode(self, ids: Integer[np.ndarray, "T"]) -> str:
        kept = [token for token in np.asarray(ids).tolist() if 0 <= token < self.vocab_size]
        return self._processor.decode([token for token in kept if token != self.end_of_document])


class TiktokenTokenizer:
    """An encoding of tiktoken by name, or a file of ranks as `FILE.tiktoken` or `FILE.tiktoken:PATTERN`.

    PATTERN is a name in PATTERNS (without it: DEFAULT_PATTERN, which Llama 3's and Qwen's ranks come close to). The
    end of document of a file of ranks is the id after them. A named encoding is downloaded once by tiktoken.
    """

    pad = None

    def __init__(self, name: str, *, end_of_document: str | None = None):
        if name in ENCODING_NAMES:
            self._encoding = _download(_import("tiktoken", name), name)
            end = END_OF_TEXT if end_of_document is None else end_of_document
            if end not in self._encoding.special_tokens_set:
                known = " ".join(sorted(self._encoding.special_tokens_set)[:8])
                raise UserError(f"{name} has no token {end!r}; set the end of document to one of {known}")
            content = name
        else:
            file, _, pattern = name.partition(".tiktoken:")
            path = Path(expand_home(f"{file}.tiktoken" if pattern else name))
            pattern = pattern or DEFAULT_PATTERN
            if pattern not in PATTERNS:
                raise UserError(f"unknown pattern {pattern!r} after {path}; give one of {' '.join(PATTERNS)}")
            ranks = _read_ranks(path)
            end = END_OF_TEXT if end_of_document is None else end_of_document
            special = {end: max(ranks.values()) + 1}
            tiktoken = _import("tiktoken", path)
            try:
                self._encoding = tiktoken.Encoding(
                    path.stem, pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=special
                )
            except Exception as error:  # the library's own are not documented
                raise UserError(f"{path} cannot be used as ranks: {error}") from error
            content = f"{hashlib.sha256(_read(path)).hexdigest()}:{pattern}"
        self.vocab_size: int = self._encoding.max_token_value + 1
        self.end_of_document: int = self._encoding.encode_single_token(end)
        self.special_tokens = {"eos_token": end}
        self.special_texts = frozenset(self._encoding.special_tokens_set)
        self.fingerprint = f"tiktoken:{content}:{self.end_of_document}"

    def token_id(self, text: str) -> int | None:
        try:
            return self._encoding.encode_single_token(text)
        except KeyError:
            return None

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        # text that looks like a special token is text
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Integer[np.ndarray, "T"]) -> str:
        return b"".join(map(self._bytes, np.asarray(ids).tolist())).decode("utf-8", errors="replace")

    def _bytes(self, token: int) -> bytes:
        try:
            return b"" if token == self.end_of_document else self._encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return b""


def _import(package: str, wanted_by: Path | str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f'the tokenizer {wanted_by} needs the package {package} ({error}): pip install "jaxtron[{package}]"'
        ) from error


def _download(tiktoken: ModuleType, name: str):
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        raise UserError(
            f"tiktoken cannot download its encoding {name} ({type(error).__name__}); connect once, set "
            f"TIKTOKEN_CACHE_DIR to a folder that has it, or give its ranks as FILE.tiktoken:PATTERN"
        ) from error


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes of each token and its rank, from lines of base64 and number."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
            if token in ranks:
                raise UserError(f"{path} is damaged: line {number} has {token!r} again; copy or download it again")
            ranks[token] = int(rank)
        except UserError:
            raise
        except ValueError:
            raise UserError(
                f"{path} line {number} is {line[:40]!r}, not the base64 of a token and its rank; give a tiktoken file"
            ) from None
    if not ranks:
        raise UserError(f"{path} has no ranks; give a tiktoken file")
    # without these tiktoken panics, some only when a text needs them
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise UserError(f"{path} is damaged: it has no rank for the byte 0x{missing:02x}; copy or download it again")
    token_of: dict[int, bytes] = {}
    for token, rank in ranks.items():
        if rank < 0 or token_of.setdefault(rank, token) != token:
            other = f", which {token_of[rank]!r} has" if rank >= 0 else ""
            raise UserError(f"{path} is damaged: {token!r} has the rank {rank}{other}; copy or download it again")
    return ranks


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
