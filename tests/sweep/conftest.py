"""A workplace for every case, as the working directory."""

import shutil

import pytest

from tests.sweep.sweep_cases import snapshot
from tests.sweep.workplace import write_workplace


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """The workplace of all cases, made once."""
    folder = tmp_path_factory.mktemp("template") / "workplace"
    write_workplace(folder)
    return folder


@pytest.fixture(scope="session")
def copies(template, tmp_path_factory):
    """A copy of it that one case after the other is given, and what is in it."""
    return tmp_path_factory.mktemp("sweep"), snapshot(template)


@pytest.fixture
def workplace(template, copies, monkeypatch):
    """The copy, whole again if the case before changed it, with the caches beside it."""
    place, whole = copies
    folder = place / "workplace"
    if not folder.exists() or snapshot(folder) != whole:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    return folder
