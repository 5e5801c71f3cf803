"""How well a model tells the last word of a text from all before it (LAMBADA, 1606.06031).

As lm-evaluation-harness counts it: the word with the space before it, all of whose tokens have to be the likeliest.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxtron.config import UserError, shown
from jaxtron.data.tokenizers import Tokenizer
from jaxtron.generate.protocol import TokenEngine
from jaxtron.words import NO_TEXT, is_whole_text


@dataclass(frozen=True)
class LastWords:
    """Figures of some texts."""

    texts: int
    right: int
    nll: float
    """Sum of the negative log-likelihoods of the words, in nats."""

    @property
    def accuracy(self) -> float:
        """Part of the words that the model tells."""
        return self.right / self.texts

    @property
    def perplexity(self) -> float:
        """Of a word."""
        return math.exp(min(self.nll / self.texts, 700.0))


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """The texts of a file of JSON lines; a `UserError` names the line that is none, or has no two words."""
    try:
        # a line may have other separators in its text
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --last_words {path}: {getattr(error, 'strerror', None) or error}") from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise UserError(f'--last_words {path} line {number} is not like {{"text": "..."}}; mend it')
        if not is_whole_text(text):
            raise UserError(f"--last_words {path} line {number} {NO_TEXT}")
        if len(text.split()) < 2:
            raise UserError(f"--last_words {path} line {number} has no two words, and no last one to tell; remove it")
        texts.append(text.rstrip())
    if not texts:
        raise UserError(f"--last_words {path} has no texts; give a file that has")
    return texts[:limit]


def score_last_words(engine: TokenEngine, tokenizer: Tokenizer, texts: Sequence[str]) -> LastWords:
    """The figures; texts longer than the model's room lose their beginnings.

    A `UserError` for a word that is longer, a `FloatingPointError` for a model whose numbers are not finite.
    """
    pairs = []
    for text in texts:
        whole, context = (tokenizer.encode(part) for part in (text, text.rsplit(None, 1)[0]))
        # one token before the word at least
        count = max(1, min(len(whole) - len(context), len(whole) - 1))
        if count > engine.room:
            raise UserError(
                f"the last word {shown(text.rsplit(None, 1)[1])} has {count:,} tokens, and the model reads "
                f"{engine.room:,}; raise --room, or remove the text"
            )
        pairs.append((whole[-engine.room - 1 :], count))
    order = sorted(range(len(pairs)), key=lambda number: -len(pairs[number][0]))
    right, nll = 0, 0.0
    for start in range(0, len(order), engine.rows):
        some = [pairs[number] for number in order[start : start + engine.rows]]
        for (tokens, count), (logprobs, best, _) in zip(some, engine.score([one for one, _ in some]), strict=True):
            nll -= float(logprobs[-count:].sum())
            right += bool(np.array_equal(best[-count:, 0], tokens[-count:]))
    if not math.isfinite(nll):
        raise FloatingPointError("its logits are not finite")
    return LastWords(len(pairs), right, nll)
