"""Questions whose answers stand in a text, as windows of that text (SQuAD, 1606.05250 and 1806.03822)."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from jaxtron.config import UserError
from jaxtron.data.masked.bert import SPECIAL_TOKENS
from jaxtron.data.tokenizers import HasPlaces, Tokenizer
from jaxtron.models.bert.task.columns import check_columns, text_in
from jaxtron.models.bert.task.config import BertTaskConfig

Ids = Integer[np.ndarray, "_"]
# of SQuAD's own files, whose articles have paragraphs
ARTICLES, PARAGRAPHS, QUESTIONS = "data", "paragraphs", "qas"


class Question(NamedTuple):
    """A question, a text, and the answer's first character there and the one after its last; None: it is not there."""

    question: str
    context: str
    answer: tuple[int, int] | None


class Window(NamedTuple):
    """A question and a part of a text as token ids, and where in a sequence of both the answer begins and ends."""

    question: Ids
    context: Ids
    first: int
    last: int


def questions_of_row(config: BertTaskConfig, row: Mapping[str, Any], place: str) -> Iterator[Question]:
    """The question of a row, or all of a file of SQuAD's own form; `UserError` for what is none."""
    if ARTICLES not in row or {*config.names} <= {*row}:
        yield _question(row, config.names, place)
        return
    for article in _objects(row, ARTICLES, place):
        for paragraph in _objects(article, PARAGRAPHS, place):
            for number, asked in enumerate(_objects(paragraph, QUESTIONS, place)):
                found = {"question": asked.get("question"), "context": paragraph.get("context")}
                answers = [] if asked.get("is_impossible") else asked.get("answers")
                where = f"{place}, question {asked.get('id', number)}"
                yield _question({**found, "answers": answers}, ("question", "context", "answers"), where)


def _question(row: Mapping[str, Any], names: tuple[str, ...], place: str) -> Question:
    check_columns(row, names, place)
    question, context = (text_in(row, name, place) for name in names[:2])
    answers = _answers(row[names[2]])
    if answers is None:
        raise UserError(
            f"{place} has no answers in {names[2]}: give {{text: [...], answer_start: [...]}}, or a list of objects of "
            "text and answer_start, which is empty where the text has none"
        )
    if not answers:
        return Question(question, context, None)
    # what the others of a validation's set are, people disagreed about; the first is learned
    text, start = answers[0]
    if not text or context[start : start + len(text)] != text:
        raise UserError(
            f"{place}: the answer {text[:40]!r} does not stand at character {start} of the text, which has "
            f"{context[start : start + len(text)][:40]!r} there; mend or remove it"
        )
    return Question(question, context, (start, start + len(text)))


def _answers(value: Any) -> list[tuple[str, int]] | None:
    """Texts and the characters that they begin at; None where it is neither form."""
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
            return None
        found = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
        found = [(one.get("text"), one.get("answer_start")) for one in value]
    else:
        return None
    fits = all(isinstance(text, str) and type(start) is int and start >= 0 for text, start in found)
    return found if fits else None


def _objects(value: Mapping[str, Any], name: str, place: str) -> list[Mapping[str, Any]]:
    found = value.get(name)
    if not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
        raise UserError(f"{place} has no list of objects in {name}, as files of SQuAD's form have; mend the file")
    return found


def windows(config: BertTaskConfig, asked: Question, length: int, tokenizer: Tokenizer) -> Iterator[Window]:
    """`[CLS] question [SEP] part [SEP]` in sequences of so many tokens; an answer that is not in one is at `[CLS]`."""
    if not isinstance(tokenizer, HasPlaces):
        raise UserError(
            "this tokenizer does not tell where in a text its tokens stand, which model.task answer needs; take a "
            "tokenizer.json, or bytes"
        )
    question = tokenizer.encode(asked.question)[: config.question_tokens].astype(np.int32)
    ids, places = tokenizer.encode_places(asked.context)
    room = length - SPECIAL_TOKENS - len(question)
    if room < 1:
        raise UserError(
            f"data.sequence_length {length} leaves no room for a text beside a question of {len(question)} tokens; set "
            "it larger, or --model.question_tokens smaller"
        )
    first, last = -1, -1
    if asked.answer is not None:
        start, end = asked.answer
        (hit,) = np.nonzero((places[:, 0] < end) & (places[:, 1] > start))
        first, last = (int(hit[0]), int(hit[-1])) if len(hit) else (-1, -1)
    # [CLS], the question, [SEP]
    before = len(question) + 2
    begin = 0
    while True:
        part = ids[begin : begin + room].astype(np.int32)
        is_here = begin <= first and last < begin + len(part)
        where = (before + first - begin, before + last - begin) if is_here else (0, 0)
        yield Window(question, part, *where)
        if begin + room >= len(ids):
            return
        begin += min(config.window_step, room)
