"""The batch-size ramp."""

import pytest
from pydantic import ValidationError

from jaxtron.config import UserError
from jaxtron.optim.batch_ramp import batch_size, check_batch_ramp
from jaxtron.optim.config import BatchRampConfig


def test_ramp_of_megatrons_530b_recipe():
    # `--rampup-batch-size 16 16 5859375 --global-batch-size 1536`: 95 stages of 61,677.6 samples
    ramp = BatchRampConfig(start=16, increment=16, samples=5_859_375)
    samples_and_sizes = {
        0: 16,
        61_677: 16,
        61_678: 32,
        123_355: 32,
        123_356: 48,
        5_797_697: 1504,
        5_797_698: 1520,
        5_859_374: 1520,
        5_859_375: 1536,
        10_000_000: 1536,
    }
    assert {samples: batch_size(ramp, 1536, samples) for samples in samples_and_sizes} == samples_and_sizes
    assert check_batch_ramp(ramp, 1536, multiple=16) == tuple(range(16, 1537, 16))


def test_no_ramp_is_the_global_batch():
    assert batch_size(None, 96, 0) == 96
    assert check_batch_ramp(None, 96, multiple=8) == (96,)


def test_steps_of_a_run_visit_every_size_once():
    ramp = BatchRampConfig(start=4, increment=4, samples=100)
    samples, sizes = 0, []
    while samples < 200:
        sizes.append(batch_size(ramp, 16, samples))
        samples += sizes[-1]
    assert sizes == sorted(sizes)
    assert sorted(set(sizes)) == list(check_batch_ramp(ramp, 16, multiple=4))


@pytest.mark.parametrize(
    ("start", "increment", "global_batch", "multiple", "message"),
    [
        (4, 5, 16, 1, "from 4 by 5 does not reach the global batch 16: choose an increment that divides 12"),
        (16, 4, 16, 1, "starts at 16, which is not below the global batch 16"),
        (4, 4, 16, 8, "global batch 4 is not a multiple of 8"),
    ],
)
def test_ramps_that_do_not_fit_are_refused(start, increment, global_batch, multiple, message):
    ramp = BatchRampConfig(start=start, increment=increment, samples=100)
    with pytest.raises(UserError, match=message):
        check_batch_ramp(ramp, global_batch, multiple)


def test_fields_must_be_positive():
    with pytest.raises(ValidationError):
        BatchRampConfig(start=4, increment=4, samples=0)
