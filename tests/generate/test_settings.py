"""Settings of a request: what is refused, in one line that names the setting first."""

import math
import subprocess
import sys

import pytest

from jaxtron.config import UserError
from jaxtron.generate.settings import SamplingSettings, read_settings

WRONG = [
    ("temperature", -0.1, "from 0 to 100"),
    ("temperature", math.nan, "a number from 0"),
    ("temperature", True, "a number from 0"),
    ("temperature", "hot", "a number from 0"),
    ("top_k", -2, "0 or more"),
    ("top_k", 1.5, "a whole number"),
    ("top_k", 2**31, "from 0 to"),
    ("top_p", 1.01, "from 0 to 1"),
    ("min_p", -0.01, "from 0 to 1"),
    ("typical_p", 0.0, "to 1"),
    ("repetition_penalty", 0, "from 0.01 to 100"),
    ("presence_penalty", 2.1, "from -2 to 2"),
    ("frequency_penalty", math.inf, "from -2 to 2"),
    ("no_repeat_ngram_size", -1, "0 or more"),
    ("max_new_tokens", 0, "1 or more"),
    ("min_new_tokens", -1, "0 or more"),
    ("seed", 2**64, "from"),
    ("seed", 0.5, "a whole number"),
    ("logprobs", 21, "from 0 to 20"),
    ("ignore_eos", 1, "true or false"),
    ("stop", ("",), "not empty"),
    ("stop", "END", "not empty"),
    ("stop", ("x",) * 65, "at most 64"),
    ("stop", ("x" * 1025,), "1,024 characters"),
    ("stop_token_ids", (-1,), "0 or more"),
    ("stop_token_ids", tuple(range(33)), "at most 32"),
    ("logit_bias", {0: 101}, "from -100 to 100"),
    ("logit_bias", {-1: 1.0}, "0 or more"),
    ("logit_bias", dict.fromkeys(range(301), 1.0), "at most 300"),
]


@pytest.mark.parametrize(("name", "value", "wanted"), WRONG)
def test_a_wrong_value_is_one_line_that_begins_with_its_name(name: str, value, wanted: str):
    with pytest.raises(UserError) as caught:
        read_settings({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} ") and wanted in message and "\n" not in message


def test_fewer_tokens_at_most_than_at_least():
    with pytest.raises(UserError, match="min_new_tokens 5 is more than max_new_tokens 4"):
        SamplingSettings(min_new_tokens=5, max_new_tokens=4)


def test_ids_that_the_model_does_not_have():
    SamplingSettings(stop_token_ids=(9,), logit_bias={9: 1.0}).check_vocab(10)
    for settings in (SamplingSettings(stop_token_ids=(10,)), SamplingSettings(logit_bias={10: 1.0})):
        with pytest.raises(UserError, match="has token 10, and the model has 10"):
            settings.check_vocab(10)


def test_what_ends_a_text():
    settings = SamplingSettings(eos_token_ids=(1, 2), stop_token_ids=(3,))
    assert set(settings.ends) == {1, 2, 3}
    assert SamplingSettings(eos_token_ids=(1,), stop_token_ids=(3,), ignore_eos=True).ends == (3,)


def test_seeds_of_several_answers():
    given = SamplingSettings(seed=2**64 - 1)
    assert [given.seeded(7, number).seed for number in range(2)] == [2**64 - 1, 0]
    assert SamplingSettings().seeded(7, 1).seed == 8 and SamplingSettings(seed=-1).seeded(7).seed == 2**64 - 1


def test_a_hardly_warm_temperature_takes_the_best():
    assert not SamplingSettings(temperature=9e-6).draws and SamplingSettings(temperature=1e-5).draws


def test_settings_are_read_without_jax():
    program = "import sys, jaxtron.generate.settings; sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
