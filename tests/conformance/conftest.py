"""The tests' own kind of layer is known to every test of the suite."""

from collections.abc import Iterator

import pytest

from tests.support.toy_kind import wave_known


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with wave_known():
        yield
