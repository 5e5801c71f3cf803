"""Text of a model: printed as it comes, or written to a file with its tokens."""

import contextlib
import json
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Integer

from jaxtron.command import write_whole
from jaxtron.config import UserError
from jaxtron.generate.batch import Batch, GrowingSequence, Grown
from jaxtron.generate.opening import SpeakingModel, open_model
from jaxtron.generate.request import GenerateRequest
from jaxtron.generate.settings import SamplingSettings, read_settings
from jaxtron.generate.source import ModelConfiguration, ModelSource, check_continues
from jaxtron.runtime.memory_errors import out_of_memory_as_user_error
from jaxtron.runtime.start import start_runtime
from jaxtron.runtime.together import leaving_together
from jaxtron.words import NO_TEXT, is_whole_text, plural

ROOM = "Lower --rows or --room, or raise --mesh.tensor"
MOST_ROWS = 8
# all but line feed and tab
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class WantedText:
    """What a text is to go on from: plain text, or a conversation; with settings of its own."""

    shown: str
    messages: tuple[Mapping[str, Any], ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class MadeText:
    """A text that was made, and of what."""

    wanted: WantedText
    prompt: Integer[np.ndarray, "P"]
    settings: SamplingSettings
    tokens: list[Grown] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Without the prompt."""
        return "".join(grown.text for grown in self.tokens)

    def json(self) -> dict[str, Any]:
        """All of it by name."""
        found: dict[str, Any] = {
            "prompt": list(map(dict, self.wanted.messages)) or self.wanted.shown,
            "text": self.text,
            "finish_reason": self.tokens[-1].finish_reason,
            "seed": self.settings.seed,
            "prompt_tokens": self.prompt.tolist(),
            "tokens": [grown.token for grown in self.tokens],
        }
        if self.settings.logprobs is not None:
            found["logprobs"] = [grown.logprob for grown in self.tokens]
            found["top_logprobs"] = [[list(pair) for pair in grown.top] for grown in self.tokens]
        return found


def write(request: GenerateRequest, configuration: ModelConfiguration) -> None:
    """Prints the texts that are asked for, and writes them where asked to."""
    wanted = [] if request.is_conversation else list(read_wanted(request))
    if request.is_conversation or any(one.messages for one in wanted):
        check_continues(request.source, configuration, "a conversation")
    start_runtime(configuration.config.runtime, devices=configuration.config.devices)
    told = configuration.told_defaults()
    if told is not None and jax.process_index() == 0:
        print(told, file=sys.stderr)
    rows = min(len(wanted) * request.samples, MOST_ROWS) or 1
    with (
        leaving_together(),
        out_of_memory_as_user_error(ROOM),
        open_model(request.source, configuration, rows=rows) as model,
        finite_logits(request.source),
    ):
        if request.is_conversation:
            return talk(model, request)
        made = make_all(model, request, wanted)
        if request.json is not None and jax.process_index() == 0:
            content = {"model": str(request.source.directory), "texts": [one.json() for one in made]}
            write_whole(request.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def mend_of_diverged(source: ModelSource) -> str:
    """What to do about a model whose numbers are of no use."""
    if source.is_hub:
        return "with --train.precision fp32 it may be of use"
    return "take an earlier checkpoint with --step"


@contextlib.contextmanager
def finite_logits(source: ModelSource) -> Iterator[None]:
    """Turns an engine's complaint about its model's numbers into a line for the user."""
    try:
        yield
    except FloatingPointError as error:
        raise UserError(f"the model in {source.directory} has diverged: {error}; {mend_of_diverged(source)}") from None


def read_wanted(request: GenerateRequest) -> Iterator[WantedText]:
    """What the line and its file ask for; a `UserError` names a line of the file that cannot be."""
    system = () if request.system is None else ({"role": "system", "content": request.system},)
    for prompt in request.prompt:
        yield WantedText(prompt, (*system, {"role": "user", "content": prompt}) if request.chat else ())
    if request.prompts is not None:
        yield from _read_file(request.prompts, request)


def _read_file(path: Path, request: GenerateRequest) -> Iterator[WantedText]:
    try:
        # a line may have other separators in its texts
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts {path}: {getattr(error, 'strerror', None) or error}") from None
    found = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = True
        yield _read_line(line, f"--prompts {path} line {number}", request)
    if not found:
        raise UserError(f"--prompts {path} has no prompts; give JSON lines")


def _read_line(line: str, where: str, request: GenerateRequest) -> WantedText:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise UserError(f'{where} must be an object with "prompt" or "messages"')
    if not is_whole_text(json.dumps(entry, ensure_ascii=False)):
        raise UserError(f"{where} {NO_TEXT}")
    sampling = {name: value for name, value in entry.items() if name not in ("prompt", "messages")}
    for name, value in sampling.items():
        if name not in SamplingSettings.__dataclass_fields__:
            raise UserError(f"{where} has {name!r}, which is no setting; leave it out")
        if isinstance(value, list):
            sampling[name] = tuple(value)
    if "logit_bias" in sampling:
        raise UserError(f"{where} has logit_bias: give --logit_bias for all prompts")
    try:
        read_settings({**request.sampling, **sampling})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str):
            raise UserError(f"{where}: prompt must be a text")
        return WantedText(entry["prompt"], sampling=sampling)
    messages = entry["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: messages must be a list of objects with role and content")
    last = messages[-1].get("content") if messages else ""
    return WantedText(str(last), tuple(messages), sampling)


def make_all(model: SpeakingModel, request: GenerateRequest, wanted: list[WantedText]) -> list[MadeText]:
    """The texts of all that is wanted, printed in their order: a single one as it comes."""
    batch, made, begun = Batch(model.engine), [], time.monotonic()
    is_told = jax.process_index() == 0
    single = len(wanted) * request.samples == 1
    for one in wanted:
        for number in range(request.samples):
            text, sequence = _begin(model, request, one, number)
            if single and is_told:
                _print_part(_before(model, one))
                sequence.grow = _both(sequence.grow, lambda grown: _print_part(grown.text))
            batch.add(sequence)
            made.append(text)
    told = 0
    while batch.is_busy:
        batch.step()
        while is_told and not single and told < len(made) and _is_done(made[told]):
            _print_one(_before(model, made[told].wanted), made[told], told + 1, len(made))
            told += 1
    if is_told:
        print(flush=True)
        count = sum(len(text.tokens) for text in made)
        seconds = time.monotonic() - begun
        print(f"{plural(count, 'token')} in {seconds:.1f} s, compiling included", file=sys.stderr)
    return made


def _begin(
    model: SpeakingModel, request: GenerateRequest, wanted: WantedText, number: int
) -> tuple[MadeText, GrowingSequence]:
    settings = model.settings(**{**request.sampling, **wanted.sampling})
    if wanted.messages:
        chat = model.chat
        prompt, settings = chat.encode(wanted.messages), chat.ending(settings)
    else:
        prompt = model.encode(wanted.shown)
    model.check_prompt(prompt, None)
    settings = settings.seeded(_fresh_seed(), number)
    made = MadeText(wanted, prompt, settings)
    stream = model.stream(prompt, settings, goes_on=not wanted.messages)
    return made, GrowingSequence(prompt, settings, stream, made.tokens.append)


def _fresh_seed() -> int:
    # processes of one run have to draw alike
    return 0 if jax.process_count() > 1 else secrets.randbits(32)


def _both(first: Any, second: Any) -> Any:
    def call(grown: Grown) -> None:
        first(grown)
        second(grown)

    return call


def _is_done(text: MadeText) -> bool:
    return bool(text.tokens) and text.tokens[-1].finish_reason is not None


def _before(model: SpeakingModel, wanted: WantedText) -> str:
    """What is shown before a text that was made: what it goes on from."""
    return "" if wanted.messages or model.answers else wanted.shown


def _print_one(before: str, text: MadeText, number: int, count: int) -> None:
    print(f"--- {number} of {count}")
    _print_part(f"{before}{text.text}\n")


def _print_part(text: str) -> None:
    """Some text; to a terminal without what could steer it, such as escape."""
    print(CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text) if sys.stdout.isatty() else text, end="", flush=True)


def talk(model: SpeakingModel, request: GenerateRequest) -> None:
    """A conversation at the terminal, until the input ends."""
    if jax.process_count() > 1:
        raise UserError("a talk at the terminal is for one process; give --prompt")
    chat = model.chat
    messages: list[dict[str, Any]] = []
    if request.system is not None:
        messages.append({"role": "system", "content": request.system})
    print("Ctrl-D ends the conversation", file=sys.stderr)
    while True:
        try:
            said = input("> ")
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            print("not said: the terminal's words are no UTF-8", file=sys.stderr)
            continue
        if not said.strip():
            continue
        turn = [*messages, {"role": "user", "content": said}]
        try:
            prompt = chat.encode(turn)
            model.check_prompt(prompt, None)
        except UserError as error:
            print(f"not said: {error}", file=sys.stderr)
            continue
        settings = chat.ending(model.settings(**request.sampling)).seeded(_fresh_seed(), len(turn))
        answer: list[Grown] = []

        def grow(grown: Grown, answer: list[Grown] = answer) -> None:
            answer.append(grown)
            _print_part(grown.text)

        batch = Batch(model.engine)
        batch.add(GrowingSequence(prompt, settings, model.stream(prompt, settings, goes_on=False), grow))
        while batch.is_busy:
            batch.step()
        print()
        messages = [*turn, {"role": "assistant", "content": "".join(grown.text for grown in answer)}]
