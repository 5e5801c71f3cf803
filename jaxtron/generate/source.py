"""The model that text is made with, a run's or that of Hugging Face weights: its configuration and its own defaults."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtron.command import FlagParser, file_path, natural, positive
from jaxtron.config import UserError, load, settings, split_arguments
from jaxtron.data.config import ChatConfig, DataConfig
from jaxtron.generate.origin import began_keys, began_with, has_tokenizer
from jaxtron.generate.settings import SamplingSettings, read_settings
from jaxtron.models.families import DECODER, FAMILIES, family_named
from jaxtron.run.configuration import Configuration, configuration_of, configuration_type
from jaxtron.weights.cache import named_weights
from jaxtron.weights.config_json import CONFIG_JSON, ConfigFile, read_config_json
from jaxtron.weights.hub import TOKENIZER, hub_settings, is_hub
from jaxtron.weights.megatron.directory import is_megatron
from jaxtron.words import either

# how a model lies on devices; what of it can be set where text is made
LAYOUT = ("mesh", "context", "pipeline", "sharding", "runtime")
SECTIONS = ("mesh", "sharding", "runtime")
SETTINGS = ("devices", "train.precision", "data.tokenizer", "data.end_of_document", "model.attention.implementation")
# of a model that says it reads very long texts, which memory may not hold
MOST_ROOM = 4096
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATES = ("chat_template.jinja", TOKENIZER_CONFIG)
# keys that say what a decoder begins with after an encoder, the first that there is
BEGINS = ("decoder_start_token_id", "pad_token_id")
# keys of generation_config.json that are settings here, by the same names
DEFAULTS = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("max_new_tokens", "min_new_tokens"),
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, and how it is laid out; `overrides` are settings as words of a command line.

    `rows` are the sequences that are made at a time, `room` the tokens that each has room for, prompt and answer (none:
    what the model was trained for), `step` the checkpoint's of a run (none: the newest).
    """

    directory: Path
    overrides: tuple[str, ...] = ()
    rows: int | None = None
    room: int | None = None
    step: int | None = None
    chat_template: Path | None = None

    @property
    def is_hub(self) -> bool:
        """Whether it has Hugging Face weights."""
        return is_hub(self.directory)


@dataclass(frozen=True)
class ModelConfiguration:
    """What holds of a model here: its resolved settings, room for a sequence, and what its files say of its text."""

    trained: Configuration | None
    """Of a run: what it was trained with."""
    config: Configuration
    room: int
    chat: ChatConfig | None
    """How conversations are written, where that is known."""
    defaults: dict[str, Any]
    """Settings that the model's own generation_config.json asks for."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end its text, beside the tokenizer's end of document."""
    is_begun: bool = False
    """Whether plain text begins with what the tokenizer's file puts before it, as the model has seen it."""
    begin: int | None = None
    """What an answer begins with by the model's own files, where it is a sequence of its own and they say so."""

    def settings(self, **given: Any) -> SamplingSettings:
        """Those of a request over the model's own."""
        return read_settings(self.defaults | given)

    def told_defaults(self) -> str | None:
        """A line that says what the model's own file changes."""
        if not self.defaults:
            return None
        listed = ", ".join(f"{name} {value:g}" for name, value in self.defaults.items())
        return f"defaults of the model's {GENERATION_CONFIG}: {listed}"


def add_model_flags(parser: FlagParser) -> None:
    """The flags of a `ModelSource`."""
    add = parser.add_argument
    add("--rows", type=positive, metavar="B", help="sequences that are made at a time (none: those asked for, up to 8)")
    add("--room", type=positive, metavar="T", help="tokens of prompt and answer together (none: the model's length)")
    add("--step", type=natural, metavar="STEP", help="of a run's checkpoint (none: the newest)")
    add(
        "--chat_template",
        type=file_path,
        metavar="FILE",
        help="a Jinja template, or a tokenizer_config.json that has one (none: the model's own)",
    )


def taken(sections: Sequence[str] = SECTIONS, names: Sequence[str] = SETTINGS) -> str:
    """The settings of training that such a command takes, for its help."""
    return ", ".join([*(f"--{section}.*" for section in sections), *(f"--{name}" for name in names)])


def check_taken(
    flags: Sequence[tuple[str, Any]], sections: Sequence[str] = SECTIONS, names: Sequence[str] = SETTINGS
) -> None:
    """`UserError` for a setting of a line that is not one of these: the trained model has it."""
    known = settings(Configuration)
    for name, _ in flags:
        if name in known and name not in names and name.partition(".")[0] not in sections:
            raise UserError(f"--{name} is the model's own: leave it out, only {taken(sections, names)} can be set")


def split_source(rest: list[str], usage: str) -> tuple[str, Path, tuple[str, ...]]:
    """The word of a line for its model, the directory that it means, and the settings; `UserError` for other words."""
    words, flags = split_arguments(Configuration, rest)
    if not words:
        raise UserError(f"no directory of a run or of weights; give it first: {usage}")
    if len(words) > 1:
        raise UserError(f"unexpected argument {words[1]!r}: one directory, then flags")
    check_taken(flags)
    rest = list(rest)
    rest.remove(words[0])
    return words[0], named_weights(words[0]), tuple(rest)


def read_model(source: ModelSource) -> ModelConfiguration:
    """The configuration of a model; a `UserError` if there is none, or none that makes text."""
    return _of_hub(source) if source.is_hub else _of_run(source)


def read_continuing(source: ModelSource, what: str) -> ModelConfiguration:
    """The same of one that goes on with a text, which `what` is for; `UserError` for one that answers with another."""
    found = read_model(source)
    check_continues(source, found, what)
    return found


def check_continues(source: ModelSource, configuration: ModelConfiguration, what: str) -> None:
    """`UserError` for a model that answers a text with another, where `what` is for one that goes on with it."""
    config = configuration.config
    if config.family.writes == "answer":
        raise UserError(
            f"{source.directory} has model.family {config.model.family}, which answers a text with another, and {what} "
            "is for models that go on with a text: give a decoder, or python -m jaxtron.generate with --prompt TEXT"
        )


def _of_run(source: ModelSource) -> ModelConfiguration:
    path = source.directory / "config.yaml"
    if not path.is_file():
        what = f"{source.directory} has no config.yaml" if source.directory.is_dir() else f"no directory {path.parent}"
        raise UserError(
            f"{what}; give the --run.directory of a training, such as runs/gpt_tiny, or a directory of Hugging Face "
            f"weights, which has a {CONFIG_JSON}"
        )
    config_type = configuration_type([str(path)])
    trained = load(config_type, path).resolved()
    if trained.family.writes is None:
        raise UserError(
            f"{path} has model.family {trained.model.family}, which makes no text: give a run of {_writing()}"
        )
    config = load(config_type, path, source.overrides).resolved()
    room = source.room or config.data.sequence_length
    # as what `convert` makes of the run says it
    began = began_with(source.directory)
    is_its = began is not None and has_tokenizer(began, config.data.tokenizer)
    said = _said_beside(began, began_keys(began)) if began is not None and is_its else NOTHING
    chat = trained.data.chat if trained.data.format == "chat" else said.chat
    config = laid_out(config, source.overrides)
    chat = _template(source, chat)
    return ModelConfiguration(
        trained, config, room, chat, said.defaults, said.eos_token_ids, is_begun=is_its, begin=said.begin
    )


def _of_hub(source: ModelSource) -> ModelConfiguration:
    directory = source.directory
    if source.step is not None:
        raise UserError(f"--step {source.step} is of a run's checkpoints, and {directory} has weights of others")
    under = hub_settings(directory)
    family = under.tree["model"].get("family", DECODER)
    if family_named(family).writes is None:
        raise UserError(f"{directory} is of model.family {family}, which makes no text: give weights of {_writing()}")
    _, flags = split_arguments(Configuration, source.overrides)
    if "data.tokenizer" not in dict(flags) and "data" not in under.tree:
        others = [path.name for path in sorted(directory.glob("*.model"))]
        such = f"such as --data.tokenizer {directory / others[0]}" if others else "the model's own"
        raise UserError(f"{directory} has no {TOKENIZER}: give --data.tokenizer, {such}")
    try:
        config = load(configuration_of(family), None, source.overrides, under=under).resolved()
    except UserError as error:
        raise error if str(directory) in str(error) else UserError(f"{directory}: {error}") from None
    if is_megatron(directory):
        longest, said = getattr(config.model, "max_positions", None) or MOST_ROOM, _said_beside(directory, {})
    else:
        file = read_config_json(directory)
        longest = _longest(file)
        said = _said_beside(directory, {name: file.get(name) for name in (*BEGINS, "eos_token_id")})
    room = source.room or min(longest, MOST_ROOM)
    config = laid_out(config, source.overrides)
    chat = _template(source, said.chat)
    return ModelConfiguration(
        None, config, room, chat, said.defaults, said.eos_token_ids, is_begun=True, begin=said.begin
    )


@dataclass(frozen=True)
class SaidBeside:
    """What files beside weights say of the text that is made with them."""

    chat: ChatConfig | None
    defaults: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    begin: int | None = None
    """What a decoder begins with after an encoder."""


NOTHING = SaidBeside(None, {}, ())


def _said_beside(directory: Path, keys: Mapping[str, Any]) -> SaidBeside:
    """Of a directory whose config.json has these keys."""
    generation = _read_object(directory / GENERATION_CONFIG)
    ends = generation.get("eos_token_id", keys.get("eos_token_id"))
    found = next((directory / name for name in TEMPLATES if _has_template(directory / name)), None)
    chat = None if found is None else ChatConfig(template=str(found))
    # some files have -1 for none
    ids = tuple(filter(_is_token, ends if isinstance(ends, list) else [ends]))
    begins = (said[name] for name in BEGINS for said in (generation, keys) if _is_token(said.get(name)))
    return SaidBeside(chat, _defaults(generation, directory / GENERATION_CONFIG), ids, next(begins, None))


def _writing() -> str:
    """The families that make text."""
    return either([name for name in FAMILIES if family_named(name).writes is not None])


def _is_token(value: Any) -> bool:
    return type(value) is int and value >= 0


def laid_out(config: Configuration, overrides: Sequence[str]) -> Configuration:
    """A model's configuration on the layout that words of a command line ask for, by default one device.

    Nothing of the training's layout is left.
    """
    given = load(Configuration, None, overrides)
    _, flags = split_arguments(Configuration, overrides)
    mesh = given.mesh
    if "mesh.data" not in dict(flags) and given.devices is None:
        mesh = mesh.model_copy(update={"data": 1})
    data = DataConfig(
        tokenizer=config.data.tokenizer,
        end_of_document=config.data.end_of_document,
        sequence_length=config.data.sequence_length,
    )
    layout = {name: getattr(given, name) for name in LAYOUT} | {"mesh": mesh, "devices": given.devices}
    return config.model_copy(update={**layout, "data": data, "model": config.family.evaluated(config.model)})


def _template(source: ModelSource, own: ChatConfig | None) -> ChatConfig | None:
    if source.chat_template is not None:
        try:
            source.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise UserError(f"cannot read --chat_template {source.chat_template}: {why}") from None
    return own if source.chat_template is None else ChatConfig(template=str(source.chat_template))


def _longest(file: ConfigFile) -> int:
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        if file.has(key):
            return file.whole(key, MOST_ROOM)
    return MOST_ROOM


def _has_template(path: Path) -> bool:
    if path.name != TOKENIZER_CONFIG:
        return path.is_file()
    return "chat_template" in _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    """A file that is a JSON object; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; mend it, or remove it") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must be an object of keys; mend it, or remove it")
    return found


def _defaults(generation: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the file asks for; with `do_sample` false, as it is meant, the best token."""
    found = {name: generation[name] for name in DEFAULTS if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        found = {name: value for name, value in found.items() if name not in DEFAULTS[:5]} | {"temperature": 0.0}
    try:
        read_settings(found)
    except UserError as error:
        raise UserError(f"{path}: {error}; mend it, or remove it") from None
    plain = SamplingSettings()
    return {name: value for name, value in found.items() if value != getattr(plain, name)}
