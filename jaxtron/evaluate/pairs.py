"""Answers of a model beside those that were wanted: how many are the same, and how many words are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtron.config import UserError
from jaxtron.data.chat.pairs import TextPair, read_pairs
from jaxtron.evaluate.overlap import bleu, rouge
from jaxtron.generate.batch import Batch, GrowingSequence, Grown
from jaxtron.generate.opening import SpeakingModel


@dataclass(frozen=True)
class AnswerScores:
    """Figures of the answers to some texts."""

    pairs: tuple[TextPair, ...]
    answers: tuple[str, ...]
    overlap: dict[str, Any] = field(default_factory=dict)
    """ROUGE from 0 to 1 and BLEU from 0 to 100, as far as they were asked for, and how the latter was computed."""

    @property
    def exact_match(self) -> float:
        """Part of the answers that are what was wanted, spaces at their ends left out."""
        both = zip(self.answers, self.pairs, strict=True)
        return sum(answer.strip() == pair.answer.strip() for answer, pair in both) / len(self.pairs)

    @property
    def word_f1(self) -> float:
        """F1 of the words of each answer, which spaces separate, in the mean."""
        both = zip(self.answers, self.pairs, strict=True)
        return sum(word_f1(answer, pair.answer) for answer, pair in both) / len(self.pairs)

    def json(self) -> dict[str, Any]:
        """All of it by name."""
        answers = [
            {"text": pair.text, "wanted": pair.answer, "answer": answer}
            for answer, pair in zip(self.answers, self.pairs, strict=True)
        ]
        found = {"pairs": len(self.pairs), "exact_match": self.exact_match, "word_f1": self.word_f1}
        return {**found, **self.overlap, "answers": answers}

    def text(self) -> str:
        """The figures for a reader, in a line."""
        numbers = {name: value for name, value in self.overlap.items() if isinstance(value, float)}
        told = [f"{name} {value:.4g}" for name, value in numbers.items()]
        found = (f"exact match {self.exact_match:.4f}", f"F1 of words {self.word_f1:.4f}", *told)
        return f"{len(self.pairs):,} pairs: {', '.join(found)}"


def word_f1(answer: str, wanted: str) -> float:
    """Of the words of both, each as often as it is there: the harmonic mean of the parts that are in the other; of no
    words 1 where none are wanted."""
    made, asked = Counter(answer.split()), Counter(wanted.split())
    if not made or not asked:
        return float(made == asked)
    return 2 * (made & asked).total() / (made.total() + asked.total())


def read_wanted_pairs(path: Path, limit: int | None = None) -> list[TextPair]:
    """The pairs of a file of JSON lines, the first so many; a `UserError` names the line that is none."""
    found = list(read_pairs(path))
    if not found:
        raise UserError(f"--pairs {path} has no pairs; give a file that has")
    return found[:limit]


def answer_all(model: SpeakingModel, pairs: Sequence[TextPair], max_new_tokens: int | None = None) -> list[str]:
    """The likeliest answer to each text, token for token, the longest ones cut; a `UserError` names a text that is too
    long."""
    settings = model.settings(temperature=0.0, max_new_tokens=max_new_tokens).seeded(0)
    batch, made = Batch(model.engine), []
    for pair in pairs:
        prompt = model.encode(pair.text)
        try:
            model.check_prompt(prompt, None)
        except UserError as error:
            raise UserError(f"{pair.place}: {error}") from None
        pieces: list[Grown] = []
        batch.add(GrowingSequence(prompt, settings, model.stream(prompt, settings), pieces.append))
        made.append(pieces)
    while batch.is_busy:
        batch.step()
    return ["".join(grown.text for grown in pieces) for pieces in made]


def score_pairs(
    model: SpeakingModel, pairs: Sequence[TextPair], scores: Sequence[str] = (), max_new_tokens: int | None = None
) -> AnswerScores:
    """The figures, with those of `scores` (rouge, bleu), whose packages are there."""
    answers, wanted = answer_all(model, pairs, max_new_tokens), [pair.answer for pair in pairs]
    overlap: dict[str, Any] = rouge(answers, wanted) if "rouge" in scores else {}
    if "bleu" in scores:
        overlap["bleu"], overlap["bleu_signature"] = bleu(answers, wanted)
    return AnswerScores(tuple(pairs), tuple(answers), overlap)
