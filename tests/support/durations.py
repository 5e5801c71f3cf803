"""A pytest plugin: the slowest files of a run by CPU time, and a bound that the short suite's files keep.

CPU time and not the clock's: that of the process and of the children it waited for, which other work beside the suite
hardly changes. What a fixture of the session costs is counted in the file that asks for it first.
"""

import os
from collections import Counter

import pytest

BOUND = 200.0
"""CPU seconds that the tests of a file without the mark `slow` may take together: about twice what the heaviest took
(2026-11, two busy cores), for machines differ by half and more."""
SHOWN = 10


def cpu_seconds() -> float:
    """Of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


class Durations:
    """CPU seconds by file: of all tests that ran, and of those that the short suite has."""

    def __init__(self, bound: float) -> None:
        self.bound, self.last = bound, cpu_seconds()
        self.total: Counter[str] = Counter()
        self.unmarked: Counter[str] = Counter()

    @property
    def over(self) -> list[str]:
        """Files whose unmarked tests took longer than the bound, the slowest first."""
        return [path for path, seconds in self.unmarked.most_common() if seconds > self.bound]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self):
        self.last = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        """One for each of set-up, call and tear-down; what it carries comes from xdist's workers too."""
        report, now = (yield), cpu_seconds()
        report.cpu_seconds, self.last = now - self.last, now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path, seconds = report.nodeid.split("::")[0], getattr(report, "cpu_seconds", 0.0)
        self.total[path] += seconds
        if not {"slow", "gpu"} & report.keywords.keys():
            self.unmarked[path] += seconds

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.over and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        if len(self.total) > 1 or self.over:
            terminalreporter.section(f"slowest files (CPU seconds; {sum(self.total.values()):.0f} in all)")
            for path, seconds in self.total.most_common(SHOWN):
                write(f"{seconds:7.1f}  {path}")
        for path in self.over:
            message = (
                f"FAILED {path}: its tests without the mark `slow` took {self.unmarked[path]:.3g} CPU seconds, more "
                f"than a file's {self.bound:g}; make them lighter, mark the heaviest `slow` where a lighter one "
                "proves the same, or split the file (--durations=20 lists them)"
            )
            write(message, red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--file-bound", type=float, default=BOUND, metavar="SECONDS", help="CPU seconds that a file may take"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Durations(config.getoption("--file-bound")), "durations of files")
