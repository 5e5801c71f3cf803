"""A directory of others' weights: which family it is of, and the settings of its model; a model's config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jaxtron.config import SettingsSource, UserError, format_value
from jaxtron.data.config import DataConfig
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.families import family_named
from jaxtron.models.family import FamilyConfig
from jaxtron.models.same import differences
from jaxtron.weights.config_json import CONFIG_JSON, WITHOUT_EFFECT, ConfigFile, as_json, read_config_json
from jaxtron.weights.families.bert import BERT, MEGATRON_BERT
from jaxtron.weights.families.bloom import BLOOM
from jaxtron.weights.families.cohere import COHERE
from jaxtron.weights.families.experts.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from jaxtron.weights.families.experts.gpt_oss import GPT_OSS
from jaxtron.weights.families.experts.mixtral import MIXTRAL
from jaxtron.weights.families.experts.qwen_moe import QWEN2_MOE, QWEN3_MOE
from jaxtron.weights.families.falcon import FALCON
from jaxtron.weights.families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxtron.weights.families.gpt2 import GPT2
from jaxtron.weights.families.gpt_neox import GPT_NEOX, GPTJ
from jaxtron.weights.families.granite import GRANITE
from jaxtron.weights.families.llama import LLAMA, MISTRAL, NEMOTRON, QWEN2, QWEN3
from jaxtron.weights.families.olmo2 import OLMO2
from jaxtron.weights.families.opt import OPT
from jaxtron.weights.families.phi import PHI, PHI3
from jaxtron.weights.families.starcoder2 import STARCODER2
from jaxtron.weights.families.state_space.bamba import BAMBA
from jaxtron.weights.families.state_space.jamba import JAMBA
from jaxtron.weights.families.state_space.mamba import MAMBA, MAMBA2
from jaxtron.weights.families.state_space.nemotron_h import NEMOTRON_H
from jaxtron.weights.families.t5 import T5
from jaxtron.weights.family import HubFamily
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
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "granite": GRANITE,
    "olmo2": OLMO2,
    "phi": PHI,
    "phi3": PHI3,
    "starcoder2": STARCODER2,
    "bloom": BLOOM,
    "cohere": COHERE,
    "falcon": FALCON,
    "gpt_neox": GPT_NEOX,
    "gptj": GPTJ,
    "opt": OPT,
    "mixtral": MIXTRAL,
    "gpt_oss": GPT_OSS,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "mamba": MAMBA,
    "mamba2": MAMBA2,
    "nemotron_h": NEMOTRON_H,
    "bamba": BAMBA,
    "jamba": JAMBA,
    "bert": BERT,
    "megatron-bert": MEGATRON_BERT,
    "t5": T5,
}
TOKENIZER = "tokenizer.json"
# files of tokenizers that are read, the first that is there
TOKENIZERS = (TOKENIZER, "tokenizer.model")


def is_hub(directory: Path) -> bool:
    """Whether a directory looks like one of others' weights, Hugging Face's or Megatron-LM's, and not like a run's."""
    is_of_hub = (directory / CONFIG_JSON).is_file() and not (directory / "config.yaml").is_file()
    return is_of_hub or is_megatron(directory)


def tokenizer_of(directory: Path) -> Path | None:
    """The file of a directory that its text is tokenized by, if it is of a kind that is read."""
    return next((directory / name for name in TOKENIZERS if (directory / name).is_file()), None)


def family_of_hub(directory: Path) -> HubFamily:
    """The family of a directory's model."""
    return _family(read_config_json(directory))


def hub_settings(directory: Path) -> SettingsSource:
    """The settings that a directory's files say: the model's, and the tokenizer where it has one that is known.

    Without JAX, and without a look at weights. `UserError` for what is not understood and may change what is computed.
    """
    found = megatron_settings(directory) if is_megatron(directory) else _of_config_json(directory)
    longest, usual = found.get("model.max_positions"), DataConfig().sequence_length
    if isinstance(longest, int) and longest < usual:
        found.set("data.sequence_length", longest, found.origins["model.max_positions"])
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


# keys without effect that are said anew, or of whoever wrote the file
SAID_ANEW = frozenset(
    "_name_or_path architectures dtype model_type max_position_embeddings torch_dtype transformers_version".split()
)


@dataclass(frozen=True)
class SaidModel:
    """A model as the `config.json` of a family says it."""

    family: HubFamily
    values: Mapping[str, Any]


def config_of(model: FamilyConfig, *, began: Mapping[str, Any], positions: int, name: str | None = None) -> SaidModel:
    """What a `config.json` says of a resolved model: of the family `name`, else of the first that says all of it.

    `began` is the file that its run began with, or empty: its family comes first, and its keys that change nothing
    computed, such as tokens' numbers, are kept. `positions` is the longest sequence where that says none. Each is read
    again and must give the same settings: `UserError` with the first that no family can say.
    """
    own = began.get("model_type")
    first = [own] if isinstance(own, str) and own in FAMILIES else []
    alike = [each for each, family in FAMILIES.items() if family.family == model.family]
    if name is not None and name not in alike:
        raise UserError(
            f"{FAMILIES[name].architecture} of Hugging Face is no class of model.family {model.family}; "
            f"{'leave --family out' if alike else 'none that is known here is'}"
        )
    if not alike:
        raise UserError(f"model.family {model.family} is none of Hugging Face's that are known here")
    names = [name] if name is not None else list(dict.fromkeys([*(each for each in first if each in alike), *alike]))
    kept = {key: value for key, value in began.items() if key in WITHOUT_EFFECT - SAID_ANEW}
    lacking: dict[str, list[str]] = {}
    for found in names:
        values = {"model_type": found} | FAMILIES[found].write(model)
        if (key := FAMILIES[found].positions) is not None:
            values[key] = began.get(key, positions)
        values = kept | values
        lacking[found] = _unsaid(values, model)
        if not lacking[found]:
            return SaidModel(FAMILIES[found], values)
    # the own one, or the nearest
    found = names[0] if first and name is None else min(lacking, key=lambda each: len(lacking[each]))
    missing = lacking[found]
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    others = "" if name is not None else ", and no other class that is known here says all of it"
    setting, _, only = missing[0].partition(" (only ")
    mend = f"; a run that is trained with --{setting.split()[0]} {only[:-1]} is written" if only else ""
    raise UserError(f"{FAMILIES[found].architecture} of Hugging Face cannot say {missing[0]}{more}{others}{mend}")


def _unsaid(values: Mapping[str, Any], model: FamilyConfig) -> list[str]:
    """Settings of a model that a `config.json` says otherwise."""
    # as the file will have it
    file = ConfigFile(Path(CONFIG_JSON), json.loads(json.dumps(values)))
    try:
        _family(file).read(file)
        settings = family_named(model.family).config
        read = settings.model_validate_json(json.dumps(file.settings.tree["model"]), strict=True)
    except ValidationError as error:
        return [str(error.errors()[0]["msg"])]
    except UserError as error:
        return [str(error)]
    same: dict[str, bool] = {}
    if isinstance(read, ModelConfig) and isinstance(model, ModelConfig):
        # whether layers are a loop over periods or over kinds is no matter of theirs, nor how fast a bias learns
        equal = read.layout.layers == model.layout.layers
        same = {"pattern": equal, "num_layers": equal, "hybrid": equal, "moe.leading_dense": equal}
        same["moe.bias_rate"] = bool(read.moe.bias_rate) == bool(model.moe.bias_rate)
    return [
        f"model.{one.name} {format_value(one.here)} (only {format_value(one.there)})"
        for one in differences(read, model, same=same)
    ]
