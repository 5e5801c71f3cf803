"""The figures of a text under a trained model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtron.command import write_whole
from jaxtron.config import UserError
from jaxtron.data.tokenizers import Tokenizer
from jaxtron.evaluate.detokenize import DETOKENIZERS
from jaxtron.evaluate.model import EvaluatedModel, open_model
from jaxtron.evaluate.perplexity import MOST_NATS, OverlappingWindows, Score, num_words, unknown_characters
from jaxtron.evaluate.request import EvaluateRequest
from jaxtron.run.configuration import Configuration
from jaxtron.runtime.memory_errors import out_of_memory_as_user_error
from jaxtron.runtime.start import start_runtime
from jaxtron.runtime.together import leaving_together
from jaxtron.words import plural

ROOM = "Lower --batch, or raise --mesh.fsdp or --mesh.tensor"


@dataclass(frozen=True)
class Report:
    """The figures of a text, and what they were made with."""

    request: EvaluateRequest
    step: int | None
    num_devices: int
    sequence_length: int
    stride: int
    score: Score
    unknown: dict[str, int]

    def json(self) -> dict[str, Any]:
        """All figures by name; nats, bits and counts."""
        score = self.score
        return {
            "run": str(self.request.run),
            "step": self.step,
            "text": [str(path) for path in self.request.text],
            "detokenize": self.request.detokenize,
            "sequence_length": self.sequence_length,
            "stride": self.stride,
            "devices": self.num_devices,
            "tokens": score.tokens,
            "words": score.words,
            "text_bytes": score.text_bytes,
            "unknown_characters": sum(self.unknown.values()),
            "nll": score.nll,
            "nll_per_token": score.nll_per_token,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "token_ratio": score.token_ratio,
            "word_perplexity": score.word_perplexity,
        }

    def text(self) -> str:
        """The figures for a reader."""
        score = self.score
        context = f"{self.sequence_length} tokens"
        if self.stride < self.sequence_length:
            context += f", the last {self.stride} of each scored"
        rows = [
            ("checkpoint", f"{'the weights' if self.step is None else f'step {self.step}'} of {self.request.run}"),
            ("windows", context),
            ("tokens", f"{score.tokens:,}"),
            ("words", f"{score.words:,}"),
            ("loss", f"{score.nll_per_token:.4f} nats a token"),
            ("perplexity", f"{'over ' if score.nll_per_token > MOST_NATS else ''}{score.perplexity:,.3f} a token"),
            ("bits per byte", f"{score.bits_per_byte:.4f}"),
        ]
        if score.token_ratio is not None and score.word_perplexity is not None:
            over = "over " if score.nll_per_token * score.token_ratio > MOST_NATS else ""
            words = f"{over}{score.word_perplexity:,.3f} ({score.token_ratio:.4f} tokens a word)"
            rows.append(("word perplexity", words))
        if self.unknown:
            letter = max(self.unknown, key=lambda letter: self.unknown[letter])
            total = f"{sum(self.unknown.values()):,} characters such as {letter!r} (U+{ord(letter):04X})"
            rows.append(("not counted right", f"{total} are unknown to the tokenizer"))
        return "\n".join(f"{what:<19}{value}" for what, value in rows)


def score(request: EvaluateRequest, trained: Configuration, config: Configuration, raw: str, stride: int) -> None:
    """Prints the figures of the text, and writes them where asked to."""
    start_runtime(config.runtime, devices=config.devices)
    with leaving_together(), out_of_memory_as_user_error(ROOM), open_model(request, trained, config) as model:
        report = evaluate(model, request, raw, stride)
    if jax.process_index() == 0:
        print(report.text())
        if request.json is not None:
            write_whole(request.json, json.dumps(report.json(), indent=1) + "\n")
            print(f"{'written':<19}{request.json}")


def evaluate(model: EvaluatedModel, request: EvaluateRequest, raw: str, stride: int) -> Report:
    """The figures of a text as it was read; a `UserError` unless it has two tokens, all known to the tokenizer."""
    assert model.tokenizer is not None
    text = DETOKENIZERS[request.detokenize](raw)
    tokens = encode(model.tokenizer, text, request.text)
    if len(tokens) < 2:
        raise UserError(
            f"{_names(request.text)} has {plural(len(tokens), 'token')}, and the first is not scored: give at least two"
        )
    windows = OverlappingWindows(tokens, sequence_length=model.sequence_length, stride=stride)
    score = Score(nll=model.nll(windows), tokens=len(tokens), words=num_words(raw), text_bytes=len(raw.encode("utf-8")))
    return Report(
        request=request,
        step=model.step,
        num_devices=model.num_devices,
        sequence_length=model.sequence_length,
        stride=stride,
        score=score,
        unknown=unknown_characters(text, model.tokenizer),
    )


def encode(tokenizer: Tokenizer, text: str, paths: tuple[Path, ...]) -> np.ndarray:
    """Ids of the text; a tokenizer's `UserError` names the files."""
    try:
        return tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"{_names(paths)}: {error}") from None


def _names(paths: tuple[Path, ...]) -> str:
    return " ".join(map(str, paths))
