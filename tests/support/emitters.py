"""A pytest plugin: tests marked `usual_emitters` run in a process of their own, with XLA's fusions as users have them.

They compare bits, or choices that hang on the last bit, of programs that are fused in different ways; the emitters that
the other tests have (`support/compiling.py`) round by how XLA fuses.
"""

import os
import subprocess
import sys

import pytest

from tests.support import compiling


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not pyfuncitem.get_closest_marker("usual_emitters") or compiling.has_usual_emitters():
        return None
    ours = {"PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    # pytest removes what older runs left of their own directories, ours among them
    base = pyfuncitem.config._tmp_path_factory.mktemp("usual_emitters")  # pyright: ignore[reportAttributeAccessIssue]
    ended = subprocess.run(
        [*command, f"--basetemp={base}"],
        cwd=pyfuncitem.config.rootpath,
        env=environment | compiling.usual_emitters(),
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        pytest.fail(ended.stdout + ended.stderr, pytrace=False)
    return True
