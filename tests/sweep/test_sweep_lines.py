"""Bad command lines by the hundred: each is one line of error that names what is wrong, and leaves nothing behind."""

import pytest

from jaxtron.config import settings
from jaxtron.curate.config import Curation
from jaxtron.run.configuration import Configuration
from tests.sweep.bad_settings import setting_cases
from tests.sweep.bad_words import CURATE, TEXTS, TRAIN, flag_cases, line_cases, text_cases
from tests.sweep.sweep_cases import Case, error_faults, run_in, shortlist

CASES = [
    *setting_cases(Configuration, TRAIN, label="train"),
    *setting_cases(Curation, CURATE, label="curate"),
    *text_cases(),
    *flag_cases(),
    *line_cases(),
]


CHOSEN = shortlist(len(CASES))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if number in CHOSEN else pytest.mark.slow)
        for number, case in enumerate(CASES)
    ],
)
def test_bad_lines(case: Case, workplace):
    found = error_faults(run_in(workplace, case.words), case.mentions)
    assert not found, "\n".join([f"jaxtron {' '.join(case.words)[:300]}", *found])


def test_every_text_setting_has_bad_values():
    known = {**settings(Configuration), **settings(Curation)}
    texts = {name for name, setting in known.items() if setting.scalars == (str,)}
    assert texts <= TEXTS.keys(), "add them to TEXTS"
