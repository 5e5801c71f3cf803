"""The command's own flags, and which of training's settings it takes beside them."""

from dataclasses import dataclass
from pathlib import Path

from jaxtron.command import FlagParser, check_output, file_path, natural, positive
from jaxtron.config import UserError, load, settings, split_arguments
from jaxtron.data.config import DataConfig
from jaxtron.data.files.file_kind import file_kind
from jaxtron.data.files.reader import decode_text, read_content
from jaxtron.evaluate.detokenize import DETOKENIZERS
from jaxtron.run.configuration import Configuration, configuration_type

PROGRAM = "python -m jaxtron.evaluate"
USAGE = f"{PROGRAM} RUN_DIRECTORY --text FILE [FILE ...] [--flag value ...]"
# the others are the checkpoint's
SECTIONS = ("mesh", "context", "pipeline", "sharding", "runtime")
SETTINGS = (
    "devices",
    "train.precision",
    "data.tokenizer",
    "data.end_of_document",
    "data.sequence_length",
    "model.attention.implementation",
)


@dataclass(frozen=True)
class EvaluateRequest:
    """A run, the texts to score in order, how windows overlap, and settings as words of a command line.

    `batch` counts windows of a step over all devices (none: eight for each part of the batch), `step` is the
    checkpoint's (none: the newest).
    """

    run: Path
    text: tuple[Path, ...]
    overrides: tuple[str, ...] = ()
    stride: int | None = None
    batch: int | None = None
    step: int | None = None
    detokenize: str = "none"
    json: Path | None = None


def parse(argv: list[str]) -> EvaluateRequest:
    """The request of a command line; a `UserError` for what is missing, or a setting that is the checkpoint's."""
    found, rest = _parser().parse_known_args(argv)
    words, flags = split_arguments(Configuration, rest)
    if not words and len(found.text) > 1 and found.text[-1].is_dir():
        # `--text FILE RUN_DIRECTORY`
        words = [str(found.text.pop())]
        rest.append(words[0])
    if not words:
        raise UserError(f"no run directory; give it first: {PROGRAM} RUN_DIRECTORY --text FILE")
    if len(words) > 1:
        raise UserError(f"unexpected argument {words[1]!r}: one run directory, then flags")
    known = settings(Configuration)
    for name, _ in flags:
        if name in known and name not in SETTINGS and name.partition(".")[0] not in SECTIONS:
            raise UserError(f"--{name} is the checkpoint's own: leave it out, only {_taken()} can be set")
    if found.json is not None:
        check_output("--json", found.json)
    rest.remove(words[0])
    given = {name: value for name, value in vars(found).items() if value is not None}
    return EvaluateRequest(**given | {"run": file_path(words[0]), "text": tuple(found.text), "overrides": tuple(rest)})


def read_configuration(request: EvaluateRequest) -> tuple[Configuration, Configuration]:
    """The configuration that the run was trained with, and what of it holds here; `UserError` if there is no run."""
    path = request.run / "config.yaml"
    if not path.is_file():
        what = f"{request.run} has no config.yaml" if request.run.is_dir() else f"no directory {request.run}"
        raise UserError(f"{what}; give the --run.directory of a training, such as runs/gpt_tiny")
    config_type = configuration_type([str(path)])
    trained = load(config_type, path).resolved()
    if trained.family.text_loss is None:
        raise UserError(
            f"{path} has model.family {trained.model.family}, which does not predict the tokens of a text: no text can "
            "be scored with it; give a run of another family, such as decoder"
        )
    config = load(config_type, path, request.overrides).resolved()
    # layouts are not the training's but those asked for
    given = load(Configuration, None, request.overrides)
    mesh = given.mesh
    _, flags = split_arguments(Configuration, request.overrides)
    if "mesh.data" not in dict(flags) and given.devices is None:
        mesh = mesh.model_copy(update={"data": 1})
    data = DataConfig(
        tokenizer=config.data.tokenizer,
        end_of_document=config.data.end_of_document,
        sequence_length=config.data.sequence_length,
    )
    layout = {name: getattr(given, name) for name in SECTIONS} | {"mesh": mesh, "devices": given.devices}
    model = config.family.evaluated(config.model)
    return trained, config.model_copy(update={**layout, "data": data, "model": model})


def read_text(path: Path) -> str:
    """The text of a file, decompressed, its line ends untouched; a `UserError` if it is not there or no text."""
    try:
        content = read_content(path)
        if file_kind(path).kind == "lines":
            raise UserError(f"--text {path} is JSON lines, not text; write the texts of its documents to a file")
        return decode_text(content)
    except OSError as error:
        raise UserError(f"cannot read --text {path}: {error.strerror or error}") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--text {path} is {error}; convert it") from None


def _taken() -> str:
    return ", ".join([*(f"--{section}.*" for section in SECTIONS), *(f"--{name}" for name in SETTINGS)])


def _parser() -> FlagParser:
    purpose = (
        "Perplexity of a trained model on a text: of tokens, of words with Megatron's adjustment, and bits per byte. "
        "Several files are scored as one text, one after the other."
    )
    further = (
        f"Of training's settings it takes {_taken()} (python -m jaxtron.train --help). The mesh need not be that of "
        "the training; by default it is one device, and with --devices all of those."
    )
    parser = FlagParser(PROGRAM, purpose, usage=USAGE, further=further, others=settings(Configuration))
    add = parser.add_argument
    add("--text", nargs="+", action="extend", type=file_path, required=True, metavar="FILE", help="UTF-8 text to score")
    add(
        "--stride",
        type=positive,
        metavar="N",
        help="tokens that a window scores, those before them being context (Megatron: overlapping-eval; none: all, "
        "windows do not overlap)",
    )
    add("--batch", type=positive, metavar="B", help="windows at a time, over all devices (none: 8 for each part)")
    add("--step", type=natural, metavar="STEP", help="of the checkpoint (none: the newest)")
    add(
        "--detokenize",
        choices=sorted(DETOKENIZERS),
        metavar="NAME",
        help="wikitext: undo WikiText's spaces before tokenizing, as Megatron does; words and bytes are those of the "
        "text as it is (none: nothing is changed)",
    )
    add("--json", type=file_path, metavar="FILE", help="write all figures")
    return parser
