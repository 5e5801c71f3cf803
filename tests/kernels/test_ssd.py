"""Every implementation of state-space duality against float64, every gradient by name, and which of them is selected.

One suite for all: an implementation that refuses on this device says why, any other must compute every case."""

import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scans import OPTIONS, documents, greatest_errors, with_each

from jaxtron.config import UserError
from jaxtron.kernels.ssd import config, xla
from jaxtron.kernels.ssd.backend import IMPLEMENTATIONS, select_backend
from jaxtron.kernels.ssd.spec import check, through
from jaxtron.kernels.ssd.ssd import StateSpaceDuality, backward, final_state, forward, gradient_summary

DEVICE_KIND = jax.devices()[0].device_kind
# greatest error as a share of the greatest value: sums of up to 1000 positions in float32, and decays from sums of
# logarithms, which lose digits beside large ones (a chunk of dt 5 and A -8: 2e-4); in bfloat16 x, B, C are
# exact, and results, weights of pairs and states are rounded to 8 bits
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.012}
GRADIENTS = ("dx", "ddt", "dA", "dB", "dC", "dD", "dinitial")
# results with positions
ALONG = ("y", "dx", "ddt", "dB", "dC")


@dataclass(frozen=True)
class Case:
    """Sizes; `resets` are positions of the first row, and one earlier in the next ones."""

    length: int = 130
    rows: int = 2
    heads: int = 4
    groups: int = 2
    width: int = 16
    size: int = 16
    dtype: str = "float32"
    resets: tuple[int, ...] = ()
    dt: tuple[float, float] = (0.01, 0.3)
    """Smallest and largest; logarithms are uniform between them."""
    padding: int = 0
    """Positions at the end with dt 0 and gradients of 0, whatever else is there."""
    poisoned: bool = False
    """x, B and C are `POISON` there, and nobody asks for results there."""


POISON = 1e3
PACKED = (1, 50, 51, 100, 127, 128, 129, 255, 256, 383)
CASES = {
    "one position": Case(1),
    "packed chunks": Case(260, resets=PACKED),
    "bfloat16": Case(dtype="bfloat16", width=64, size=128, groups=1, heads=2, resets=(77,)),
    "dt of every size": Case(dt=(1e-5, 10.0), resets=(40,)),
    "no state passes": Case(129, resets=(0, 64, 128), rows=1),
}
LENGTHS = (2, 3, 64, 65, 100, 127, 128, 129, 255, 256, 257, 300, 511, 640, 999, 1000)
SLOW_CASES = {
    "part of a chunk": Case(63, resets=(30,)),
    "one group": Case(groups=1, heads=3),
    "a group a head": Case(groups=4),
    "smallest dt": Case(dt=(1e-7, 1e-6)),
    "largest dt": Case(dt=(1.0, 5.0)),
    **{f"length {length}": Case(length) for length in LENGTHS[::2]},
    **{f"length {length}, packed": Case(length, resets=(*PACKED, length // 2, length - 1)) for length in LENGTHS[1::2]},
    **{
        f"heads of {width}, states of {size}": Case(200, width=width, size=size, dtype=dtype, resets=(120,))
        for width, size, dtype in (
            (16, 128, "float32"),
            (64, 64, "bfloat16"),
            (64, 128, "float32"),
            (128, 16, "float32"),
            (128, 128, "bfloat16"),
        )
    },
}


@dataclass(frozen=True)
class Given:
    """What the functions are called with, by name."""

    arrays: Mapping[str, Any]
    case: Case

    def __getattr__(self, name: str) -> Any:
        return self.arrays[name]


def given(case: Case) -> Given:
    generator = np.random.default_rng(case.length)
    dtype = jnp.dtype(case.dtype)

    def normal(*shape: int, dtype: Any = "float32") -> np.ndarray:
        return generator.normal(size=shape).astype(dtype)

    by_head, by_group = (case.rows, case.length, case.heads), (case.rows, case.length, case.groups)
    state = (case.rows, case.heads, case.size, case.width)
    dt = np.exp(generator.uniform(*np.log(case.dt), size=by_head)).astype(np.float32)
    dy = normal(*by_head, case.width, dtype=dtype)
    real = case.length - case.padding
    dt[:, real:], dy[:, real:] = 0.0, 0.0
    arrays = {
        "x": normal(*by_head, case.width, dtype=dtype),
        "dt": dt,
        "A": -generator.uniform(0.5, 8.0, size=case.heads).astype(np.float32),
        "B": (normal(*by_group, case.size) / case.size**0.5).astype(dtype),
        "C": (normal(*by_group, case.size) / case.size**0.5).astype(dtype),
        "D": normal(case.heads),
        "initial": normal(*state),
        "resets": documents(case.rows, case.length, case.resets) if case.resets else None,
        "dy": dy,
        "dfinal": normal(*state),
    }
    if case.poisoned:
        for name in ("x", "B", "C"):
            arrays[name][:, real:] = POISON
    return Given(arrays, case)


def wanted(case: Case) -> dict[str, np.ndarray]:
    """y, the final state and every gradient in float64, by the definition and its adjoint, position by position."""
    arrays = given(case)
    x, dt, A, B, C, D, state, dy, asked = (
        np.asarray(getattr(arrays, name), np.float64)
        for name in ("x", "dt", "A", "B", "C", "D", "initial", "dy", "dfinal")
    )
    B, C = (np.repeat(array, case.heads // case.groups, axis=2) for array in (B, C))
    left = np.exp(dt * A)
    if arrays.resets is not None:
        left = np.where(arrays.resets[..., None], 0.0, left)
    y, dx, ddt, dB, dC, dA = (np.zeros_like(array) for array in (x, x, dt, B, C, dt))
    before = []
    for t in range(case.length):
        before.append(state)
        state = left[:, t, :, None, None] * state + np.einsum("bh,bhn,bhp->bhnp", dt[:, t], B[:, t], x[:, t])
        y[:, t] = np.einsum("bhn,bhnp->bhp", C[:, t], state) + D[:, None] * x[:, t]
        dC[:, t] = np.einsum("bhnp,bhp->bhn", state, dy[:, t])
    final = state
    for t in reversed(range(case.length)):
        asked = asked + np.einsum("bhn,bhp->bhnp", C[:, t], dy[:, t])
        by_decay = left[:, t] * np.einsum("bhnp,bhnp->bh", asked, before[t])
        added = np.einsum("bhnp,bhn->bhp", asked, B[:, t])
        dx[:, t] = dt[:, t, :, None] * added + D[:, None] * dy[:, t]
        ddt[:, t] = np.einsum("bhp,bhp->bh", added, x[:, t]) + A * by_decay
        dA[:, t] = dt[:, t] * by_decay
        dB[:, t] = np.einsum("bh,bhnp,bhp->bhn", dt[:, t], asked, x[:, t])
        asked = asked * left[:, t, :, None, None]

    def by_group(array: np.ndarray) -> np.ndarray:
        return array.reshape(*array.shape[:2], case.groups, -1, case.size).sum(3)

    gradients = (dx, ddt, dA.sum((0, 1)), by_group(dB), by_group(dC), (x * dy).sum((0, 1, 3)), asked)
    return {"y": y, "final": final, **dict(zip(GRADIENTS, gradients, strict=True))}


def results(arrays: Mapping[str, Any], implementation: StateSpaceDuality) -> dict[str, jax.Array]:
    """y, the final state, every gradient, and both summaries."""
    x, dt, A, B, C, D, initial, resets, dy, dfinal = (
        arrays[name] for name in ("x", "dt", "A", "B", "C", "D", "initial", "resets", "dy", "dfinal")
    )
    y, final, states = forward(x, dt, A, B, C, D, initial, resets, implementation)
    # they are to be sharded like x
    assert all(array.ndim >= 3 and array.shape[2] % x.shape[2] == 0 for array in jax.tree.leaves(states))
    gradients = backward(x, dt, A, B, C, D, states, dy, dfinal, resets, implementation)
    return {
        "y": y,
        "final": final,
        **dict(zip(GRADIENTS, gradients, strict=True)),
        "final_state": final_state(x, dt, A, B, initial, resets, implementation),
        "gradient_summary": gradient_summary(dt, A, C, dy, dfinal, resets, implementation),
    }


def errors(made: Mapping[str, Any], case: Case) -> dict[str, float]:
    """Of each result the greatest error as a share of the greatest value."""
    exact = wanted(case)
    exact |= {"final_state": exact["final"], "gradient_summary": exact["dinitial"]}
    assert set(made) <= set(exact)
    # where dt is 0 what it adds is of no interest: softplus has no derivative there
    unread = {"ddt", *(ALONG if case.poisoned else ())}
    return greatest_errors(made, exact, unread, case.length - case.padding)


def check_types(made: Mapping[str, Any], arrays: Given) -> None:
    """Gradients are of the types of what they are gradients of."""
    for name in GRADIENTS:
        assert made[name].dtype == getattr(arrays, name[1:]).dtype, name
    assert made["y"].dtype == arrays.x.dtype and made["final"].dtype == jnp.float32


def implementations(case: Case) -> list[str]:
    """Those that compute a case on this device."""
    x = jax.ShapeDtypeStruct((1, case.length, case.heads, case.width), case.dtype)
    B = jax.ShapeDtypeStruct((1, case.length, case.groups, case.size), case.dtype)
    return [name for name, one in IMPLEMENTATIONS.items() if one.unsupported_reason(x, B, DEVICE_KIND) is None]


def compiled(name: str) -> Any:
    return jax.jit(functools.partial(results, implementation=IMPLEMENTATIONS[name]), compiler_options=OPTIONS)


def check_case(case: Case, name: str) -> None:
    arrays = given(case)
    made = compiled(name)(arrays.arrays)
    check_types(made, arrays)
    found = errors(made, case)
    assert all(error <= TOLERANCE[case.dtype] for error in found.values()), found


@with_each(CASES, implementations)
def test_outputs_states_and_every_gradient(case: Case, name: str) -> None:
    check_case(case, name)


@pytest.mark.slow
@with_each(SLOW_CASES, implementations)
def test_every_length_and_size(case: Case, name: str) -> None:
    check_case(case, name)


@pytest.mark.parametrize("name", implementations(Case()))
def test_padding_leaves_no_trace(name: str) -> None:
    """Whatever large numbers it has: as long as its dt is 0."""
    case, run = Case(150, padding=61, resets=(70,), poisoned=True), compiled(name)
    arrays = dict(given(case).arrays)
    assert all(error <= TOLERANCE["float32"] for error in errors(run(arrays), case).values())
    # the slightest step of it would be seen
    arrays["dt"] = np.maximum(arrays["dt"], 1e-6)
    assert errors(run(arrays), case)["final"] > 0.1


@pytest.mark.parametrize("resets", [(), (70,)], ids=["one document", "two"])
def test_the_final_state_is_what_is_left_of_the_first_and_what_was_added(resets: tuple[int, ...]) -> None:
    """What a sequence in pieces rests on."""
    arrays = given(Case(resets=resets))
    nothing = jnp.zeros_like(arrays.initial)
    added = final_state(arrays.x, arrays.dt, arrays.A, arrays.B, nothing, arrays.resets, xla)
    left = through(jnp.asarray(arrays.dt), jnp.asarray(arrays.A), arrays.resets)
    made = left[..., None, None] * arrays.initial + added
    np.testing.assert_allclose(made, wanted(arrays.case)["final"], rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_how_long_chunks_are(monkeypatch) -> None:
    for positions in (50, 300):
        monkeypatch.setattr(xla, "most_positions", lambda size, width, most=positions: most)
        check_case(Case(dtype="float32", resets=(33, 64)), "xla")


@pytest.mark.parametrize("name", implementations(Case()))
def test_inside_a_region_whose_axes_are_manual(name: str) -> None:
    """Rows differ from device to device, A and D do not: their gradients are each device's own."""
    case = Case(70, resets=(9,))
    arrays = given(case).arrays
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split, whole = PartitionSpec("data"), PartitionSpec()
    shared = ("A", "D")

    def body(arrays):
        made = results(arrays, IMPLEMENTATIONS[name])
        return {key: array[None] if key in ("dA", "dD") else array for key, array in made.items()}

    specs = {key: whole if key in shared else split for key in arrays}
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=split), compiler_options=OPTIONS)
    made = run(arrays)
    made |= {key: made[key].sum(0) for key in ("dA", "dD")}
    found = errors(made, case)
    assert all(error <= TOLERANCE["float32"] for error in found.values()), found


@pytest.mark.slow
def test_memory_of_plain_jax_is_linear_in_the_length() -> None:
    def temporary(length: int) -> int:
        case = Case(length, rows=1, heads=8, groups=1, width=64, size=128, dtype="bfloat16")
        shapes = {
            key: None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype)
            for key, array in given(replace(case, length=1)).arrays.items()
        }
        along = ("x", "dt", "B", "C", "dy")
        shapes |= {key: jax.ShapeDtypeStruct((1, length, *shapes[key].shape[2:]), shapes[key].dtype) for key in along}
        compiled = jax.jit(functools.partial(results, implementation=xla)).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, middle, long = (temporary(length) for length in (2048, 4096, 8192))
    assert long - middle == pytest.approx(2 * (middle - short), rel=0.1)
    # a chunk's pairs of positions are not all chunks': 8 heads of them would be 256 MiB a 1,024 positions
    assert (long - middle) / 4 < 12 * 2**20


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


FITS = {
    "x": shape(2, 30, 4, 16),
    "dt": shape(2, 30, 4),
    "A": shape(4),
    "B": shape(2, 30, 2, 8),
    "C": shape(2, 30, 2, 8),
    "D": shape(4),
    "state": shape(2, 4, 8, 16),
    "resets": shape(2, 30, dtype="bool"),
}
REFUSED = {
    r"of x \(2, 30, 64\) and B": {"x": shape(2, 30, 64)},
    "of 0 positions": {"x": shape(2, 0, 4, 16)},
    "4 heads and 3 groups: .* heads must be a multiple of groups": {"B": shape(2, 30, 3, 8)},
    r"dt is \(2, 30\) and must be \(2, 30, 4\)": {"dt": shape(2, 30)},
    r"C is \(2, 30, 2, 9\) and must be \(2, 30, 2, 8\)": {"C": shape(2, 30, 2, 9)},
    r"state is \(2, 4, 16, 8\) and must be \(2, 4, 8, 16\)": {"state": shape(2, 4, 16, 8)},
    r"resets is \(2, 31\)": {"resets": shape(2, 31, dtype="bool")},
    "of float32 x, bfloat16 B, float32 C: they must be of one type": {"B": shape(2, 30, 2, 8, dtype="bfloat16")},
    "bfloat16 dt and float32 A: both must be float32": {"dt": shape(2, 30, 4, dtype="bfloat16")},
}


def test_what_does_not_fit_is_refused() -> None:
    check(**FITS)
    for words, wrong in REFUSED.items():
        with pytest.raises(UserError, match=words):
            check(**(FITS | wrong))


def test_every_implementation_is_one_and_has_a_name() -> None:
    assert ["auto", *IMPLEMENTATIONS] == list(typing.get_args(config.Implementation))
    for name, implementation in IMPLEMENTATIONS.items():
        assert isinstance(implementation, StateSpaceDuality), name


def select(name: str, device_kind: str, width: int = 64, size: int = 128, dtype: str = "bfloat16"):
    return select_backend(name, shape(1, 64, 8, width, dtype=dtype), shape(1, 64, 1, size, dtype=dtype), device_kind)


H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def test_auto_takes_the_fastest_that_can_and_says_why() -> None:
    assert select("auto", H100).reason == f"state-space duality: mosaic, the fastest that runs on {H100}"
    assert select("auto", A100).reason == (
        f"state-space duality: xla, the fastest that runs on {A100}; "
        f"not mosaic: its kernels are for Hopper GPUs, not {A100}"
    )
    assert select("auto", "cpu").implementation is xla
    assert select("auto", H100, width=96, size=64).name == "mosaic"
    for sizes, words in (
        ({"dtype": "float32"}, "not mosaic: its kernels take bfloat16, not float32"),
        ({"size": 256}, "not mosaic: its kernels take states of 64 and 128, not 256"),
    ):
        backend = select("auto", H100, **sizes)
        assert backend.implementation is xla and words in backend.reason


def test_a_named_one_is_taken_or_refused() -> None:
    assert select("reference", "cpu").reason == "state-space duality: reference, as asked"
    assert select("xla", "NVIDIA H200").implementation is xla
    known = (
        "model.mamba.implementation fast is not known to state-space duality: use one of auto, mosaic, xla, reference"
    )
    with pytest.raises(UserError, match=known):
        select("fast", "cpu")
    with pytest.raises(UserError, match="mosaic cannot: its kernels are for Hopper GPUs, not cpu; use auto"):
        select("mosaic", "cpu")
