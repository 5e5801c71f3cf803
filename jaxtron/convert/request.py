"""The flags of `upcycle`, and the configurations of both models: the dense one's and the mixture's."""

from dataclasses import dataclass
from pathlib import Path

from jaxtron.command import FlagParser, file_path, natural, positive, positive_number
from jaxtron.config import SettingsSource, UserError, load, settings, split_arguments
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import MLP, MOE
from jaxtron.run.configuration import Configuration, configuration_type
from jaxtron.weights.cache import named_weights
from jaxtron.weights.config_json import CONFIG_JSON
from jaxtron.weights.hub import TOKENIZER, hub_settings, is_hub

PROGRAM = "python -m jaxtron.convert"
USAGE = f"{PROGRAM} upcycle RUN_OR_WEIGHTS --output DIRECTORY [--flag value ...]"
# what a mixture's model may be told; all else of it is the checkpoint's or follows from the flags
MODEL_SETTINGS = (*(f"model.{name}" for name in ModelConfig.FREE.split()), "model.moe.bias_rate")
ORDERS = ("softmax", "topk_softmax")
TAKEN = {
    "run.directory": "--output",
    "model.moe.num_experts": "--experts",
    "model.moe.expert_size": "--granularity",
    "model.moe.top_k": "--top_k",
    "model.moe.scores": "--scores",
    "checkpoint.resume": None,
    "checkpoint.initialize_from": None,
    "train.trainable": None,
    "train.lora": None,
}


@dataclass(frozen=True)
class UpcycleRequest:
    """A dense model, and the mixture that it becomes: `experts` copies of each MLP, each in `granularity` shards.

    `dense` is the directory of a run, or of Hugging Face weights. `step` is the checkpoint's of a run (none: the
    newest), `router_std` the router's (none: model.initial_std).
    """

    dense: Path
    output: Path
    overrides: tuple[str, ...] = ()
    experts: int = 8
    granularity: int = 1
    top_k: int | None = None
    scores: str = "softmax"
    router_std: float | None = None
    step: int | None = None

    @property
    def is_hub(self) -> bool:
        """Whether it begins with Hugging Face weights."""
        return is_hub(self.dense)

    @property
    def num_experts(self) -> int:
        """Of a layer of the mixture."""
        return self.experts * self.granularity

    @property
    def chosen(self) -> int:
        """Experts of a token: where nothing is said two copies, of experts that are whole, or the shards of one."""
        return self.top_k or (min(2, self.experts) if self.granularity == 1 else self.granularity)


def parse(argv: list[str]) -> UpcycleRequest:
    """The request of a command line after `upcycle`; a `UserError` for what is missing or cannot be."""
    found, rest = _parser().parse_known_args(argv)
    words, flags = split_arguments(Configuration, rest)
    if not words:
        raise UserError(f"no directory of a run or of weights; give it first: {USAGE}")
    if len(words) > 1:
        raise UserError(f"unexpected argument {words[1]!r}: one directory, then flags")
    for name, _ in flags:
        is_fixed = name.startswith("model.") and not any(f"{name}.".startswith(f"{free}.") for free in MODEL_SETTINGS)
        if is_fixed or name in TAKEN:
            instead = TAKEN.get(name)
            mend = f"give {instead}" if instead else f"leave it out; {PROGRAM} upcycle --help lists what can be set"
            raise UserError(f"--{name} is not for this command: {mend}")
    rest.remove(words[0])
    given = {name: value for name, value in vars(found).items() if value is not None}
    request = UpcycleRequest(**given | {"dense": named_weights(words[0]), "overrides": tuple(rest)})
    if request.chosen % request.granularity:
        raise UserError(
            f"--top_k {request.chosen} is not a multiple of --granularity {request.granularity}: a token would not get "
            "all shards of an MLP; change one"
        )
    if request.chosen > request.num_experts:
        raise UserError(
            f"--top_k {request.chosen} is more than the {request.num_experts} experts of --experts {request.experts} x "
            f"--granularity {request.granularity}"
        )
    return request


def read_configuration(request: UpcycleRequest) -> tuple[Configuration, Configuration]:
    """What the dense model is and was trained with, and the run of the mixture; `UserError` where one cannot be."""
    path, under, config_type = _start(request)
    file = path if under is None else None
    check_output(request.output)
    dense = _load_dense(config_type, path, under)
    model = dense.model
    if not isinstance(model, ModelConfig):
        raise UserError(f"{path} has model.family {model.family}, which has no experts: only a decoder can be upcycled")
    if MOE.symbol in model.pattern or MLP.symbol not in model.pattern:
        raise UserError(
            f"{path} has model.pattern {model.pattern}: only a model with MLPs ({MLP.symbol}) and no experts "
            f"({MOE.symbol}) can be upcycled"
        )
    if model.bias or model.has_mlp_bias:
        name = "bias" if model.bias else "mlp_bias"
        mend = "a model without can be upcycled" if request.is_hub else f"train with --model.{name} false"
        raise UserError(f"{path} has model.{name} true, and its biases cannot become those of experts: {mend}")
    if dense.train.lora is not None:
        raise UserError(f"{path} has adapters (train.lora): only a run that trains the model itself can be upcycled")
    if dense.train.trainable != ("*",):
        raise UserError(f"{path} has train.trainable {' '.join(dense.train.trainable)}: only a run that trains all can")
    if model.mlp_width % request.granularity:
        raise UserError(
            f"--granularity {request.granularity}: model.mlp_size {model.mlp_width} of {path} is not a multiple of it"
        )
    made = {
        "run.directory": request.output,
        "model.pattern": model.pattern.replace(MLP.symbol, MOE.symbol),
        "model.moe.num_experts": request.num_experts,
        "model.moe.top_k": request.chosen,
        "model.moe.expert_size": model.mlp_width // request.granularity,
        "model.moe.scores": request.scores,
        # what the dense run began with is no beginning of the mixture
        "checkpoint.initialize_from": "none",
    }
    words = [word for name, value in made.items() for word in (f"--{name}", str(value))]
    return dense, load(config_type, file, [*request.overrides, *words], under=under).resolved()


def _load_dense(config_type: type[Configuration], path: Path, under: SettingsSource | None) -> Configuration:
    """The dense model's configuration; an error names the file, from which the settings may come in other words."""
    try:
        return load(config_type, path if under is None else None, under=under).resolved()
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None


def _start(request: UpcycleRequest) -> tuple[Path, SettingsSource | None, type[Configuration]]:
    """The file that says what the dense model is, its settings where these are in other words there, their type."""
    directory = request.dense
    if not request.is_hub:
        path = directory / "config.yaml"
        if not path.is_file():
            what = f"{directory} has no config.yaml" if directory.is_dir() else f"no directory {directory}"
            raise UserError(
                f"{what}; give the --run.directory of a training, such as runs/gpt_tiny, or a directory of Hugging "
                "Face weights, which has a config.json"
            )
        return path, None, configuration_type([str(path)])
    if request.step is not None:
        raise UserError(
            f"--step {request.step} is of a run's checkpoints, and {directory} has Hugging Face weights: leave it out"
        )
    found = hub_settings(directory)
    if not any(word.partition("=")[0] == "--data.tokenizer" for word in request.overrides) and "data" not in found.tree:
        others = [path.name for path in sorted(directory.glob("*.model"))]
        such = (
            f"such as --data.tokenizer {directory / others[0]}" if others else "the model's own in a form that is read"
        )
        raise UserError(f"{directory} has no {TOKENIZER}: give --data.tokenizer, {such}")
    return directory / CONFIG_JSON, found, Configuration


def check_output(path: Path) -> None:
    """`UserError` unless the directory is not there or empty: what is in it would be overwritten."""
    if (path / "checkpoints").is_dir() and not (path / "config.yaml").exists():
        raise UserError(
            f"--output {path} has checkpoints and no config.yaml: a command has just begun there, or was ended before "
            "it was done; if none is at work, remove it, or give a new directory"
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "is not empty" if path.is_dir() else "is a file"
        raise UserError(f"--output {path} {what}; give a new directory")


def _parser() -> FlagParser:
    purpose = (
        "Makes a mixture of experts of a trained dense model, a run's or that of Hugging Face weights (config.json and "
        "safetensors): its MLPs are copied, perhaps in shards, a router is "
        "drawn, and a training is begun in a new directory, at step 0, that python -m jaxtron.train goes on with."
    )
    further = (
        "Of training's settings it takes all but those of the model, of which it takes "
        f"{', '.join(f'--{name}' for name in MODEL_SETTINGS)} (python -m jaxtron.train --help); what is left out "
        "is the dense run's, or of weights as in training."
    )
    parser = FlagParser(f"{PROGRAM} upcycle", purpose, usage=USAGE, further=further, others=settings(Configuration))
    add = parser.add_argument
    add("--output", type=file_path, required=True, metavar="DIRECTORY", help="of the mixture's run, new or empty")
    add("--experts", type=positive, metavar="E", help="copies of each MLP (none: 8)")
    add("--granularity", type=positive, metavar="G", help="shards of each copy, each an expert (none: 1)")
    add(
        "--top_k",
        type=positive,
        metavar="K",
        help="experts of a token, a multiple of G (none: 2, or with shards G)",
    )
    add(
        "--scores",
        choices=ORDERS,
        metavar="NAME",
        help="softmax: over all experts, then the top k; topk_softmax: over the chosen, with which the mixture is "
        "exactly the dense model at first (none: softmax)",
    )
    add(
        "--router_std",
        type=positive_number,
        metavar="STD",
        help="standard deviation of the router (none: model.initial_std)",
    )
    add("--step", type=natural, metavar="STEP", help="of a run's checkpoint (none: the newest)")
    return parser
