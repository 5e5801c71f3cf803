"""Fill-in-the-middle (Bavarian et al. 2022, arXiv 2207.14255): documents whose middle comes last.

A document is cut in three at two random places and written as `PRE prefix SUF suffix MID middle` (PSM) or
`PRE SUF suffix MID prefix middle` (SPM, the paper's second variant), so that a decoder learns to fill a gap. As in
Megatron's FIM dataset this happens to each document inside a packed sample, and what no longer fits is cut off its end.
Unlike there, a sample draws from its own generator, so it is the same whatever was read before.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Integer

from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch
from jaxtron.data.megatron.boundaries import Boundaries, make_sample
from jaxtron.data.source import Source
from jaxtron.data.tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no text."""


@dataclass(frozen=True)
class FillInMiddle:
    """The three special tokens, and which documents are cut how; UserError for what cannot be."""

    prefix: int
    middle: int
    suffix: int
    end_of_document: int | None = None
    """Ends each document of a sample; None: a sample is one document."""
    rate: float = 0.5
    """Share of the documents that are cut; of those with fragments, share whose fragments are considered."""
    spm_rate: float = 0.5
    """Share of them that are written as SPM; the others are PSM."""
    fragment: int | None = None
    """A token that ends a part of a document, such as a file of a repository; parts are then cut one by one."""
    fragment_rate: float | None = None
    """Share of the fragments that are cut, in documents that have some and were drawn by `rate`."""
    untouched: tuple[int, ...] = ()
    """A document or fragment that starts with these tokens is never cut."""

    def __post_init__(self):
        rates = {"rate": self.rate, "spm_rate": self.spm_rate, "fragment_rate": self.fragment_rate}
        for name, rate in rates.items():
            if rate is not None and not 0 <= rate <= 1:
                raise UserError(f"fill-in-the-middle with {name} {rate}; give a share between 0 and 1")
        if (self.fragment is None) != (self.fragment_rate is None):
            raise UserError(
                f"fill-in-the-middle with fragment {self.fragment} and fragment_rate {self.fragment_rate}; "
                "one has no effect without the other: give both or none"
            )
        special = (self.prefix, self.middle, self.suffix, self.end_of_document, self.fragment)
        given = [token for token in special if token is not None]
        if len(set(given)) < len(given):
            raise UserError(
                f"fill-in-the-middle's prefix, middle, suffix, end of document and fragment are the tokens {special}; "
                "give a different one for each"
            )


class FillInMiddleSource:
    """A decoder's samples with documents cut; as many and as long as those of `source`.

    `source` must leave documents' boundaries alone (positions, segments and weights inside the text): they move, and
    `boundaries` is applied to the new text. TokenBatch i draws from `RandomState((seed + i) % 2^32)`. With a tokenizer
    documents are cut between characters, otherwise between tokens.
    """

    def __init__(
        self,
        source: Source,
        settings: FillInMiddle,
        *,
        seed: int,
        boundaries: Boundaries | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        self.sequence_length = source.sequence_length
        self._source = source
        self._settings = settings
        self._seed = seed
        self._boundaries = Boundaries() if boundaries is None else boundaries
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> TokenBatch:
        sample = self._source[index]
        real = np.flatnonzero(sample.weights)
        count = int(real[-1]) + 1 if len(real) else 0
        if sample.positions is not None or sample.segments is not None or len(real) < count:
            raise UserError(
                "fill-in-the-middle moves boundaries of documents; give them to it, not to the source it wraps"
            )
        # the last target follows the last token
        text = np.concatenate([sample.tokens[:count], sample.targets[max(count - 1, 0) : count]])
        rng = np.random.RandomState((self._seed + index) % 2**32)
        text = fill_in_middle(text, self._settings, rng=rng, tokenizer=self._tokenizer)[: len(text)]
        return make_sample(text, sequence_length=self.sequence_length, boundaries=self._boundaries)


def fill_in_middle(
    text: Integer[np.ndarray, "N"],
    settings: FillInMiddle,
    *,
    rng: np.random.RandomState,
    tokenizer: Tokenizer | None = None,
) -> Int32[np.ndarray, "M"]:
    """The documents of a text, cut or not; three tokens longer for each that is (with a tokenizer, about)."""
    documents = []
    for document, end in _pieces(text, settings.end_of_document):
        documents += [_cut_document(document, settings, rng, tokenizer), end]
    return np.concatenate(documents).astype(np.int32)


def _cut_document(
    document: Integer[np.ndarray, "N"], settings: FillInMiddle, rng: np.random.RandomState, tokenizer: Tokenizer | None
) -> Integer[np.ndarray, "M"]:
    """The document cut, or its fragments cut, or as it was."""
    pieces = _pieces(document, settings.fragment)
    if not len(document) or rng.random_sample() >= settings.rate:
        return document
    if settings.fragment_rate is None or len(pieces) == 1:
        return _cut(document, settings, rng, tokenizer)
    fragments = []
    for fragment, end in pieces:
        is_cut = len(fragment) > 0 and rng.random_sample() < settings.fragment_rate
        fragments += [_cut(fragment, settings, rng, tokenizer) if is_cut else fragment, end]
    return np.concatenate(fragments)


def _cut(
    piece: Integer[np.ndarray, "N"], settings: FillInMiddle, rng: np.random.RandomState, tokenizer: Tokenizer | None
) -> Integer[np.ndarray, "M"]:
    """The piece as PSM or SPM."""
    untouched = settings.untouched
    if untouched and tuple(piece[: len(untouched)].tolist()) == untouched:
        return piece
    parts = None if tokenizer is None else _split_characters(piece, rng, tokenizer)
    if parts is None:
        begin, end = np.sort(rng.randint(0, len(piece) + 1, size=2)).tolist()
        parts = [piece[:begin], piece[begin:end], piece[end:]]
    prefix, middle, suffix = parts
    if rng.random_sample() < settings.spm_rate:
        ordered = [[settings.prefix, settings.suffix], suffix, [settings.middle], prefix, middle]
    else:
        ordered = [[settings.prefix], prefix, [settings.suffix], suffix, [settings.middle], middle]
    return np.concatenate([np.asarray(part, np.int32) for part in ordered])


def _split_characters(
    piece: Integer[np.ndarray, "N"], rng: np.random.RandomState, tokenizer: Tokenizer
) -> list[Integer[np.ndarray, "..."]] | None:
    """Prefix, middle and suffix, each encoded by itself; None where that would change the text.

    It would where a sample begins inside a character, and where the tokenizer puts a space before all it encodes.
    """
    text = tokenizer.decode(piece)
    if REPLACEMENT in text:
        return None
    begin, end = np.sort(rng.randint(0, len(text) + 1, size=2)).tolist()
    parts = [tokenizer.encode(part) for part in (text[:begin], text[begin:end], text[end:])]
    return parts if tokenizer.decode(np.concatenate(parts)) == text else None


def _pieces(
    text: Integer[np.ndarray, "N"], end: int | None
) -> list[tuple[Integer[np.ndarray, "..."], Integer[np.ndarray, "..."]]]:
    """The text before each end token, with that token; the last piece may have none and be empty."""
    ends = [] if end is None else np.flatnonzero(text == end).tolist()
    starts = [0, *(place + 1 for place in ends)]
    return [(text[start:stop], text[stop : stop + 1]) for start, stop in zip(starts, [*ends, len(text)], strict=True)]
