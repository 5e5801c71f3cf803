"""What an annotation of Jaxtron says is refused where it does not hold: by its shapes, types and letters.

And the guards that tests put around steps can fail.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintParamViolation
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import TypeCheckError

from jaxtron.data.megatron.blend import Blend
from jaxtron.layers.config import RotaryConfig
from jaxtron.layers.loss import cross_entropy
from jaxtron.layers.positions import rotary_tables
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.sharding.rules import use
from tests.support.checking import EVERY

X, TABLE, WEIGHTS = np.zeros((2, 3, 4), np.float32), np.zeros((8, 4), np.float32), np.ones((2, 3), np.float32)
TARGETS = np.zeros((2, 3), np.int32)


def test_arrays_as_annotated_pass(rules_for: Callable):
    with use(rules_for(data=1)):
        assert cross_entropy(jnp.asarray(X), TABLE, TARGETS, WEIGHTS, 8, 0.0)[1] == pytest.approx(6 * np.log(8))


@pytest.mark.parametrize(
    ("wrong", "arguments"),
    [
        ("x", (X[0], TABLE, TARGETS, WEIGHTS, 8, 0.0)),
        ("table", (X, TABLE[:, :3], TARGETS, WEIGHTS, 8, 0.0)),
        ("targets", (X, TABLE, TARGETS.astype(np.float32), WEIGHTS, 8, 0.0)),
        ("weights", (X, TABLE, TARGETS, WEIGHTS[:, :2], 8, 0.0)),
        ("vocab", (X, TABLE, TARGETS, WEIGHTS, 8.5, 0.0)),
    ],
)
def test_a_wrong_argument_is_refused_by_name(wrong: str, arguments: tuple):
    with pytest.raises(TypeCheckError, match=f"typechecking parameter '{wrong}'"):
        cross_entropy(*arguments)


def test_a_dataclass_of_wrong_arrays_is_refused():
    datasets, samples = np.zeros(4, np.int16), np.zeros(4, np.int64)
    assert Blend(datasets, samples)
    with pytest.raises(TypeCheckError, match="typechecking parameter 'samples'"):
        Blend(datasets, samples[:3])


def test_a_wrong_type_is_refused():
    with pytest.raises(
        BeartypeCallHintParamViolation, match="parameter num_stages='4' violates type hint <class 'int'>"
    ):
        make_schedule("1f1b", "4", 8)


def test_the_last_of_many_calls_is_checked_in_every_test(rules_for: Callable):
    with use(rules_for(data=1)):
        for _ in range(EVERY - 1):
            rotary_tables(RotaryConfig(), 4, np.arange(2))
        with pytest.raises(TypeCheckError, match="typechecking parameter 'places'"):
            rotary_tables(RotaryConfig(), 4, np.arange(2.0))


def test_what_a_step_brings_to_the_devices_unasked_is_refused(rules_for: Callable):
    mesh = rules_for(data=8).mesh
    add = jax.jit(lambda x, y: x + y)
    split = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(np.ones(8, np.float32), split)
    with jax.transfer_guard("disallow"):
        assert add(x, x).sharding == split
        for host in (np.ones(8, np.float32), 1.0):
            with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
                add(x, host)


@pytest.mark.slow
def test_a_tracer_that_outlives_its_step_is_refused():
    kept = []
    with jax.checking_leaks(), pytest.raises(Exception, match="Leaked"):
        jax.jit(lambda x: kept.append(x) or x)(1.0)
