"""Every seed that is taken gives numbers of its own; one that would be cut to 32 bits is refused."""

import jax
import numpy as np
import pytest

from jaxtron.config import UserError, load
from jaxtron.run.configuration import MAX_SEED, Configuration
from jaxtron.train.__main__ import main
from tests.support.commands import run_main


def test_seeds_have_keys_of_their_own():
    seeds = (0, 1, 1234, 2**31 - 1, 2**31, 2**31 + 1234, MAX_SEED - 1, MAX_SEED)
    accepted = [load(Configuration, None, ["--seed", str(seed)]).seed for seed in seeds]
    keys = {np.asarray(jax.random.key_data(jax.random.key(seed))).tobytes() for seed in accepted}
    assert len(keys) == len(seeds)
    # what reads data is seeded with them too
    assert len({np.random.RandomState(seed).bytes(8) for seed in accepted}) == len(seeds)


@pytest.mark.parametrize("seed", [MAX_SEED + 1, 1234 + 2**32, 2**63 - 1, 2**80, -1])
def test_a_seed_that_would_be_cut_is_refused(seed: int):
    with pytest.raises(UserError, match="seed: must be"):
        load(Configuration, None, ["--seed", str(seed)])


def test_the_command_says_which_seeds_there_are():
    ended = run_main(main, ["--seed", 1234 + 2**32])
    assert (ended.code, ended.out) == (2, "")
    assert "seed: must be less than or equal to 4294967295, got 4294968530" in ended.err
