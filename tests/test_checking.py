"""What an annotation of Jaxtron says is refused where it does not hold: by its shapes, types and letters."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxtron.data.megatron.blend import Blend
from jaxtron.layers.loss import cross_entropy
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.sharding.rules import use

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
    with pytest.raises(TypeCheckError, match="typechecking parameter 'num_stages'"):
        make_schedule("1f1b", "4", 8)
