"""WikiText as people write it."""

import pytest

from jaxtron.evaluate.detokenize import wikitext


@pytest.mark.parametrize(
    ("split", "whole"),
    [
        (" = Robert Boulter = \n", " = Robert Boulter =\n"),
        (" \n = = Career = = \n \n", "\n== Career ==\n\n"),
        (" = = = 2000 – 2005 = = = \n", " === 2000 – 2005 ===\n"),
        ("a guest @-@ starring role", "a guest-starring role"),
        ("1 @,@ 500 people , 2 @.@ 5 each .", "1,500 people, 2.5 each ."),
        ("It ended . Then : this ; that ! What ? Yes", "It ended. Then: this; that! What? Yes"),
        ("It ended ( as ever ) [ 1 ] { x }", "It ended (as ever) [1] {x}"),
        ('he said " no thanks " and left', 'he said "no thanks" and left'),
        ("the players ' club", "the players' club"),
        ("a ' word ' here", "a 'word' here"),
        ("Boulter 's role", "Boulter's role"),
        ("40 ° N , so", "40°N, so"),
        ("40 N of it", "40 1 of it"),
        ("nothing to do", "nothing to do"),
    ],
)
def test_marks_join_their_words(split: str, whole: str):
    assert wikitext(split) == whole
