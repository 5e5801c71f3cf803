"""A model's `config.json`, read strictly: a key that nobody understands may change what the model computes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from jaxtron.config import SettingsSource, UserError
from jaxtron.config.json_text import each_once

CONFIG_JSON = "config.json"
# keys that change nothing of what a decoder computes of a text: names, tokens, training and generation of before
WITHOUT_EFFECT = frozenset(
    "_attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout "
    "attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward "
    "cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping "
    "encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id "
    "forced_eos_token_id id2label is_decoder is_llama_config label2id length_penalty max_length "
    "max_position_embeddings min_length model_type no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp "
    "problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id "
    "suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p "
    "torch_dtype torchscript transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version "
    "use_bfloat16 use_cache".split()
)
# keys that any family's file can have, with the only value that is understood
ALWAYS: dict[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
    "rope_interleaved": False,
}
LONGEST = 60


class ConfigFile:
    """The keys of a `config.json`, and the settings that are found to say the same, each with its key as its origin."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = SettingsSource()
        self._values = values
        self._read: set[str] = set()

    @property
    def model_type(self) -> Any:
        """The key that names the family."""
        return self._values.get("model_type")

    def has(self, key: str) -> bool:
        """Whether the file has the key, be it null."""
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, which is understood from now on; the family's own where the file does not have it."""
        self._read.add(key)
        return self._values.get(key, default)

    def whole(self, key: str, default: int, most: int = 2**31 - 1) -> int:
        """The value of a key that is a whole number."""
        value = self.get(key, default)
        if type(value) is not int or not 0 <= value <= most:
            self.refuse(key, f"it must be a whole number up to {most:,}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The value of a key that is true or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            self.refuse(key, "it must be true or false")
        return value

    def number(self, key: str, default: float) -> float:
        """The value of a key that is a number of 0 or more."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            self.refuse(key, "it must be a number of 0 or more")
        return value

    def set(self, setting: str, value: Any, key: str) -> None:
        """The setting of this name, without `model.`, is this value: so says the key."""
        self.settings.set(f"model.{setting}", value, f"{self.path} {key}")

    def refuse(self, key: str, why: str, inner: str = "") -> NoReturn:
        """`UserError` for the value of a key, or of one in it."""
        value = self._values.get(key)
        if inner and isinstance(value, dict):
            key, value = f"{key}.{inner}", value.get(inner)
        raise UserError(f"{self.path} has {key} {as_json(value)}: {why}")

    def check_only(self, values: Mapping[str, Any]) -> None:
        """`UserError` where a key has another value than this one."""
        for key, only in values.items():
            if self.get(key, only) not in (only, None):
                self.refuse(key, "it is not known here" if only is None else f"only {as_json(only)} is known here")

    def check_all_read(self, known: Mapping[str, Any]) -> None:
        """`UserError` for a key that nobody asked for; `known` are those with another only value than usual."""
        self.check_only({**ALWAYS, **known})
        unknown = sorted(self._values.keys() - self._read - WITHOUT_EFFECT)
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            self.refuse(
                unknown[0],
                f"that key of a {self.model_type} is not known here{more}, and it may change what the model computes; "
                "if it does not, remove it from a copy of the file",
            )


def read_config_json(directory: Path) -> ConfigFile:
    """The file in a directory of weights; `UserError` where there is none or it is no JSON object."""
    path = directory / CONFIG_JSON
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_once)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error).splitlines()[0]}; bring back the model's own") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must be an object of keys, not {as_json(values)}; bring back the model's own")
    return ConfigFile(path, values)


def as_json(value: Any) -> str:
    """A value as the file has it, a long one by its beginning."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
