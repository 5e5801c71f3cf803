"""The causal convolution of state-space layers by itself, against plain float64: documents, what came before, and a
sequence on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxtron.layers.ssm.convolution import convolve, convolve_plainly
from jaxtron.sharding.collectives import all_reduce, vary
from jaxtron.sharding.config import ContextConfig
from jaxtron.sharding.context import part
from jaxtron.sharding.regions import region
from jaxtron.sharding.rules import constrain, current, use
from tests.support.equivalence import rules_for

ROWS, LENGTH, CHANNELS = 2, 24, 6
CHANNELS_LAST = ("batch", "full_seq", "channels")
# documents of one position, of fewer than the convolution sees, and across pieces
SEGMENTS = np.array([np.repeat(np.arange(4), (5, 1, 2, 16)), np.repeat(np.arange(3), (11, 4, 9))])


def given(width: int, bias: bool = True, length: int = LENGTH) -> dict[str, np.ndarray]:
    """x, kernel, perhaps a bias, and the gradient of what is made."""
    generator = np.random.default_rng(width)
    x, kernel, asked = (
        generator.standard_normal(shape, np.float32)
        for shape in ((ROWS, length, CHANNELS), (width, CHANNELS), (ROWS, length, CHANNELS))
    )
    return {"x": x, "kernel": kernel, "bias": generator.standard_normal(CHANNELS, np.float32) if bias else None,
            "asked": asked}  # fmt: skip


def wanted(arrays: dict[str, np.ndarray], segments: np.ndarray | None) -> dict[str, np.ndarray]:
    """The output and every gradient in float64, by the definition, tap by tap and position by position."""
    x, kernel, asked = (arrays[name].astype(np.float64) for name in ("x", "kernel", "asked"))
    width = len(kernel)
    ids = np.zeros(x.shape[:2], int) if segments is None else segments
    total = np.zeros_like(x) + (0.0 if arrays["bias"] is None else arrays["bias"])
    pairs = [
        (row, at, at - width + 1 + tap, tap)
        for row in range(ROWS)
        for at in range(x.shape[1])
        for tap in range(width)
        if at - width + 1 + tap >= 0 and ids[row, at - width + 1 + tap] == ids[row, at]
    ]
    for row, at, seen, tap in pairs:
        total[row, at] += kernel[tap] * x[row, seen]
    gate = 1 / (1 + np.exp(-total))
    dtotal = asked * gate * (1 + total * (1 - gate))
    dx, dkernel = np.zeros_like(x), np.zeros_like(kernel)
    for row, at, seen, tap in pairs:
        dx[row, seen] += kernel[tap] * dtotal[row, at]
        dkernel[tap] += x[row, seen] * dtotal[row, at]
    return {"y": total * gate, "x": dx, "kernel": dkernel, "bias": dtotal.sum((0, 1))}


def found(arrays: dict[str, np.ndarray], segments: np.ndarray | None, mesh: dict[str, int], context: ContextConfig):
    """The same by `convolve`, with the sequence on the devices of a mesh."""
    whole, place = PartitionSpec(), np.arange(LENGTH)

    def own(array: jax.Array) -> jax.Array:
        return part(context, current().parts("context"), vary(array), 1)

    def local(arrays: dict[str, jax.Array], segments: jax.Array | None, place: jax.Array):
        ids = None if segments is None else own(segments)
        inputs = {name: vary(arrays[name]) for name in ("x", "kernel", "bias") if arrays[name] is not None}
        inputs["x"] = own(arrays["x"])

        def run(inputs: dict[str, jax.Array]) -> jax.Array:
            x, kernel = constrain(inputs["x"], *CHANNELS_LAST), constrain(inputs["kernel"], None, "channels")
            bias = constrain(inputs["bias"], "channels") if "bias" in inputs else None
            return convolve(x, kernel, bias, ids, ("channels",))

        y, pull = jax.vjp(run, inputs)
        made = {**pull(constrain(own(arrays["asked"]), *CHANNELS_LAST))[0], "y": y}
        # back to where they are in the sequence
        at = part(context, current().parts("context"), vary(place)[None], 1)[0]
        for name in ("x", "y"):
            values = constrain(made[name], "batch", "full_seq", None)
            made[name] = vary(jnp.zeros(arrays["x"].shape)).at[:, at].set(values)
        return jax.tree.map(lambda array: all_reduce(vary(array), current().manual), made)

    with use(rules_for(mesh, context=context)):
        run = jax.jit(region(local, whole, whole))
        return jax.tree.map(np.asarray, run(arrays, segments, place))


@pytest.mark.parametrize(
    ("size", "width", "bias", "segments"),
    [
        (1, 4, True, SEGMENTS),
        # the halo of pieces of 6 positions, and all of one
        (2, 4, False, SEGMENTS),
        (2, 7, True, None),
        # pieces of 3 positions, all of which the next one sees
        (4, 4, True, SEGMENTS),
    ],
    ids=["one device", "halo of half a piece", "halo of a piece", "halo of a piece, packed"],
)
def test_output_and_every_gradient_are_those_of_the_definition(size, width, bias, segments):
    arrays = given(width, bias)
    made, exact = found(arrays, segments, {"context": size}, ContextConfig()), wanted(arrays, segments)
    assert made.keys() == exact.keys() - (set() if bias else {"bias"})
    for name, array in made.items():
        np.testing.assert_allclose(array, exact[name], rtol=0, atol=1e-5, err_msg=name)


def test_pieces_may_lie_otherwise():
    """With neighbours on inner devices."""
    arrays, context = given(3), ContextConfig(method="hierarchical", inner=2)
    made, exact = found(arrays, SEGMENTS, {"context": 4}, context), wanted(arrays, SEGMENTS)
    for name, array in made.items():
        np.testing.assert_allclose(array, exact[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("before", [0, 2, 3, 10])
def test_it_goes_on_from_what_came_before(before):
    """The last positions of it, zeros where nothing came."""
    arrays = given(4)
    x, exact = np.pad(arrays["x"], ((0, 0), (3, 0), (0, 0))), wanted(arrays, None)["y"]
    made = convolve_plainly(jnp.asarray(x[:, before:]), jnp.asarray(arrays["kernel"]), jnp.asarray(arrays["bias"]))
    np.testing.assert_allclose(made, exact[:, before:], rtol=0, atol=1e-5)


def test_what_came_before_may_be_another_document():
    arrays, start = given(4), 8
    ids, x = jnp.asarray(SEGMENTS[:, start - 3 :]), jnp.asarray(arrays["x"][:, start - 3 :])
    made = convolve_plainly(x, jnp.asarray(arrays["kernel"]), jnp.asarray(arrays["bias"]), ids)
    np.testing.assert_allclose(made, wanted(arrays, SEGMENTS)["y"][:, start:], rtol=0, atol=1e-5)
    # of which the first row sees none
    assert len(set(SEGMENTS[0, start - 3 : start + 1])) > 1
