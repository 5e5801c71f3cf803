"""Hits of task n-grams and cuts around them, to the character."""

import json

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.curate.config import Decontaminate
from jaxtron.curate.criteria.decontaminate import cut, find_hits, read_tasks
from jaxtron.curate.criteria.hashing import words

TASK = "the quick brown fox jumps over the lazy dog and then runs far away home"


def write_tasks(tmp_path, *tasks):
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return str(path)


def filler(start, count):
    return " ".join(f"w{i:04d}" for i in range(start, start + count))


def test_tasks_give_ngrams_and_short_ones_count_whole(tmp_path):
    short, too_short = " ".join("abcdefgh"), " ".join("abcdefg")
    path = write_tasks(tmp_path, {"text": TASK}, {"text": short}, {"text": too_short})
    tasks = read_tasks(Decontaminate(tasks=(path,)))
    assert sorted(tasks.sizes.tolist()) == [8, 13, 13, 13]
    assert (np.diff(tasks.hashes.astype(object)) > 0).all()


def test_several_fields_of_a_task(tmp_path):
    path = write_tasks(tmp_path, {"question": filler(0, 13), "answer": filler(50, 14), "id": "x"})
    tasks = read_tasks(Decontaminate(tasks=(path,), fields=("question", "answer")))
    assert len(tasks.hashes) == 1 + 2


def test_hits_are_found_by_place_whatever_case_and_punctuation(tmp_path):
    tasks = read_tasks(Decontaminate(tasks=(write_tasks(tmp_path, {"text": TASK}),)))
    texts = [
        filler(0, 30),
        f"{filler(0, 5)} {TASK.upper().replace(' ', ', ')} {filler(9, 5)}",
        " ".join(TASK.split()[:12]),
    ]
    documents, firsts, numbers = find_hits(words(texts), tasks)
    assert documents.tolist() == [1, 1, 1]
    assert firsts.tolist() == [5, 6, 7]
    assert len(set(numbers.tolist())) == 3


def test_a_short_task_is_a_hit_only_as_a_whole(tmp_path):
    tasks = read_tasks(Decontaminate(tasks=(write_tasks(tmp_path, {"text": filler(0, 9)}),)))
    documents, firsts, _ = find_hits(words([filler(0, 8), f"x {filler(0, 20)}"]), tasks)
    assert (documents.tolist(), firsts.tolist()) == ([1], [1])


def texts_of(text, found):
    return [text[start:end] for start, end in found.kept]


def test_a_cut_is_the_hit_and_its_margins_to_the_character():
    # words of 5 characters and a space: word i is at 6 i
    text = filler(0, 300)
    found = cut(text, [(150, 13)], Decontaminate(margin=200))
    # 900 - 200 = 700 is within word 116 (696..701), 977 + 200 = 1177 within word 196 (1176..1181)
    assert found.removed == [(696, 1181)]
    assert texts_of(text, found) == [filler(0, 116), filler(197, 103)]


def test_no_margin_cuts_the_words_alone():
    text = filler(0, 100)
    found = cut(text, [(40, 13)], Decontaminate(margin=0, least=0))
    assert found.removed == [(240, 317)]
    assert texts_of(text, found) == [filler(0, 40), filler(53, 47)]


def test_overlapping_hits_are_one_cut_and_distant_ones_two():
    text = filler(0, 600)
    config = Decontaminate()
    assert len(cut(text, [(100, 13), (101, 13), (140, 13)], config).removed) == 1
    assert len(cut(text, [(400, 13), (100, 13)], config).removed) == 2
    # a short hit within a longer one does not shorten the cut
    assert cut(text, [(100, 13), (101, 8)], config) == cut(text, [(100, 13)], config)


def test_short_parts_are_left_out():
    text = filler(0, 300)
    # 200 before word 68 lies word 34, and 34 words with the spaces between are 203 characters; 33 are 197
    for first, parts in ((68, 2), (67, 1)):
        assert len(cut(text, [(first, 13)], Decontaminate()).kept) == parts
    assert cut(filler(0, 20), [(3, 13)], Decontaminate()).kept == []


def test_hits_at_the_ends():
    text = filler(0, 100)
    assert texts_of(text, cut(text, [(0, 13)], Decontaminate(margin=0, least=0))) == [filler(13, 87)]
    assert texts_of(text, cut(text, [(87, 13)], Decontaminate(margin=0, least=0))) == [filler(0, 87)]


def test_letters_that_grow_in_lower_case_do_not_shift_the_cut():
    text = "İ" * 50 + " " + filler(0, 20) + " end"
    found = cut(text, [(1, 13)], Decontaminate(margin=0, least=0))
    assert texts_of(text, found) == ["İ" * 50, filler(13, 7) + " end"]


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        ([], {}, "no text of 8 words in the fields text; set --decontaminate.fields"),
        ([{"text": "too short"}], {}, "no text of 8 words"),
        ([{"question": TASK}], {}, "no key 'text', only 'question'; mend the task file, or set"),
        ([{"text": 3}], {}, "task.jsonl line 1: 'text' is a number, not a string"),
    ],
)
def test_task_files_without_tasks_are_an_error(tmp_path, tasks, settings, message):
    with pytest.raises(UserError, match=message):
        read_tasks(Decontaminate(tasks=(write_tasks(tmp_path, *tasks),), **settings))


def test_no_task_file_is_an_error():
    with pytest.raises(UserError, match="say --decontaminate.tasks"):
        read_tasks(Decontaminate())
