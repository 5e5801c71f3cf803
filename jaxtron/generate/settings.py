"""How one request's tokens are chosen and when they end, by the names that the field has for it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from jaxtron.config import UserError

# below it the best token's probability is 1 in float32, and a division by it may overflow
LEAST_TEMPERATURE = 1e-5
# what a row of a batch has room for
MOST_ENDS, MOST_BIASES = 32, 300
MOST_STOPS, LONGEST_STOP = 64, 1024
MOST_LOGPROBS = 20
SEEDS = 2**64


@dataclass(frozen=True)
class SamplingSettings:
    """The settings of one request; without any, tokens are drawn from the model's own distribution.

    A `UserError` names the setting first, its value, and what it may be. Rules apply in the order of the fields from
    `logit_bias` to `typical_p` (Hugging Face's), and those from `temperature` on only where tokens are drawn.
    """

    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    """Added to the logits of these tokens; at most 300 of them, from -100 to 100."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or output are divided by it where they are above 0, else multiplied; 1 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for every time that the output has it."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the output has."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens comes twice, the prompt included; 0 is off."""
    min_new_tokens: int = 0
    """Before so many tokens nothing ends the text but a lack of room."""
    temperature: float = 1.0
    """Logits are divided by it; 0, or less than 0.00001, always takes the best token."""
    top_k: int = 0
    """Only the so many best tokens, and those as good as the last of them; 0 is off."""
    top_p: float = 1.0
    """Only the best tokens whose probabilities together reach it; 1 is off."""
    min_p: float = 0.0
    """Only tokens with at least this part of the best one's probability; 0 is off."""
    typical_p: float = 1.0
    """Only the tokens nearest to the expected information whose probabilities together reach it; 1 is off."""
    seed: int | None = None
    """Of the draws: equal seeds draw alike. None: another one each time (`seeded`)."""
    max_new_tokens: int | None = None
    """So many tokens at most, the one that ends the text among them. None: as many as there is room for."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens of the model that end its text."""
    ignore_eos: bool = False
    """Whether the text goes on after those."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end the text."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    logprobs: int | None = None
    """Of how many of the best tokens log-probabilities are wanted beside the chosen one's. None: not even that."""

    def __post_init__(self) -> None:
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        for name in ("frequency_penalty", "presence_penalty"):
            _number(name, getattr(self, name), -2.0, 2.0)
        _number("temperature", self.temperature, 0.0, 100.0)
        for name in ("top_p", "min_p"):
            _number(name, getattr(self, name), 0.0, 1.0)
        _number("typical_p", self.typical_p, LEAST_TEMPERATURE, 1.0)
        for name in ("top_k", "no_repeat_ngram_size", "min_new_tokens"):
            _whole(name, getattr(self, name), 0, 2**31 - 1)
        if self.max_new_tokens is not None:
            _whole("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
            if self.min_new_tokens > self.max_new_tokens:
                raise UserError(
                    f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}; "
                    "change one of them"
                )
        if self.seed is not None:
            _whole("seed", self.seed, -(SEEDS // 2), SEEDS - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos {self.ignore_eos!r} must be true or false")
        self._check_lists()

    def _check_lists(self) -> None:
        for name in ("eos_token_ids", "stop_token_ids"):
            for token in getattr(self, name):
                _whole(name, token, 0, 2**31 - 1)
        if len(set(self.ends)) > MOST_ENDS:
            raise UserError(f"stop_token_ids has {len(set(self.ends))} ids with the model's own: at most {MOST_ENDS}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop {_listed(self.stop)} must be texts that are not empty")
        if len(self.stop) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in self.stop):
            raise UserError(f"stop must be at most {MOST_STOPS} texts of at most {LONGEST_STOP:,} characters")
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MOST_BIASES:
            raise UserError(f"logit_bias must be numbers by token id, at most {MOST_BIASES} of them")
        for token, bias in self.logit_bias.items():
            _whole("logit_bias", token, 0, 2**31 - 1)
            _number("logit_bias", bias, -100.0, 100.0)

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, and not the best one is taken."""
        return self.temperature >= LEAST_TEMPERATURE

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end the text."""
        return (*self.stop_token_ids, *(() if self.ignore_eos else self.eos_token_ids))

    def seeded(self, fresh: int, number: int = 0) -> "SamplingSettings":
        """With the seed of the answer of this number to one prompt; from `fresh` where none was given."""
        seed = fresh if self.seed is None else self.seed
        return replace(self, seed=(seed + number) % SEEDS)

    def check_vocab(self, vocab: int) -> None:
        """A `UserError` for an id that the model does not have."""
        for name in ("stop_token_ids", "logit_bias"):
            for token in getattr(self, name):
                if token >= vocab:
                    raise UserError(f"{name} has token {token}, and the model has {vocab:,}: give one below that")


def read_settings(given: Mapping[str, Any]) -> SamplingSettings:
    """Settings of values whose types nobody has looked at, such as those of JSON; a `UserError` for any wrong one."""
    made = object.__new__(SamplingSettings)
    for name, value in {**vars(SamplingSettings()), **given}.items():
        object.__setattr__(made, name, value)
    made.__post_init__()
    return made


def _listed(stop: Any) -> str:
    return repr(stop if isinstance(stop, str) else list(stop))


def _number(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} {value!r} must be a number from {least:g} to {most:g}")
    if not least <= value <= most:
        raise UserError(f"{name} {value:g} must be from {least:g} to {most:g}")


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} {value!r} must be a whole number")
    if not least <= value <= most:
        wanted = f"from {least:,} to {most:,}" if most < 2**31 - 1 or value > most else f"{least:,} or more"
        raise UserError(f"{name} {value} must be {wanted}")
