"""A pytest plugin: `--quarter 0` to `--quarter 3` keep one quarter of the slow tests; the four have each of them once.

Which quarter a test is in is decided by its name alone: it is the same on every machine and beside whatever else was
selected, and a new test moves no other.
"""

import zlib

import pytest

QUARTERS = range(4)
SLOW = pytest.StashKey[list[str]]()
"""Names of all slow tests that were collected, before any were left out."""


def quarter_of(name: str) -> int:
    """Of a slow test with this name (`tests/train/test_resume.py::test_...[case]`)."""
    return zlib.crc32(name.encode()) % len(QUARTERS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quarter", type=int, choices=QUARTERS, help="of the slow tests, only those of this quarter")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[SLOW] = [item.nodeid for item in items if item.get_closest_marker("slow")]
    quarter = config.getoption("--quarter")
    if quarter is None:
        return
    others = {name for name in config.stash[SLOW] if quarter_of(name) != quarter}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in others])
    items[:] = [item for item in items if item.nodeid not in others]
