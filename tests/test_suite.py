"""The suite itself: its slow lane is four quarters, and a file that grows too heavy for the short lane is a failure."""

import itertools
import subprocess
from pathlib import Path

import pytest

from tests.support.quarters import QUARTERS

ROOT = Path(__file__).parents[1]
# a test and another's child that burn a fifth of a second each
HEAVY = """
import subprocess, sys, time
import pytest

BURN = "import time\\nwhile time.process_time() < 0.2: pass"

def test_here():
    end = time.process_time() + 0.2
    while time.process_time() < end: pass
    time.sleep(0.3)

def test_in_a_child():
    subprocess.run([sys.executable, "-c", BURN], check=True)
"""
SLEEPS = "import time\ndef test_sleeps(): time.sleep(0.5)\n"
MARKED = HEAVY.replace("def test", "@pytest.mark.slow\ndef test")
MANY = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("n", range(40))
def test_one_of_many(n): pass

def test_quick(): pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """`suite(*flags)` runs these files with both plugins."""
    # this one's own, if it is a worker
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini("[pytest]\nmarkers = slow\n")
    pytester.makepyfile(test_heavy=HEAVY, test_marked=MARKED, test_sleeps=SLEEPS, test_many=MANY)
    plugins = ("-p", "tests.support.durations", "-p", "tests.support.quarters")
    return lambda *flags: pytester.runpytest_inprocess(*plugins, *flags)


@pytest.mark.parametrize("processes", [(), ("-n", "2", "--dist", "loadfile")], ids=["here", "in processes"])
def test_a_file_over_the_bound_fails_the_run(suite, processes):
    result = suite("--file-bound", "0.3", *processes)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=46)
    # the slow file may take long, and what sleeps takes no CPU time
    (failed,) = (line for line in result.outlines if line.startswith("FAILED"))
    assert failed.startswith("FAILED test_heavy.py: its tests without the mark `slow` took 0.")
    assert "more than a file's 0.3; make them lighter, mark the heaviest `slow`" in failed
    words = [line.split() for line in result.outlines]
    seconds = {line[1]: float(line[0]) for line in words if len(line) == 2 and line[1].endswith(".py")}
    assert set(list(seconds)[:2]) == {"test_heavy.py", "test_marked.py"}
    assert min(seconds["test_heavy.py"], seconds["test_marked.py"]) > 0.35 > seconds["test_sleeps.py"]


def test_a_run_within_the_bound_passes_and_a_failure_stays_one(suite, pytester: pytest.Pytester):
    result = suite("test_heavy.py", "--file-bound", "60")
    assert result.ret == pytest.ExitCode.OK and "FAILED" not in result.stdout.str()
    pytester.makepyfile(test_heavy="def test(): raise AssertionError")
    assert suite("test_heavy.py", "--file-bound", "60").ret == pytest.ExitCode.TESTS_FAILED


def test_quarters_have_every_slow_test_once(suite):
    def names(*flags: object) -> list[str]:
        result = suite("--collect-only", "-q", "-m", "slow", *flags)
        return [line for line in result.outlines if "::" in line]

    quarters = [names("--quarter", quarter) for quarter in QUARTERS]
    assert all(quarters) and sorted(itertools.chain(*quarters)) == sorted(names())
    assert suite("--quarter", "4").ret == pytest.ExitCode.USAGE_ERROR


def test_make_takes_a_quarter_and_asks_for_one():
    def make(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["make", "-n", "test-quarter", *words], cwd=ROOT, capture_output=True, text=True)

    assert "-m 'slow and not gpu' --quarter 2" in make("QUARTER=2").stdout
    for words in ((), ("QUARTER=4",)):
        assert make(*words).returncode and "make test-quarter QUARTER=0, 1, 2 or 3" in make(*words).stderr


def test_files_of_folders_that_are_no_packages_have_names_of_their_own():
    """Otherwise pytest refuses one of two, in runs of the whole suite alone."""
    found = [path for path in ROOT.glob("tests/**/test_*.py") if not (path.parent / "__init__.py").exists()]
    names = [path.name for path in found]
    assert not {name for name in names if names.count(name) > 1}
