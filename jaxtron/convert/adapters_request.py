"""`python -m jaxtron.convert adapters RUN --base WEIGHTS --output DIRECTORY`: what the command line asks for."""

from dataclasses import dataclass
from pathlib import Path

from jaxtron.command import FlagParser, file_path, natural
from jaxtron.config import UserError, load
from jaxtron.convert.request import PROGRAM, check_output
from jaxtron.convert.target import check_new
from jaxtron.run.configuration import Configuration, configuration_type
from jaxtron.weights.hub import hub_settings, is_hub

ADAPTERS_USAGE = f"{PROGRAM} adapters RUN --base WEIGHTS --output DIRECTORY [--step STEP]"


@dataclass(frozen=True)
class AdaptersRequest:
    """The adapters of a run, for peft, beside the weights in `base`; `step` is the checkpoint's (none: the newest)."""

    run: Path
    base: Path
    output: Path
    step: int | None = None


def parse_adapters(argv: list[str]) -> AdaptersRequest:
    """The request of a command line after `adapters`; a `UserError` for what is missing or cannot be."""
    purpose = (
        "Writes the adapters of a run (train.lora) as peft has them (adapter_config.json, adapter_model.safetensors), "
        "by the names of the Hugging Face weights that the run began with."
    )
    parser = FlagParser(f"{PROGRAM} adapters", purpose, usage=ADAPTERS_USAGE)
    parser.add_argument("run", type=file_path, metavar="RUN", help="directory of the run")
    parser.add_argument("--base", type=file_path, required=True, metavar="WEIGHTS", help="directory of the weights")
    parser.add_argument("--output", type=file_path, required=True, metavar="DIRECTORY", help="new or empty")
    parser.add_argument("--step", type=natural, metavar="STEP", help="of the run's checkpoint (none: the newest)")
    return AdaptersRequest(**vars(parser.parse_args(argv)))


def adapters_configuration(request: AdaptersRequest) -> Configuration:
    """What the run was trained with; a `UserError` where it has no adapters, or the weights are no such model's."""
    path = request.run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{request.run} has no config.yaml; give the --run.directory of a training")
    check_output(request.output)
    if not request.output.exists():
        check_new("--output", request.output)
    config = load(configuration_type([str(path)]), path).resolved()
    if config.train.lora is None:
        raise UserError(f"{path} has no train.lora: the run has no adapters")
    if not is_hub(request.base):
        raise UserError(f"--base {request.base} has no config.json; give a directory of Hugging Face weights")
    words = ["--data.sequence_length", str(config.data.sequence_length)]
    there = load(Configuration, None, words, under=hub_settings(request.base)).resolved().model
    for name in ("pattern", "num_layers", "hidden_size", "num_heads", "kv_heads", "head_size", "mlp_width"):
        old, new = getattr(there, name), getattr(config.model, name, None)
        if old != new:
            raise UserError(f"--base {request.base} is of another model: its {name} is {old}, and the run's {new}")
    return config
