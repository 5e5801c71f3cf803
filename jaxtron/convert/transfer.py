"""The flags that move a whole model: from Hugging Face's files into a run, or from a run into such files."""

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtron.command import FlagParser, file_name, file_path, natural
from jaxtron.config import UserError, load, settings, split_arguments
from jaxtron.convert.target import check_new
from jaxtron.generate.origin import began_keys, began_with
from jaxtron.models.families import DECODER
from jaxtron.run.configuration import Configuration, configuration_of, configuration_type
from jaxtron.weights.cache import fetch_weights
from jaxtron.weights.hub import FAMILIES, SaidModel, config_of, hub_settings, is_hub, tokenizer_of

PROGRAM = "python -m jaxtron.convert"
USAGE = f"{PROGRAM} --from RUN_OR_WEIGHTS --to DIRECTORY [--flag value ...]"
HF, RUN = "hf", "run"
# NumPy's types of them are in weights/shards.py
DTYPES = ("fp32", "fp16", "bf16")
OF_FILES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?) ?([KMGT]?B?)", re.IGNORECASE)
TAKEN = {
    "run.directory": "give --to",
    "checkpoint.resume": "leave it out",
    "checkpoint.initialize_from": "give --from",
    "train.trainable": "give it to jaxtron.train, for nothing is trained yet",
    "train.lora": "give it to jaxtron.train, for nothing is trained yet",
}


@dataclass(frozen=True)
class TransferRequest:
    """A model, and where it goes.

    `format` is of what is written. Of an export: `step` of the checkpoint (none: the newest), `dtype` of all tensors
    (none: as the files that the run began with have it, else fp32), `shard_bytes` of a file at most, `family` the
    `model_type` (none: the one that the run began with, else the first that says all of the model).
    """

    source: Path
    target: Path
    name: str
    """Of the source, as it was given."""
    format: str
    overrides: tuple[str, ...] = ()
    step: int | None = None
    dtype: str | None = None
    shard_bytes: int = 5 * 10**9
    family: str | None = None


def parse_transfer(argv: list[str]) -> TransferRequest:
    """The request of a command line; a `UserError` for what is missing or cannot be."""
    found, rest = _parser().parse_known_args(argv)
    words, flags = split_arguments(Configuration, rest)
    if words:
        raise UserError(f"unexpected argument {words[0]!r}: {USAGE}")
    source = fetch_weights(found.source)
    if not is_hub(source) and not (source / "config.yaml").is_file():
        raise UserError(
            f"--from {source} has neither config.yaml nor config.json; give the --run.directory of a training, such as "
            "runs/gpt_tiny, or a directory of Hugging Face weights"
        )
    becomes = RUN if is_hub(source) else HF
    if found.format not in (None, becomes):
        what = "Hugging Face weights" if becomes == RUN else "a run"
        raise UserError(f"--format {found.format}: {source} is {what} already; leave it out")
    own = {"step": found.step, "dtype": found.dtype, "shard_bytes": found.shard_size, "family": found.family}
    given = {name: value for name, value in own.items() if value is not None}
    if becomes == RUN and given:
        flag = next(iter(given)).replace("shard_bytes", "shard_size")
        raise UserError(f"--{flag} is of an export, and {source} becomes a run: leave it out")
    for name, _ in flags:
        if becomes == HF:
            raise UserError(f"--{name} is a setting of training, and {source} becomes weights: leave it out")
        mend = next((mend for taken, mend in TAKEN.items() if f"{name}.".startswith(f"{taken}.")), None)
        if name.startswith("model.") or mend is not None:
            raise UserError(f"--{name} is not for this command: {mend or 'the model is that of the weights'}")
    check_new("--to", found.target)
    request = TransferRequest(source, found.target, found.source, becomes, tuple(rest))
    return replace(request, **given)


def run_configuration(request: TransferRequest) -> Configuration:
    """What the run of an import will be trained with, where nothing else is said."""
    under = hub_settings(request.source)
    flags = dict(split_arguments(Configuration, request.overrides)[1])
    tokenizer = tokenizer_of(request.source)
    if "data.tokenizer" not in flags:
        if tokenizer is None:
            raise UserError(
                f"{request.source} has no tokenizer that is known here: give --data.tokenizer, the model's own in a "
                "form that is read, or bytes if no text will be"
            )
        under.set("data.tokenizer", str(tokenizer.absolute()), str(tokenizer))
    config_type = configuration_of(under.tree["model"].get("family", DECODER))
    try:
        load(config_type, None, None, under=under)
    except UserError as error:
        # what does not fit together has no place of its own
        raise error if str(request.source) in str(error) else UserError(f"{request.source}: {error}") from None
    words = [*request.overrides, "--run.directory", str(request.target)]
    return load(config_type, None, words, under=under).resolved()


def export_configuration(request: TransferRequest) -> tuple[Configuration, SaidModel, str]:
    """What the run was trained with, what config.json will say, and the type of the tensors; `UserError` where no
    class of Hugging Face can say it."""
    path = request.source / "config.yaml"
    config_type = configuration_type([str(path)])
    trained = load(config_type, path, None).resolved()
    began = began_keys(began_with(request.source))
    length = trained.data.sequence_length
    try:
        said = config_of(trained.model, began=began, positions=length, name=request.family)
    except UserError as error:
        raise UserError(f"{path}: {error}; nothing was written") from None
    dtype = request.dtype or OF_FILES.get(str(began.get("dtype", began.get("torch_dtype"))), "fp32")
    return trained, said, dtype


def _size(text: str) -> int:
    """A flag's bytes, such as 5GB, by powers of ten as Hugging Face counts them."""
    match = SIZE.fullmatch(text.strip())
    unit = match and next((unit for unit in (match[2].upper(), f"{match[2].upper()}B") if unit in UNITS), None)
    if match is None or unit is None or float(match[1]) * UNITS[unit] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[unit])


def _parser() -> FlagParser:
    purpose = (
        "Moves a whole model. A directory of Hugging Face weights (config.json and safetensors), or a repository's "
        "name such as meta-llama/Llama-3.1-8B, becomes a run with a checkpoint of step 0, for training and evaluation; "
        "a run becomes such a directory. One layer of one parameter is in memory at a time."
    )
    further = (
        "Into a run it takes training's settings too, all but the model's (python -m jaxtron.train --help): what "
        "config.yaml says where a later command says nothing."
    )
    parser = FlagParser(PROGRAM, purpose, usage=USAGE, further=further, others=settings(Configuration))
    add = parser.add_argument
    add("--from", dest="source", type=file_name, required=True, metavar="RUN_OR_WEIGHTS", help="what is converted")
    add("--to", dest="target", type=file_path, required=True, metavar="DIRECTORY", help="a new directory")
    add("--format", choices=(HF, RUN), help="of what is written (none: what --from is not)")
    add("--step", type=natural, metavar="STEP", help="of a run's checkpoint (none: the newest)")
    add("--dtype", choices=DTYPES, help="of the tensors (none: that of the weights it began with, else fp32)")
    add("--shard_size", type=_size, metavar="SIZE", help="of a file at most, unless a tensor is larger (none: 5GB)")
    add(
        "--family",
        choices=sorted(FAMILIES),
        metavar="MODEL_TYPE",
        help="of config.json (none: the one it began with, else the first that says all settings of the model)",
    )
    return parser
