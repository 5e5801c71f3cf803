"""How much of a GPU's memory a run takes and a plan plans with: one number."""

import os

import pytest

from jaxtron.config import UserError
from jaxtron.gpus import POOL_FRACTION, POOL_VARIABLES, gpu_named, pool_fraction, set_pool_fraction
from jaxtron.plan.memory_use import NCCL_BUFFERS, RESERVE, reserved
from jaxtron.runtime.config import RuntimeConfig
from jaxtron.runtime.start import start_runtime


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in POOL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_run_gives_the_pool_nine_tenths_and_more(environment):
    # so that what is set here is taken back
    environment.setenv(POOL_VARIABLES[0], "")
    assert POOL_FRACTION >= 0.9
    start_runtime(RuntimeConfig(launcher="none", xla_preset="none"))
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == str(POOL_FRACTION)
    assert pool_fraction() == POOL_FRACTION


@pytest.mark.parametrize("name", POOL_VARIABLES)
def test_the_user_decides(name: str):
    environment = {name: "0.5"}
    set_pool_fraction(environment)
    assert environment == {name: "0.5"} and pool_fraction(environment) == 0.5


@pytest.mark.parametrize("text", ["much", "nan", "inf", "0", "-0.5", "90%"])
def test_a_part_that_is_none(text: str):
    with pytest.raises(UserError, match=f"XLA_CLIENT_MEM_FRACTION={text} in the environment is not a part"):
        set_pool_fraction({"XLA_CLIENT_MEM_FRACTION": text})


def test_both_names_at_once():
    with pytest.raises(UserError, match="XLA_PYTHON_CLIENT_MEM_FRACTION and XLA_CLIENT_MEM_FRACTION are both"):
        set_pool_fraction(dict.fromkeys(POOL_VARIABLES, "0.9"))


@pytest.mark.parametrize("groups", [0, 1, 6, 60])
@pytest.mark.parametrize("part", [None, "0.75", "0.999", "2"])
def test_what_fits_the_gpu_fits_the_pool(groups: int, part: str | None, environment):
    if part is not None:
        environment.setenv(POOL_VARIABLES[0], part)
    gpu, communication = gpu_named("h100"), groups * NCCL_BUFFERS
    beside = communication + reserved(gpu, communication)
    assert gpu.memory_bytes - beside <= gpu.pool_bytes <= gpu.memory_bytes
    # what is beside the pool is enough for what is estimated to be there, and the pool is not left unused
    assert beside >= communication + RESERVE
    assert beside == communication + RESERVE or gpu.memory_bytes - beside == gpu.pool_bytes
