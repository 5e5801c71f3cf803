"""From text to token ids and back."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer as FastTokenizer

from jaxtron.config import UserError, expand_home
from jaxtron.data.config import TOKENIZER_KINDS
from jaxtron.data.tokenizer_models import ENCODING_NAMES, END_OF_TEXT, SentencePieceTokenizer, TiktokenTokenizer

# what the common families call it, most specific first
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eos|>", "</s>", "<eos>", "<EOS>", "[EOS]")
BEGIN_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<BOS>", "[BOS]")
PAD_NAMES = ("<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<pad>", "<PAD>", "[PAD]")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def end_of_document(self) -> int | None:
        """The id that follows each document, where there is one."""
        ...

    @property
    def pad(self) -> int | None:
        """The id that fills up a sequence, where there is one; never the end of document, which is learned."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly when they give the same ids."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The text of special tokens by their role: `bos_token`, `eos_token` and others that there are."""
        ...

    @property
    def special_texts(self) -> frozenset[str]:
        """The texts of all special tokens."""
        ...

    def token_id(self, text: str) -> int | None:
        """The id of the token of exactly this text; one that `encode` takes for text is an id here."""
        ...

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        """Ids of the text, without an end of document."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        """Ids of each text as `encode` gives them, by the library's fastest way."""
        ...

    def decode(self, ids: Integer[np.ndarray, "T"]) -> str:
        """Text of the ids; ends of documents, and ids that mean nothing, are left out."""
        ...


@runtime_checkable
class HasPieces(Protocol):
    """A tokenizer whose vocabulary shows which tokens continue a word (`masked/words.py`)."""

    @property
    def pieces(self) -> list[str]:
        """How each id is spelled in the vocabulary; nothing where it has no token."""
        ...


@runtime_checkable
class HasPlaces(Protocol):
    """A tokenizer that tells which part of a text each token is."""

    def encode_places(self, text: str) -> tuple[Integer[np.ndarray, "T"], Integer[np.ndarray, "T 2"]]:
        """Ids as `encode` gives them, and of each the first character and the one after the last."""
        ...


class ByteTokenizer:
    """The UTF-8 bytes of the text, and 256 for the end of a document."""

    vocab_size = 257
    end_of_document = 256
    pad = None
    fingerprint = "bytes"
    special_tokens = MappingProxyType({"eos_token": END_OF_TEXT})
    special_texts = frozenset({END_OF_TEXT})

    def token_id(self, text: str) -> int | None:
        return self.end_of_document if text == END_OF_TEXT else None

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def encode_places(self, text: str) -> tuple[Integer[np.ndarray, "T"], Integer[np.ndarray, "T 2"]]:
        ids = self.encode(text)
        # all bytes but the first of a character begin with the bits 10
        character = np.cumsum(ids & 0xC0 != 0x80) - 1
        return ids, np.stack([character, character + 1], axis=1)

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Integer[np.ndarray, "T"]) -> str:
        ids = np.asarray(ids)
        # a model may well write bytes that are not UTF-8; they show as the replacement character
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class CharacterTokenizer:
    """One id a character, for the characters of a fixed sorted vocabulary; no end of document."""

    end_of_document = None
    pad = None
    special_tokens = MappingProxyType({})
    special_texts = frozenset()

    def __init__(self, vocabulary: str):
        self.vocabulary = "".join(sorted(set(vocabulary)))
        self.vocab_size = len(self.vocabulary)
        self.fingerprint = f"characters:{hashlib.sha256(self.vocabulary.encode()).hexdigest()}"
        self._codes = _code_points(self.vocabulary)
        self._characters = np.array(list(self.vocabulary), dtype=object)

    def token_id(self, text: str) -> int | None:
        return self.vocabulary.index(text) if len(text) == 1 and text in self.vocabulary else None

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        codes = _code_points(text)
        ids = np.searchsorted(self._codes, codes)
        known = ids < self.vocab_size
        known[known] = self._codes[ids[known]] == codes[known]
        if not known.all():
            character = chr(codes[np.argmin(known)])
            raise UserError(
                f"the character {character!r} (U+{ord(character):04X}) is not among the {self.vocab_size} of the "
                "training data; leave it out, or train with --data.tokenizer bytes"
            )
        return ids

    def encode_places(self, text: str) -> tuple[Integer[np.ndarray, "T"], Integer[np.ndarray, "T 2"]]:
        ids = self.encode(text)
        character = np.arange(len(ids))
        return ids, np.stack([character, character + 1], axis=1)

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Integer[np.ndarray, "T"]) -> str:
        ids = np.asarray(ids)
        return "".join(self._characters[ids[(ids >= 0) & (ids < self.vocab_size)]])


class HuggingFaceTokenizer:
    """A `tokenizer.json` of Hugging Face's `tokenizers` library."""

    def __init__(self, path: Path, *, end_of_document: str | None = None):
        content = _read_tokenizer_file(path)
        try:
            self._tokenizer = FastTokenizer.from_str(content)
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"{path} is not a Hugging Face tokenizer.json: {error}; bring back the model's own"
            ) from error
        padding = self._tokenizer.padding
        declared = _read_declared(path)
        # the file may ask for either; here a document keeps its length
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if end_of_document is not None and end_of_document not in ids:
            raise UserError(
                f"{path} has no token {end_of_document!r}; set the end of document to one of its {len(ids)} tokens"
            )
        if end_of_document is None:
            end_of_document = _find_token(self._tokenizer, [declared.get("eos_token")], END_OF_DOCUMENT_NAMES)
        self.end_of_document = None if end_of_document is None else ids[end_of_document]
        told_pads = [None if padding is None else padding["pad_token"], declared.get("pad_token")]
        pad = _find_token(self._tokenizer, told_pads, PAD_NAMES)
        self.pad = None if pad is None or ids[pad] == self.end_of_document else ids[pad]
        self.vocab_size = max(ids.values(), default=-1) + 1
        special = {role: token for role, token in declared.items() if token in ids}
        found = {"bos_token": _find_token(self._tokenizer, [], BEGIN_NAMES), "eos_token": end_of_document}
        self.special_tokens = {role: token for role, token in found.items() if token is not None} | special
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.special_texts = frozenset(token.content for token in added if token.special)
        self.prefix = self._find_prefix()
        self._meaningful = frozenset(ids.values()) - {self.end_of_document}
        digest = hashlib.sha256(content.encode()).hexdigest()
        self.fingerprint = f"tokenizer.json:{digest}:{self.end_of_document}"

    @property
    def pieces(self) -> list[str]:
        """How each id is spelled in the vocabulary; nothing where it has no token."""
        return [self._tokenizer.id_to_token(token) or "" for token in range(self.vocab_size)]

    def _find_prefix(self) -> tuple[int, ...]:
        """Ids that the file puts before a text that is given to a model, such as that of `<s>`."""
        whole = self._tokenizer.encode("", add_special_tokens=True)
        return tuple(itertools.takewhile(lambda token: token != self.end_of_document, whole.ids))

    def token_id(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text)

    def encode(self, text: str) -> Integer[np.ndarray, "T"]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_places(self, text: str) -> tuple[Integer[np.ndarray, "T"], Integer[np.ndarray, "T 2"]]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(found.ids, dtype=np.int64), np.array(found.offsets, dtype=np.int64).reshape(-1, 2)

    def encode_batch(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.fromiter(encoding.ids, np.int64, len(encoding)) for encoding in encodings]

    def decode(self, ids: Integer[np.ndarray, "T"]) -> str:
        kept = [token for token in np.asarray(ids).tolist() if token in self._meaningful]
        return self._tokenizer.decode(kept, skip_special_tokens=False)


def load_tokenizer(name: str, *, end_of_document: str | None = None) -> Tokenizer | None:
    """The tokenizer of that name (TOKENIZER_KINDS); None for `characters`, whose vocabulary comes from the data.

    `end_of_document` is the token that ends a document, where it is not the usual one. `UserError` if the name, the
    file or the token is not there, or the package that reads the file.
    """
    if name in ("bytes", "characters"):
        if end_of_document is not None:
            raise UserError(
                f"the end of document {end_of_document} has no effect with the {name} tokenizer; leave it out, or "
                "name a tokenizer with such a token"
            )
        return ByteTokenizer() if name == "bytes" else None
    path = Path(expand_home(name))
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, end_of_document=end_of_document)
    if name in ENCODING_NAMES or ".tiktoken" in path.suffix:
        return TiktokenTokenizer(name, end_of_document=end_of_document)
    path = path / "tokenizer.json" if path.is_dir() else path
    return HuggingFaceTokenizer(path, end_of_document=end_of_document)


def _code_points(text: str) -> Integer[np.ndarray, "T"]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")


def _find_token(tokenizer: FastTokenizer, told: Sequence[str | None], names: Sequence[str]) -> str | None:
    """The first of the tokens that the tokenizer's files tell of, else the first special one of a usual name."""
    known = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    # a piece of text may spell `</s>`, as HTML does: beside special tokens it is text, whatever its name
    candidates = special or {token.content for token in added} or set(known)
    named = [name for name in names if name in candidates]
    return next((name for name in [*told, *named] if name is not None and name in known), None)


def _read_declared(path: Path) -> dict[str, str]:
    """The token of each role (`eos_token`, `pad_token`) that tokenizer_config.json beside a tokenizer.json declares."""
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return {}
    try:
        entries = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {config}: {error}; mend it, or remove it from beside {path.name}") from error
    entries = entries if isinstance(entries, dict) else {}
    # a token is its text, or an object with the text
    tokens = {role: entry.get("content") if isinstance(entry, dict) else entry for role, entry in entries.items()}
    return {role: token for role, token in tokens.items() if role.endswith("_token") and isinstance(token, str)}


def _read_tokenizer_file(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"no tokenizer {path}; give {TOKENIZER_KINDS}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from error
