"""What tests of data share."""

import pytest

from jaxtron.data.megatron import compiled


@pytest.fixture(params=["numpy", "numba"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blends and sample indices of any length by one of the two: which."""
    if request.param == "numpy":
        monkeypatch.setattr(compiled, "numba", lambda: None)
    else:
        pytest.importorskip("numba", reason="these loops are compiled by Numba")
        monkeypatch.setattr(compiled, "LEAST_PLACES", 0)
        monkeypatch.setattr(compiled, "LEAST_DOCUMENTS", 0)
    return request.param
