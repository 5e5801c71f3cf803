"""Targets, padding, and what an end of document changes: by hand, and against loops over single tokens."""

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.data.megatron.boundaries import Boundaries, make_sample

END = 9


def sample(text, length, **options):
    return make_sample(np.array(text, np.int32), sequence_length=length, boundaries=Boundaries(**options))


def slow(text, length, *, end, extra):
    """Megatron's rules, a token at a time: labels, loss mask, positions, and who sees whom."""
    text = list(text) + [None] * (length + extra - len(text))
    tokens, labels = (text[:-1], text[1:]) if extra else (text, text[1:] + [None])
    mask = [0 if label is None else 1 for label in labels]
    masked = [0 if token == end else kept for token, kept in zip(tokens, mask, strict=True)]
    positions, allowed, start = [], [], 0
    for place, token in enumerate(tokens):
        positions.append(place - start)
        allowed.append([start <= seen <= place for seen in range(length)])
        if token == end:
            start = place + 1
    return [token or 0 for token in tokens], [label or 0 for label in labels], mask, masked, positions, allowed


def test_by_hand():
    options = {"end_of_document": END, "mask_loss": True, "reset_positions": True, "reset_attention": True}
    found = sample([5, END, 6, 7, END, END, 8], 6, **options)
    assert found.tokens.tolist() == [5, END, 6, 7, END, END]
    assert found.targets.tolist() == [END, 6, 7, END, END, 8]
    assert found.weights.tolist() == [1, 0, 1, 1, 0, 0]
    assert found.positions.tolist() == [0, 1, 0, 1, 2, 0]
    assert found.segments.tolist() == [0, 0, 1, 1, 1, 2]


def test_the_end_of_a_document_is_nothing_special_unless_asked():
    for options in ({}, {"end_of_document": END}):
        found = sample([5, END, 6, 7], 3, **options)
        assert found.weights.tolist() == [1, 1, 1] and found.positions is None and found.segments is None


@pytest.mark.parametrize("option", ["mask_loss", "reset_positions", "reset_attention"])
def test_each_option_does_what_it_says_and_no_more(option):
    found = sample([5, END, 6, 7], 3, end_of_document=END, **{option: True})
    assert found.weights.tolist() == ([1, 0, 1] if option == "mask_loss" else [1, 1, 1])
    assert (found.positions is not None) == (option == "reset_positions")
    assert (found.segments is not None) == (option == "reset_attention")


def test_options_without_an_end_of_document_are_refused():
    with pytest.raises(UserError, match="mask_loss and reset_attention have no effect"):
        Boundaries(mask_loss=True, reset_attention=True)


@pytest.mark.parametrize("end", [0, END])
def test_padding_is_known_by_its_place(end):
    """Where the end of document is 0 too, as the padding, the true one keeps its weight as a target."""
    options = {"end_of_document": end, "mask_loss": True, "reset_positions": True, "reset_attention": True}
    found = sample([5, 6, end], 5, **options)
    assert found.tokens.tolist() == [5, 6, end, 0, 0] and found.targets.tolist() == [6, end, 0, 0, 0]
    assert found.weights.tolist() == [1, 1, 0, 0, 0]
    assert found.positions.tolist() == [0, 1, 2, 0, 1] and found.segments.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("length", [0, 1])
def test_less_than_two_tokens_teach_nothing(length):
    found = sample([3] * length, 4)
    assert found.tokens.tolist() == [3] * length + [0] * (4 - length) and not found.weights.any()


def test_any_sequence_is_as_token_by_token():
    rng = np.random.default_rng(0)
    for _ in range(500):
        length, extra = int(rng.integers(1, 20)), int(rng.integers(2))
        text = rng.integers(1, 4, rng.integers(0, length + extra, endpoint=True)).tolist()
        tokens, labels, mask, masked, positions, allowed = slow(text, length, end=3, extra=extra)
        options = {"end_of_document": 3, "reset_positions": True, "reset_attention": True}
        for mask_loss, weights in ((False, mask), (True, masked)):
            found = sample(text, length, mask_loss=mask_loss, **options)
            assert found.tokens.tolist() == tokens and found.targets.tolist() == labels
            assert found.weights.tolist() == weights and found.positions.tolist() == positions
            seen = np.tril(found.segments[:, None] == found.segments[None, :])
            assert seen.tolist() == allowed
        assert all(array.dtype == np.int32 for array in (found.tokens, found.targets, found.positions, found.segments))
        assert found.weights.dtype == np.float32
