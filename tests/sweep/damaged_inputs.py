"""Small inputs of every kind, and the command that reads each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.sweep.bad_words import PIPE
from tests.sweep.damage import byte_damages, json_damages, lines_damages, text_damages, yaml_damages

Damages = Iterator[tuple[str, bytes]]
Damage = Callable[..., Damages]


@dataclass(frozen=True)
class Input:
    """A file of the workplace, a command that reads it, and how it is damaged.

    `kinds`: damages beside those of bytes. `is_checked`: the file has sizes or checksums, so that damage is an error or
    changes nothing; others may well be good files with another content, such as a text with a line less. `is_named`:
    the error must name the file, or one of `others`; in a configuration it may be another setting, or the file that a
    setting now names.
    """

    name: str
    file: str
    words: tuple[str, ...]
    kinds: tuple[Damage, ...] = ()
    is_checked: bool = False
    flips: int = 6
    is_named: bool = True
    others: tuple[str, ...] = ()

    def damages(self, content: bytes) -> Damages:
        """The name and content of every damaged file."""
        seed = sum(self.name.encode())
        yield from byte_damages(content, seed=seed, flips=self.flips)
        for kind in self.kinds:
            yield from kind(content, seed=seed)


TEXT, JSON, LINES, YAML = text_damages, json_damages, lines_damages, yaml_damages
PREPROCESS = ("preprocess", "--output", "out", "--workers", "1")
TOKENIZE = (*PREPROCESS, "--input", "documents.jsonl", "--tokenizer")
CURATE = ("curate", "--output", "curated", "--steps")
PLAN = ("plan", "tiny.yaml", "--gpu", "h100")

INPUTS = (
    Input("configuration", "tiny.yaml", ("train", "tiny.yaml"), (TEXT, YAML), is_named=False),
    Input("parent of a configuration", "parent.yaml", ("train", "child.yaml"), (TEXT, YAML), is_named=False),
    Input("curation", "curation.yaml", ("curate", "curation.yaml"), (TEXT, YAML), is_named=False),
    Input("text", "text.txt", ("train", "tiny.yaml"), (TEXT,), is_named=False),
    Input("conversations", "chat.jsonl", ("train", "chat.yaml"), (TEXT, LINES)),
    Input(
        "chat template",
        "chat.jinja",
        ("train", "chat.yaml", "--data.chat.template", "chat.jinja"),
        (TEXT,),
        is_named=False,
    ),
    Input("documents", "documents.jsonl", (*TOKENIZE, "bytes"), (TEXT, LINES)),
    Input(
        "gzip", "documents.jsonl.gz", (*PREPROCESS, "--input", "documents.jsonl.gz", "--tokenizer", "bytes"), (), True
    ),
    Input(
        "zstd", "documents.jsonl.zst", (*PREPROCESS, "--input", "documents.jsonl.zst", "--tokenizer", "bytes"), (), True
    ),
    Input("parquet", "documents.parquet", (*PREPROCESS, "--input", "documents.parquet", "--tokenizer", "bytes")),
    Input("curated documents", "documents.jsonl", (*CURATE, "exact", "--input", "documents.jsonl"), (TEXT, LINES)),
    Input(
        "tasks",
        "tasks.jsonl",
        (*CURATE, "decontaminate", "--decontaminate.tasks", "tasks.jsonl", "--input", "documents.jsonl"),
        (TEXT, LINES),
    ),
    Input(
        "configuration of a run",
        "run/config.yaml",
        ("evaluate", "run", "--text", "text.txt"),
        (TEXT, YAML),
        is_named=False,
    ),
    Input("text to score", "text.txt", ("evaluate", "run", "--text", "text.txt"), (TEXT,), is_named=False),
    Input("tokenizer.json", "tokenizer.json", (*TOKENIZE, "tokenizer.json"), (TEXT, JSON)),
    Input("SentencePiece", "pieces.model", (*TOKENIZE, "pieces.model"), (), False, 24),
    Input("ranks", "ranks.tiktoken", (*TOKENIZE, "ranks.tiktoken"), (TEXT,), False, 24),
    Input("index", "tokens.idx", ("preprocess", "inspect", "tokens"), (), True, 40),
    Input("index of a run", "tokens.idx", ("train", "tiny.yaml", "--data.path", "tokens"), (), True),
    Input(
        "index that is merged", "tokens.idx", ("preprocess", "merge", "--input", "tokens", "--output", "out"), (), True
    ),
    Input("tokens", "tokens.bin", ("preprocess", "inspect", "tokens")),
    Input("tokens of a run", "tokens.bin", ("train", "tiny.yaml", "--data.path", "tokens")),
    Input("blend", "mix.blend", ("train", "tiny.yaml", "--data.path", "mix.blend"), (TEXT,), is_named=False),
    Input("schedule", "table.csv", (*PIPE, "--pipeline.schedule", "table.csv"), (TEXT,)),
    Input("machine", "machine.yaml", (*PLAN, "--machine", "machine.yaml"), (TEXT, YAML)),
    Input("plan", "plan.json", (*PLAN, "--compare", "plan.json"), (TEXT, JSON)),
    Input("metrics", "metrics.jsonl", (*PLAN, "--calibrate", "metrics.jsonl"), (TEXT, LINES)),
    Input("target", "gpu.textproto", ("plan", "tiny.yaml", "--gpu", "gpu.textproto"), (TEXT,)),
)
