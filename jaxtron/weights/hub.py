"""A directory of others' weights: which family it is of, and the settings of its model."""

from pathlib import Path

from jaxtron.config import SettingsSource, UserError
from jaxtron.weights.config_json import CONFIG_JSON, ConfigFile, as_json, read_config_json
from jaxtron.weights.family import HubFamily
from jaxtron.weights.gpt2 import GPT2
from jaxtron.weights.llama import LLAMA, MISTRAL, NEMOTRON, QWEN2, QWEN3
from jaxtron.weights.megatron.arguments import megatron_settings
from jaxtron.weights.megatron.directory import is_megatron

# by `model_type`
FAMILIES: dict[str, HubFamily] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "nemotron": NEMOTRON,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}
TOKENIZER = "tokenizer.json"


def is_hub(directory: Path) -> bool:
    """Whether a directory looks like one of others' weights, Hugging Face's or Megatron-LM's, and not like a run's."""
    is_of_hub = (directory / CONFIG_JSON).is_file() and not (directory / "config.yaml").is_file()
    return is_of_hub or is_megatron(directory)


def family_of_hub(directory: Path) -> HubFamily:
    """The family of a directory's model."""
    return _family(read_config_json(directory))


def hub_settings(directory: Path) -> SettingsSource:
    """The settings that a directory's files say: the model's, and the tokenizer where it has one that is known.

    Without JAX, and without a look at weights. `UserError` for what is not understood and may change what is computed.
    """
    found = megatron_settings(directory) if is_megatron(directory) else _of_config_json(directory)
    path = directory / TOKENIZER
    if path.is_file():
        found.set("data.tokenizer", str(path.absolute()), str(path))
    return found


def _of_config_json(directory: Path) -> SettingsSource:
    file = read_config_json(directory)
    _family(file).read(file)
    return file.settings


def _family(file: ConfigFile) -> HubFamily:
    name = file.model_type
    if not isinstance(name, str) or name not in FAMILIES:
        what = f"has model_type {as_json(name)}" if file.has("model_type") else "has no model_type"
        raise UserError(f"{file.path} {what}: known here are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
