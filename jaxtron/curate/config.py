"""What to read, which steps to take, and the limits of each."""

from typing import Literal

from pydantic import Field, model_validator

from jaxtron.config import Config, FileName, UserError

Step = Literal["length", "quality", "language", "exact", "near", "decontaminate"]
STEPS: dict[str, str] = {
    "length": "drop documents of too few or too many characters",
    "quality": "drop documents by the rules of Gopher, and of C4 where asked",
    "language": "keep documents of some languages",
    "exact": "keep one of documents with the same text",
    "near": "keep one of documents that share most of their shingles",
    "decontaminate": "cut what occurs in evaluation tasks",
}
NUM_HASHES_MOST = 1024

PROGRAM = "python -m jaxtron.curate"
PURPOSE = (
    "Filter, deduplicate and decontaminate JSONL or Parquet. Writes documents/ (the input's own lines, in order), "
    "dropped.jsonl (every document that went, why, and for which other) and report.json to the output folder. "
    "The same command goes on where a run was ended."
)


class Length(Config):
    """Documents outside these lengths are dropped."""

    least: int = Field(default=200, ge=0)
    """Characters a document needs."""
    most: int | None = Field(default=None, ge=1)
    """Characters a document may have; none: any number."""

    @model_validator(mode="after")
    def _some_length_is_left(self) -> "Length":
        if self.most is not None and self.most < self.least:
            raise UserError(f"length.least {self.least} is more than length.most {self.most}; nothing would be kept")
        return self


class Quality(Config):
    """A document that breaks a rule is dropped; none switches a rule off. Defaults: Gopher (2112.11446, appendix A)."""

    min_words: int | None = Field(default=50, ge=0)
    """Words, split at white space, a document needs."""
    max_words: int | None = Field(default=100_000, ge=1)
    """Words a document may have."""
    min_mean_word_length: float | None = 3.0
    """Mean characters of a word."""
    max_mean_word_length: float | None = 10.0
    """Mean characters of a word."""
    max_symbols_per_word: float | None = 0.1
    """Hash signs, or ellipses, for each word."""
    max_bullet_lines: float | None = 0.9
    """Share of lines that begin with a bullet."""
    max_ellipsis_lines: float | None = 0.3
    """Share of lines that end with an ellipsis."""
    min_alphabetic_words: float | None = 0.8
    """Share of words with a letter."""
    min_stop_words: int | None = Field(default=2, ge=0)
    """How many of the stop words must occur."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """Words that running text of the language has; these are English."""
    max_duplicate_lines: float | None = 0.3
    """Share of lines that occurred before."""
    max_duplicate_line_characters: float | None = 0.2
    """The same, by characters."""
    max_duplicate_paragraphs: float | None = 0.3
    """Share of paragraphs that occurred before."""
    max_duplicate_paragraph_characters: float | None = 0.2
    """The same, by characters."""
    max_top_ngram: tuple[float, ...] = (0.2, 0.18, 0.16)
    """Share of letters in the most frequent n-gram of 2, 3, ... words; [] for no such rule."""
    max_duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1)
    """Share of letters in n-grams of 5, 6, ... words that occur twice; [] for no such rule."""
    min_sentences: int | None = Field(default=None, ge=0)
    """C4's rule: sentences needed; C4 has 5."""
    min_terminal_lines: float | None = None
    """After C4: share of lines that end in a full stop, question or exclamation mark."""
    forbidden: tuple[str, ...] = ()
    """Text that no document may have, in any case; C4 has 'lorem ipsum' and '{'."""


class Language(Config):
    """Language by fastText's small classifier of 176 languages; needs the extra `language`."""

    keep: tuple[str, ...] = Field(default=("en",), min_length=1)
    """Codes of the languages to keep."""
    least: float = Field(default=0.65, ge=0, le=1)
    """Probability that the language needs."""


class Exact(Config):
    """Of documents with the same 128-bit hash the first is kept."""

    normalize: bool = True
    """Whether texts that differ only in case and white space are the same."""


class Near(Config):
    """MinHash over shingles finds candidates in bands; connected components of similar pairs keep one document."""

    jaccard: float = Field(default=0.8, gt=0, le=1)
    """Shared part of two documents' shingles, from which on."""
    hashes: int = Field(default=128, ge=2, le=NUM_HASHES_MOST)
    """Minima in a signature, 4 bytes each."""
    unit: Literal["words", "characters"] = "words"
    """What shingles are made of; characters for languages without spaces."""
    shingle: int = Field(default=5, ge=1)
    """Words or characters in a shingle; 24 is usual for characters."""
    miss_weight: float = Field(default=0.9, gt=0, lt=1)
    """What a missed pair weighs, against a candidate in vain, when the bands are chosen."""
    verify: Literal["estimate", "exact"] = "estimate"
    """Candidates are held to the Jaccard index of their signatures, or to the one of their shingles."""
    keep: Literal["first", "longest"] = "first"
    """Which document of a component stays."""
    seed: int = Field(default=0, ge=0)
    """Of the hash functions."""


class Decontaminate(Config):
    """Text around words that also occur in task files is cut, as for GPT-3 and Megatron's corpora."""

    tasks: tuple[FileName, ...] = ()
    """JSONL files of tasks."""
    fields: tuple[str, ...] = Field(default=("text",), min_length=1)
    """Fields of a task that hold text."""
    ngram: int = Field(default=13, ge=1)
    """Words that count as a hit."""
    min_ngram: int = Field(default=8, ge=1)
    """A task of fewer words than ngram, but so many, counts whole."""
    max_count: int = Field(default=10, ge=1)
    """N-grams that the documents hold more often are common speech, and left alone."""
    margin: int = Field(default=200, ge=0)
    """Characters cut on each side of a hit."""
    least: int = Field(default=200, ge=0)
    """Parts of a cut document with fewer characters are dropped."""
    max_cuts: int = Field(default=10, ge=0)
    """Documents with more cuts are dropped."""

    @model_validator(mode="after")
    def _short_tasks_are_shorter(self) -> "Decontaminate":
        if self.min_ngram > self.ngram:
            raise UserError(
                f"decontaminate.min_ngram {self.min_ngram} is more than decontaminate.ngram {self.ngram}; lower it"
            )
        return self


class Curation(Config):
    """Everything `python -m jaxtron.curate` takes."""

    input: tuple[FileName, ...] = ()
    """Files or folders of JSON lines (also .gz, .bz2, .xz, .zst) or Parquet, a document a line or row."""
    output: FileName = ""
    """Folder for documents/, dropped.jsonl and report.json."""
    steps: tuple[Step, ...] = ()
    """What to do; always done in the order of this list, whatever the order given."""
    text_field: str = "text"
    """Field of a record that holds the document's text."""
    id_field: str = "id"
    """Field that names it in dropped.jsonl; it may be missing."""
    damaged: Literal["error", "drop"] = "error"
    """Lines that are no documents end the run, or are dropped like others."""
    workers: int = Field(default=1, ge=1)
    """Processes, or tasks of the engine, at a time."""
    engine: Literal["local", "ray"] = "local"
    """Processes of this machine, or tasks of a Ray cluster that shares its files."""
    ray_address: str | None = None
    """The cluster; none: the one of $RAY_ADDRESS, or one started here for the run."""
    piece_bytes: int = Field(default=64 << 20, ge=1)
    """A plain .jsonl file is worked on, and written, in pieces of so many bytes."""
    group_documents: int = Field(default=1 << 25, ge=1)
    """Documents whose hashes one task compares; more are shared out by hash."""
    length: Length = Length()
    quality: Quality = Quality()
    language: Language = Language()
    exact: Exact = Exact()
    near: Near = Near()
    decontaminate: Decontaminate = Decontaminate()

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> "Curation":
        for step in STEPS:
            if step in self.model_fields_set and step not in self.steps:
                given = " ".join([*self.steps, step])
                raise UserError(f"settings of {step} are given but --steps has no {step}; say --steps {given}")
        if self.ray_address is not None and self.engine != "ray":
            raise UserError("ray_address has no effect with the local engine; say --engine ray")
        return self
