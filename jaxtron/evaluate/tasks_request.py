"""The flags of `evaluate` for tasks of lm-evaluation-harness, last words of texts (LAMBADA), and pairs of texts."""

from dataclasses import dataclass
from pathlib import Path

from jaxtron.command import FlagParser, check_output, file_path, natural, positive
from jaxtron.config import UserError, settings
from jaxtron.generate.source import (
    ModelConfiguration,
    ModelSource,
    add_model_flags,
    read_continuing,
    read_model,
    split_source,
    taken,
)
from jaxtron.run.configuration import Configuration

PROGRAM = "python -m jaxtron.evaluate"
USAGE = (
    f"{PROGRAM} RUN_OR_WEIGHTS --tasks NAME[,NAME ...] [--flag value ...]\n"
    f"       {PROGRAM} RUN_OR_WEIGHTS --last_words FILE.jsonl [--flag value ...]\n"
    f"       {PROGRAM} RUN_OR_WEIGHTS --pairs FILE.jsonl [--rouge] [--bleu] [--flag value ...]"
)
# by these a line asks for what is here
PURPOSES = ("--tasks", "--last_words", "--pairs")
# flags that only one of them has an effect on
OWN = {
    "tasks": ("task_path", "num_fewshot", "add_bos_token"),
    "last_words": (),
    "pairs": ("rouge", "bleu", "max_new_tokens"),
}


@dataclass(frozen=True)
class TasksRequest:
    """A model, and tasks by name, texts whose last words it is to tell, or pairs of which it is to write the second."""

    source: ModelSource
    tasks: tuple[str, ...] = ()
    last_words: Path | None = None
    pairs: Path | None = None
    rouge: bool = False
    bleu: bool = False
    max_new_tokens: int | None = None
    task_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    add_bos_token: bool = False
    json: Path | None = None

    @property
    def purpose(self) -> str:
        """What is asked for, by the name of its flag."""
        return next((name for name in ("last_words", "pairs") if getattr(self, name) is not None), "tasks")

    @property
    def scores(self) -> tuple[str, ...]:
        """Scores of pairs that are asked for beside those that need no package."""
        return tuple(name for name in ("rouge", "bleu") if getattr(self, name))


def is_of_tasks(argv: list[str]) -> bool:
    """Whether a line is for this and not for the perplexity of a text."""
    return any(word.partition("=")[0] in PURPOSES for word in argv)


def parse_tasks(argv: list[str]) -> TasksRequest:
    """The request of a command line; a `UserError` for what is missing or cannot be."""
    found, rest = _parser().parse_known_args(argv)
    given = {name: value for name, value in vars(found).items() if value is not None}
    _, directory, overrides = split_source(rest, USAGE)
    model = {name: given.pop(name) for name in ("rows", "room", "step") if name in given}
    if "chat_template" in given:
        raise UserError("--chat_template has no effect here: tasks are plain text; leave it out")
    names = tuple(name.strip() for word in given.pop("tasks", []) for name in word.split(",") if name.strip())
    request = TasksRequest(source=ModelSource(directory, overrides, **model), tasks=names, **given)
    if bool(request.tasks) + (request.last_words is not None) + (request.pairs is not None) != 1:
        raise UserError(
            "give one of --tasks NAME[,NAME ...], --last_words FILE.jsonl and --pairs FILE.jsonl; "
            f"{PROGRAM} --help --tasks lists the flags"
        )
    for purpose, names in OWN.items():
        for name in names:
            if request.purpose != purpose and given.get(name, False) is not False:
                raise UserError(f"--{name} has no effect with --{request.purpose}; leave it out")
    if request.task_path is not None and not request.task_path.is_dir():
        raise UserError(f"--task_path {request.task_path} is no directory; give one with tasks as .yaml files")
    if request.json is not None:
        check_output("--json", request.json)
    return request


def read_asked(request: TasksRequest) -> ModelConfiguration:
    """The model's configuration; a `UserError` where there is none, or it does not write what is asked for."""
    if request.pairs is None:
        return read_continuing(request.source, f"--{request.purpose}")
    found = read_model(request.source)
    if found.config.family.writes != "answer":
        raise UserError(
            f"{request.source.directory} has model.family {found.config.model.family}, which goes on with a text, and "
            "--pairs is for models that answer one with another, such as t5: give --tasks or --text"
        )
    return found


def _parser() -> FlagParser:
    purpose = (
        "Scores of a trained model: tasks of lm-evaluation-harness, with its own rules and metrics, or how often and "
        "how surely the model tells the last word of a text (LAMBADA), or how many answers of an encoder-decoder are "
        "those that were wanted."
    )
    further = (
        f"Of training's settings it takes {taken()}. Tasks of the harness load their data from the internet; those of "
        'local files work without. Needs pip install "jaxtron[eval]" for --tasks, and "jaxtron[pairs]" for --rouge and '
        "--bleu. docs/evaluation.md tells more."
    )
    parser = FlagParser(PROGRAM, purpose, usage=USAGE, further=further, others=settings(Configuration))
    add = parser.add_argument
    add("--tasks", nargs="+", metavar="NAME", help="of lm-evaluation-harness, with commas or spaces between")
    add("--last_words", type=file_path, metavar="FILE", help='lines such as {"text": "..."}')
    add("--pairs", type=file_path, metavar="FILE", help="a text and an answer a line, in the forms of data.format chat")
    add("--rouge", action="store_true", help="of pairs also ROUGE-1, -2 and -L (rouge-score)")
    add("--bleu", action="store_true", help="of pairs also BLEU (sacrebleu)")
    add("--max_new_tokens", type=positive, metavar="N", help="of an answer to one of a pair (none: the room)")
    add("--task_path", type=file_path, metavar="DIRECTORY", help="with further tasks as .yaml files")
    add("--num_fewshot", type=natural, metavar="N", help="examples before each question (none: the task's own number)")
    add("--limit", type=positive, metavar="N", help="of each task, the texts or the pairs only the first so many")
    add(
        "--add_bos_token",
        action="store_true",
        help="begin every text with the tokenizer's bos_token, as Gemma needs it",
    )
    add("--json", type=file_path, metavar="FILE", help="write all figures")
    add_model_flags(parser)
    return parser
