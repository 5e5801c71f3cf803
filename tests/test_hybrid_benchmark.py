"""The benchmark of hybrids: tasks whose answers stand where they should, models of one size, and what is counted."""

import itertools
import random

import numpy as np
import pytest

from benchmarks import answers, hybrids, recall
from jaxtron.config import load
from jaxtron.data.dataset import open_data
from jaxtron.data.packing import pack_row
from jaxtron.run.configuration import Configuration


def test_copying_repeats_its_line_and_a_phonebook_answers_from_its_lines():
    draw = random.Random(1)
    for size in recall.TASKS["copying"].scored:
        ((prompt, answer),) = recall.copying(size, draw).turns
        assert answer == prompt and answer.endswith("\n") and len(set(answer)) == len(answer) == size + 1
    for size in recall.TASKS["phonebook"].scored:
        turns = recall.phonebook(size, draw).turns
        book, _, first = turns[0][0].partition("\n\n")
        lines = book.split("\n")
        asked = [prompt + answer for (prompt, answer) in ((first, turns[0][1]), *turns[1:])]
        assert len(lines) == len({line[0] for line in lines}) == size
        assert {len(line) for line in lines} == {1 + recall.DIGITS}
        assert sorted(asked) == sorted(f"{line}\n" for line in lines)


@pytest.mark.parametrize("name", recall.TASKS)
def test_training_reads_what_is_scored_and_learns_the_answers_alone(name, tmp_path):
    flags, _ = recall.prepare(tmp_path / "data", name, rows=40, held_out=0, seed=1)
    words = (*hybrids.settings(name, "hybrid"), *flags, "--data.validation_fraction", 0)
    config = load(Configuration, hybrids.CONFIG, [str(word) for word in words])
    source = open_data(config.data, seed=1).train
    read = {
        (row.tokens[places].tobytes(), row.targets[places].tobytes(), row.weights[places].tobytes())
        for row in map(source.__getitem__, range(len(source)))
        for places in (row.segments == segment for segment in np.unique(row.segments))
        # what is left of a row is a segment too
        if row.weights[places].any()
    }
    train, _ = recall.TASKS[name].draw(40, 0, seed=1)
    made = set()
    for example in train:
        sequence = example.sequence()
        row = pack_row([sequence], len(sequence.ids) - 1)
        made.add((row.tokens.tobytes(), row.targets.tobytes(), row.weights.tobytes()))
        written = bytes(sequence.ids[sequence.is_answer].astype(np.uint8)).decode()
        assert written == "".join(answer for _, answer in example.turns)
    assert len(made) == 40 and made == read


@pytest.mark.parametrize("name", recall.TASKS)
def test_what_is_held_out_was_never_trained_on(name):
    task = recall.TASKS[name]
    train, held_out = task.draw(2000, 8, seed=1)
    assert [example.size for example in held_out] == [size for size in task.scored for _ in range(8)]
    assert {example.size for example in train} == set(task.trained) >= set(task.scored)
    trained = {"".join(itertools.chain(*example.turns)) for example in train}
    assert all(example.turns[0][0].startswith(example.given) for example in held_out)
    assert not any(text.startswith(example.given) for text in trained for example in held_out)
    longest = max(len(example.sequence().ids) for example in [*train, *held_out])
    assert longest <= hybrids.LENGTHS[name] + 1
    again, other = task.draw(2000, 8, seed=1), task.draw(2000, 8, seed=2)
    assert again == (train, held_out) and other[1] != held_out


def test_the_models_have_as_many_parameters_within_2_percent():
    found = [hybrids.parameters(model) for model in hybrids.MODELS]
    assert max(found) <= 1.02 * min(found)


def test_an_answer_is_right_where_all_its_characters_are():
    weights = np.array([0, 1, 1, 0, 1, 1, 1, 1], np.float32)
    is_right = np.array([0, 1, 1, 0, 1, 0, 1, 1], bool)
    assert answers.answers(is_right, weights) == [(True, 1.0), (False, 0.75)]


def test_a_picture_of_losses_and_right_answers():
    text = {1: {"validation_losses": {100: 2.0, 200: 1.5}}}
    right = {"right": {4: {"whole": 1.0, "characters": 1.0}, 26: {"whole": 0.0, "characters": 0.4}}}
    tasks = {"text": {"attention": text, "hybrid": text}, "copying": {"hybrid": {1: right, 2: right}}}
    assert hybrids.drawn({"tokens_per_step": 1024, "tasks": tasks}).startswith(b"\x89PNG")
