"""The flags of `generate`: a model, prompts, and how their text is made."""

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtron.command import FlagParser, check_output, file_path, natural, positive
from jaxtron.config import UserError, settings
from jaxtron.generate.settings import SamplingSettings, read_settings
from jaxtron.generate.source import ModelSource, add_model_flags, split_source, taken
from jaxtron.run.configuration import Configuration
from jaxtron.words import NO_TEXT, is_whole_text

PROGRAM = "python -m jaxtron.generate"
USAGE = f"{PROGRAM} RUN_OR_WEIGHTS --prompt TEXT [--flag value ...]"
MODEL_FLAGS = ("rows", "room", "step", "chat_template")


@dataclass(frozen=True)
class GenerateRequest:
    """A model, and what it is to go on from; `sampling` are the settings that were given, by their names."""

    source: ModelSource
    prompt: tuple[str, ...] = ()
    prompts: Path | None = None
    chat: bool = False
    system: str | None = None
    samples: int = 1
    sampling: dict[str, Any] = field(default_factory=dict)
    json: Path | None = None

    @property
    def is_conversation(self) -> bool:
        """Whether a person at the terminal asks, turn by turn."""
        return self.chat and not self.prompt and self.prompts is None


def parse(argv: list[str]) -> GenerateRequest:
    """The request of a command line; a `UserError` for what is missing or cannot be."""
    found, rest = _parser().parse_known_args(argv)
    given = {name: value for name, value in vars(found).items() if value is not None and value is not False}
    prompts = given.pop("prompt", [])
    if len(prompts) > 1 and Path(prompts[-1]).is_dir() and not rest_words(rest):
        # `--prompt TEXT RUN_DIRECTORY`
        rest.append(prompts.pop())
    _, directory, overrides = split_source(rest, USAGE)
    model = {name: given.pop(name) for name in MODEL_FLAGS if name in given}
    names = [name for name in given if name in SamplingSettings.__dataclass_fields__]
    sampling = {name: given.pop(name) for name in names}
    for name in ("stop", "stop_token_ids"):
        if name in sampling:
            sampling[name] = tuple(sampling[name])
    sampling["logit_bias"] = _biases(sampling.get("logit_bias", []))
    request = GenerateRequest(
        source=ModelSource(directory, overrides, **model), prompt=tuple(prompts), sampling=sampling, **given
    )
    _check(request)
    return request


def rest_words(rest: list[str]) -> bool:
    """Whether a directory stands among what is left of a line."""
    return bool(rest) and Path(rest[0]).is_dir()


def _check(request: GenerateRequest) -> None:
    try:
        read_settings(request.sampling)
    except UserError as error:
        raise UserError(f"--{error}") from None
    stops = request.sampling.get("stop", ())
    for name, texts in (("prompt", request.prompt), ("system", (request.system or "",)), ("stop", stops)):
        if not all(map(is_whole_text, texts)):
            raise UserError(f"--{name} {NO_TEXT}")
    if not request.prompt and request.prompts is None and not request.chat:
        raise UserError(f"no prompt; give --prompt TEXT, --prompts FILE.jsonl, or --chat: {USAGE}")
    if request.source.chat_template is not None and not request.chat and request.prompts is None:
        raise UserError(f"--chat_template {request.source.chat_template} has no effect without --chat; leave it out")
    if request.system is not None and not request.chat:
        raise UserError("--system is the first message of a conversation: give --chat with it, or leave it out")
    if request.is_conversation:
        for name, value in (("--json", request.json), ("--samples", request.samples > 1 or None)):
            if value is not None:
                raise UserError(
                    f"{name} has no effect on a conversation at the terminal; leave it out or give --prompt"
                )
        if "logprobs" in request.sampling:
            raise UserError("--logprobs has no effect on a talk at the terminal; leave it out")
    elif "logprobs" in request.sampling and request.json is None:
        raise UserError("--logprobs are written with --json FILE: give it, or leave them out")
    if request.json is not None:
        check_output("--json", request.json)


def _biases(words: list[str]) -> dict[int, float]:
    found: dict[int, float] = {}
    for word in words:
        token, _, value = word.partition("=")
        try:
            number, bias = int(token), float(value)
        except ValueError:
            raise UserError(f"--logit_bias {word!r} must be ID=NUMBER, such as 50256=-100") from None
        if number in found:
            raise UserError(f"--logit_bias gives token {number} twice; keep one")
        found[number] = bias
    return found


def number(text: str) -> float:
    """A flag's finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number")
    return value


def seed(text: str) -> int:
    """A flag's whole number, perhaps below 0."""
    return -natural(text[1:]) if text.startswith("-") else natural(text)


def _parser() -> FlagParser:
    purpose = (
        "Text that a trained model makes: it goes on from prompts, or answers as the other side of a conversation. The "
        "model is a run's, or that of Hugging Face weights (config.json, safetensors, tokenizer.json)."
    )
    further = (
        f"Of training's settings it takes {taken()} (python -m jaxtron.train --help). The mesh need not be that of the "
        "training; by default it is one device. docs/generation.md tells more."
    )
    parser = FlagParser(PROGRAM, purpose, usage=USAGE, further=further, others=settings(Configuration))
    add = parser.add_argument
    add("--prompt", nargs="+", action="extend", metavar="TEXT", help="what the text goes on from; several make several")
    add("--prompts", type=file_path, metavar="FILE", help='JSON lines, each {"prompt": TEXT} or {"messages": [...]}, '
        "with settings of its own beside it if wanted")  # fmt: skip
    add("--chat", action="store_true", help="prompts are what a user says; without any, ask at the terminal")
    add("--system", metavar="TEXT", help="what a conversation begins with")
    add("--samples", type=positive, metavar="N", help="texts of each prompt (none: 1)")
    add("--json", type=file_path, metavar="FILE", help="write tokens, texts and why they ended")
    add_model_flags(parser)
    add("--temperature", type=number, metavar="X", help="0 takes the best token each time (none: 1)")
    add("--top_k", type=natural, metavar="K", help="only the K best tokens (none: all)")
    add("--top_p", type=number, metavar="P", help="only the best tokens that together have this probability (none: 1)")
    add("--min_p", type=number, metavar="P", help="only tokens with this part of the best one's probability (none: 0)")
    add("--typical_p", type=number, metavar="P", help="only the most typical tokens up to this probability (none: 1)")
    add("--repetition_penalty", type=number, metavar="X", help="divides logits of tokens that were there (none: 1)")
    add("--presence_penalty", type=number, metavar="X", help="from logits of tokens of the answer (none: 0)")
    add("--frequency_penalty", type=number, metavar="X", help="so, for each time that they were there (none: 0)")
    add("--no_repeat_ngram_size", type=natural, metavar="N", help="no N tokens in a row come twice (none: off)")
    add("--max_new_tokens", type=positive, metavar="N", help="of an answer (none: as many as there is room for)")
    add("--min_new_tokens", type=natural, metavar="N", help="before which nothing ends it (none: 0)")
    add("--stop", nargs="+", action="extend", metavar="TEXT", help="the answer ends before one of these")
    add("--stop_token_ids", nargs="+", action="extend", type=natural, metavar="ID", help="tokens that end it")
    add("--ignore_eos", action="store_true", help="go on after the model's end of text")
    add("--seed", type=seed, metavar="N", help="equal seeds draw the same text (none: another one each time)")
    add("--logit_bias", nargs="+", action="extend", metavar="ID=X", help="added to logits of these tokens")
    add("--logprobs", type=natural, metavar="N", help="with --json: log-probabilities, and of the N best tokens")
    return parser
