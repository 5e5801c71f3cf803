"""The command's flags: one set for tokenizing, one for each subcommand."""

import os
from dataclasses import dataclass, field
from typing import Any

from jaxtron.command import FlagParser, file_name, natural, positive
from jaxtron.config import UserError
from jaxtron.data.config import TOKENIZER_KINDS
from jaxtron.data.files.file_kind import token_prefix

PROGRAM = "python -m jaxtron.preprocess"
OVERWRITE = "replace files that are there already under the output's name"


@dataclass(frozen=True)
class Tokenize:
    """Input to token files; `json_key` has a key for each pair, `language` is None unless sentences are split."""

    input: list[str]
    tokenizer: str
    output: str
    end_of_document: str | None = None
    json_key: tuple[str, ...] = ("text",)
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    append_eod: bool = False
    split_sentences: bool = False
    language: str | None = None
    skip_damaged: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Merge:
    """Pairs of files into one, in the order given."""

    input: list[str]
    output: str
    overwrite: bool = False


@dataclass(frozen=True)
class Inspect:
    """What a pair of files holds; its first `tokens` ids as text where a tokenizer is named."""

    prefix: str
    tokenizer: str | None = None
    tokens: int = 32
    json: bool = False


@dataclass(frozen=True)
class Order:
    """The order of a train split's samples; 0 samples are one epoch."""

    prefix: str
    sequence_length: int
    samples: int
    seed: int
    split: str
    json: bool = False


Request = Tokenize | Merge | Inspect | Order


def parse_tokenize(argv: list[str]) -> Tokenize:
    """The request of a command line without a subcommand; a `UserError` for flags that do not go together."""
    found = Tokenize(**_parse(_tokenize_parser(), argv))
    repeated = [key for key in found.json_key if found.json_key.count(key) > 1]
    if repeated:
        raise UserError(f"--json-key has {repeated[0]!r} twice; name each key once")
    if found.language is not None and not found.split_sentences:
        raise UserError(f"--language {found.language} has no effect without --split-sentences; give both or neither")
    _check_output(found.output)
    return found


def parse_merge(argv: list[str]) -> Merge:
    """The request of `merge`."""
    parser = FlagParser(f"{PROGRAM} merge", "Append pairs of token files, in the order given, to one pair.")
    add = parser.add_argument
    add(
        "--input",
        type=_prefix,
        nargs="+",
        action="extend",
        required=True,
        metavar="PREFIX",
        help="pairs PREFIX.bin and PREFIX.idx",
    )
    add("--output", type=_prefix, required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    add("--overwrite", action="store_true", help=OVERWRITE)
    found = Merge(**_parse(parser, argv))
    _check_output(found.output)
    return found


def parse_inspect(argv: list[str]) -> Inspect:
    """The request of `inspect`."""
    parser = FlagParser(f"{PROGRAM} inspect", "Check a pair of token files, and say what it holds.")
    add = parser.add_argument
    add("prefix", type=_prefix, metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    add("--tokenizer", type=file_name, metavar="NAME", help="show the first ids as text too")
    add("--tokens", type=positive, metavar="N", help=f"ids to show (none: {Inspect.tokens})")
    add("--json", action="store_true", help="print JSON")
    return Inspect(**_parse(parser, argv))


def parse_order(argv: list[str]) -> Order:
    """The request of `order`."""
    parser = FlagParser(
        f"{PROGRAM} order",
        "Length and SHA-256 (as little-endian int64) of the train split's document, sample and shuffle index: equal to "
        "those of Megatron's cache files exactly when training reads the same samples in the same order.",
    )
    add = parser.add_argument
    add("prefix", type=_prefix, metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    add("--sequence-length", type=positive, required=True, metavar="S", help="tokens in a sequence")
    add("--samples", type=natural, required=True, metavar="N", help="samples of the whole training; 0: one epoch")
    add("--seed", type=natural, required=True, metavar="K", help="of the order (Megatron's default is 1234)")
    add("--split", required=True, metavar="A,B,C", help="shares of train, validation and test, such as 969,30,1")
    add("--json", action="store_true", help="print JSON")
    return Order(**_parse(parser, argv))


def _tokenize_parser() -> FlagParser:
    parser = FlagParser(
        PROGRAM,
        "Tokenize JSON lines, Parquet or plain text into Megatron's PREFIX.bin and PREFIX.idx, documents in the order "
        "of the input whatever the number of workers. A command that was stopped goes on when it is run again. "
        "Subcommands, each with its own --help: merge, inspect, order.",
    )
    add = parser.add_argument
    add(
        "--input",
        type=file_name,
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="files, or folders of them: .jsonl, .jsonlines, .ndjson and .json are a JSON object a line, .parquet is a "
        "row a document, .txt, .text and .md are UTF-8 text, one document a file; others are one of these by their "
        "content, which is said; .gz, .bz2, .xz and .zst of each but Parquet",
    )
    add("--tokenizer", type=file_name, required=True, metavar="NAME", help=TOKENIZER_KINDS)
    add("--end-of-document", metavar="TOKEN", help="the tokenizer's token that ends a document, if not the usual one")
    add(
        "--output",
        type=_prefix,
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.bin and PREFIX.idx; for several keys PREFIX_KEY_document.bin and .idx (or _sentence), as "
        "Megatron names them",
    )
    add(
        "--json-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help="keys or columns of the texts, a pair of files each (none: text)",
    )
    add("--workers", type=positive, metavar="N", help="processes that tokenize (none: as many as cores)")
    add("--append-eod", action="store_true", help="end each document with the tokenizer's end of document")
    add("--split-sentences", action="store_true", help="a sequence a sentence, found by sentencex, offline")
    add("--language", metavar="CODE", help="of the sentences, such as de (none: en)")
    add("--skip-damaged", action="store_true", help="count and leave out lines that are no document, not stop there")
    add("--overwrite", action="store_true", help=OVERWRITE)
    return parser


def _prefix(text: str) -> str:
    """A flag's prefix of a pair of files, by whichever of the two it was named; `~` is the home directory."""
    return token_prefix(file_name(text))


def _check_output(prefix: str) -> None:
    if os.path.isdir(prefix) or prefix.endswith(os.sep):
        raise UserError(f"--output {prefix} is a folder; give the start of a file's name, such as corpus")


def _parse(parser: FlagParser, argv: list[str]) -> dict[str, Any]:
    """The flags that were given."""
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if "json_key" in given:
        given["json_key"] = tuple(given["json_key"])
    return given
