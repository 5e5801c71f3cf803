"""The command's own flags, and which of training's settings it takes beside them."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from jaxtron.command import FlagParser, check_output, file_path, natural, positive
from jaxtron.config import SettingsSource, UserError, load, settings, split_arguments
from jaxtron.data.files.file_kind import file_kind
from jaxtron.data.files.reader import decode_text, read_content
from jaxtron.evaluate import tasks_request
from jaxtron.evaluate.detokenize import DETOKENIZERS
from jaxtron.generate.source import LAYOUT, SETTINGS, check_taken, laid_out, taken
from jaxtron.models.families import DECODER
from jaxtron.run.configuration import Configuration, configuration_of, configuration_type
from jaxtron.weights.cache import named_weights
from jaxtron.weights.config_json import CONFIG_JSON
from jaxtron.weights.hub import hub_settings, is_hub, tokenizer_of

PROGRAM = "python -m jaxtron.evaluate"
USAGE = (
    f"{PROGRAM} RUN_OR_WEIGHTS --text FILE [FILE ...] [--flag value ...]\n"
    f"       {PROGRAM} RUN_OR_WEIGHTS --token_ids FILE.json --logits FILE.npy [--flag value ...]"
)
ALL_USAGE = f"{USAGE}\n       {tasks_request.USAGE}"
# what can be set: as where text is made, any layout, and how long windows are
TAKEN = (LAYOUT, (*SETTINGS, "data.sequence_length"))


@dataclass(frozen=True)
class EvaluateRequest:
    """A model, the texts to score in order, how windows overlap, and settings as words of a command line.

    `run` is the directory of a run, or of Hugging Face weights. `batch` counts windows of a step over all devices
    (none: eight for each part of the batch), `step` is the checkpoint's of a run (none: the newest). In the place of
    texts `token_ids` may be a file of rows of tokens, whose logits go to `logits`.
    """

    run: Path
    text: tuple[Path, ...]
    overrides: tuple[str, ...] = ()
    stride: int | None = None
    batch: int | None = None
    step: int | None = None
    detokenize: str = "none"
    json: Path | None = None
    token_ids: Path | None = None
    logits: Path | None = None

    @property
    def is_hub(self) -> bool:
        """Whether the model is of Hugging Face weights."""
        return is_hub(self.run)


def parse(argv: list[str]) -> EvaluateRequest:
    """The request of a command line; a `UserError` for what is missing, or a setting that is the checkpoint's."""
    found, rest = _parser().parse_known_args(argv)
    words, flags = split_arguments(Configuration, rest)
    if not words and found.text and len(found.text) > 1 and found.text[-1].is_dir():
        # `--text FILE RUN_DIRECTORY`
        words = [str(found.text.pop())]
        rest.append(words[0])
    if not words:
        raise UserError(f"no run directory; give it first: {PROGRAM} RUN_OR_WEIGHTS --text FILE")
    if len(words) > 1:
        raise UserError(f"unexpected argument {words[1]!r}: one run directory, then flags")
    check_taken(flags, *TAKEN)
    _check_purpose(found)
    if found.json is not None:
        check_output("--json", found.json)
    if found.logits is not None:
        check_output("--logits", found.logits)
    rest.remove(words[0])
    given = {name: value for name, value in vars(found).items() if value is not None}
    text = tuple(found.text or ())
    return EvaluateRequest(**given | {"run": named_weights(words[0]), "text": text, "overrides": tuple(rest)})


def _check_purpose(found: argparse.Namespace) -> None:
    """`UserError` unless there is a text, or tokens and a place for their logits, and nothing that the other reads."""
    if found.token_ids is None and found.logits is None:
        if not found.text:
            raise UserError(
                "nothing to score: give --text FILE, --token_ids FILE.json --logits FILE.npy, --tasks NAME[,NAME ...], "
                f"--last_words FILE.jsonl or --pairs FILE.jsonl; {PROGRAM} --help lists the flags"
            )
        return
    if found.token_ids is None or found.logits is None:
        there, other = (
            ("--token_ids", "--logits FILE.npy") if found.logits is None else ("--logits", "--token_ids FILE")
        )
        raise UserError(f"{there} needs {other} beside it")
    for name in ("text", "stride", "json", "detokenize"):
        if getattr(found, name) is not None:
            raise UserError(f"--{name} has no effect with --token_ids; leave it out")


def read_configuration(request: EvaluateRequest) -> tuple[Configuration, Configuration]:
    """The configuration that a model was trained with, and what of it holds here; `UserError` if there is no model."""
    path = file = request.run / "config.yaml"
    under, words = None, list(request.overrides)
    if request.is_hub:
        path, file, under = request.run / CONFIG_JSON, None, _hub_settings(request)
    elif not path.is_file():
        what = f"{request.run} has no config.yaml" if request.run.is_dir() else f"no directory {request.run}"
        raise UserError(
            f"{what}; give the --run.directory of a training, such as runs/gpt_tiny, or a directory of Hugging Face "
            "weights"
        )
    own = DECODER if under is None else under.tree["model"].get("family", DECODER)
    config_type = configuration_of(own) if file is None else configuration_type([str(file)])
    try:
        trained = load(config_type, file, under=under).resolved()
    except UserError as error:
        # what does not fit together has no place of its own
        raise error if str(request.run) in str(error) else UserError(f"{path}: {error}") from None
    if request.token_ids is not None and "train.precision" not in dict(split_arguments(Configuration, words)[1]):
        # as exact as the weights
        words += ["--train.precision", "fp32"]
    if request.token_ids is None and trained.family.text_loss is None:
        raise UserError(
            f"{path} has model.family {trained.model.family}, which does not predict the tokens of a text: no text can "
            "be scored with it; give a run of another family, such as decoder"
        )
    config = load(config_type, file, words, under=under).resolved()
    return trained, laid_out(config, request.overrides)


def _hub_settings(request: EvaluateRequest) -> SettingsSource:
    """The settings of a directory of weights, with a tokenizer where a text is scored."""
    if request.step is not None:
        raise UserError(f"--step {request.step} is of a run's checkpoints, and {request.run} has weights: leave it out")
    found = hub_settings(request.run)
    flags = dict(split_arguments(Configuration, request.overrides)[1])
    if request.token_ids is None and "data.tokenizer" not in flags:
        path = tokenizer_of(request.run)
        if path is None:
            raise UserError(
                f"{request.run} has no tokenizer that is known here: give --data.tokenizer, the model's own"
            )
        found.set("data.tokenizer", str(path.absolute()), str(path))
    return found


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


def _parser() -> FlagParser:
    purpose = (
        "Perplexity of a trained model, a run's or one of Hugging Face weights, on a text: of tokens, of words with "
        "Megatron's adjustment, and bits per byte. Several files are scored as one text, one after the other. Or the "
        "logits of rows of tokens."
    )
    further = (
        f"Of training's settings it takes {taken(*TAKEN)} (python -m jaxtron.train --help). The mesh need not be that "
        "of the training; by default it is one device, and with --devices all of those. The flags of --tasks, "
        f"--last_words and --pairs are listed by {PROGRAM} --help --tasks."
    )
    parser = FlagParser(PROGRAM, purpose, usage=ALL_USAGE, further=further, others=settings(Configuration))
    add = parser.add_argument
    add("--text", nargs="+", action="extend", type=file_path, metavar="FILE", help="UTF-8 text to score")
    add(
        "--token_ids",
        type=file_path,
        metavar="FILE",
        help="JSON with rows of tokens, of equal length: [[1, 5, 2], ...], or of an encoder and its decoder, "
        '{"tokens": [...], "decoder_tokens": [...]}; computed in fp32, unless --train.precision says otherwise',
    )
    add(
        "--logits",
        type=file_path,
        metavar="FILE",
        help="where their logits go, a .npy of float32 [row, token, vocabulary]",
    )
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
