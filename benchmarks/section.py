"""A section of `benchmarks.gpu`: a command in a process of its own, for so many seconds, and what it measured."""

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import record
from benchmarks.side_by_side import SECTION_SECONDS

# seconds in which a section whose time is over may still say what it has
GRACE = 10.0
# seconds that the system may take to end a process; one that hangs in the driver is left behind
REAP = 2.0
OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")
_ANY = "|".join(OUTCOMES)
# a line of pytest -v, in several processes and in one
_OUTCOME = re.compile(rf"^(?:\[gw\d+\] \[ *\d+%\] ({_ANY}) (.+)|(\S+::.+) ({_ANY})(?: \(.*\))? +\[ *\d+%\])$")
# a test that began: in several processes alone on its line, in one cut off
_BEGAN = re.compile(r"^(\S+\.py::.+?) *$")
# a file that cannot be imported, in the summary
_BROKEN = re.compile(r"^ERROR (\S+\.py(?: - .+)?)$", re.MULTILINE)
# how many tests it runs, in the order of preference
_SELECTED = (r"/ (\d+) selected", r"\[(\d+) items?\]", r"collected (\d+) items?")


def run_section(words: Sequence[str], seconds: float, log: Path | None = None) -> dict[str, Any]:
    """Runs a command for at most `seconds`; its JSON as `result`, or a status that says what is missing and why.

    What it printed before its time was over is kept, as `incomplete`. All it said goes to `log`.out and `log`.err.
    """
    if seconds < 1:
        return {"status": "skipped", "reason": "no time was left"}
    if log is None:
        with TemporaryDirectory() as folder:
            return run_section(words, seconds, Path(folder) / "section")
    start, grace = time.monotonic(), min(GRACE, seconds / 4)
    limit = seconds - grace - min(REAP, grace / 2)
    # files, for what hangs keeps a pipe open for ever
    printed, complaints = (log.with_name(f"{log.name}.{kind}") for kind in ("out", "err"))
    with printed.open("w") as stdout, complaints.open("w") as stderr:
        process = subprocess.Popen(
            words,
            cwd=record.ROOT,
            env=os.environ | _environment(words, limit),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            _kill(process)
        except subprocess.TimeoutExpired:
            code = None
            _end(process, grace, start + seconds)
    read = _read if code is not None else _read_cut_off
    outcome = read(words, code, *(file.read_text(errors="replace") for file in (printed, complaints)))
    if outcome["status"] == "timeout":
        outcome["reason"] = f"ended after {limit:.0f} s{outcome['reason']}"
    return {**outcome, "seconds": round(time.monotonic() - start, 1)}


def _environment(words: Sequence[str], seconds: float) -> dict[str, str]:
    # a JAX that cannot have the GPU fails, and does not measure the CPU instead
    platforms = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "cuda,cpu"}
    if "pytest" not in words:
        return {"PYTHONUNBUFFERED": "1", SECTION_SECONDS: f"{seconds:.0f}", **platforms}
    # several processes on one GPU: none may take most of its memory for itself; and of pytest's plugins only ours, for
    # those of the machine warn, and print, and one ends pytest before the first test
    return {
        "PYTHONUNBUFFERED": "1",
        "JAXTRON_TEST_PLATFORM": "cuda",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
        # pytest's summary in whole lines
        "COLUMNS": "250",
    }


def _end(process: subprocess.Popen[bytes], grace: float, deadline: float) -> None:
    """Interrupts a process, so that pytest tells of failures, then kills it with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    _kill(process)
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(0.1, deadline - time.monotonic()))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills whoever is left of the session that the process leads: a kernel that hangs keeps the GPU."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _read(words: Sequence[str], code: int, stdout: str, stderr: str) -> dict[str, Any]:
    """What a section that ended by itself found."""
    found, kept = _printed(words, stdout), {"stderr": _tail(stderr)} if stderr.strip() else {}
    if "pytest" in words:
        return {**_read_tests(code, found or {}), **kept, "result": found}
    if code:
        reason = f"exit code {code}{_last(stderr)}"
        measured = {} if found is None else {"incomplete": True, "result": found}
        return {"status": "failed", "reason": reason, **kept, **measured}
    if found is None:
        return {"status": "failed", "reason": f"it printed no JSON{_last(stderr)}", **kept}
    if "absent" in found:
        return {"status": "absent", "reason": found["absent"], **kept}
    return {**judged(found), **kept, "result": found}


def _read_cut_off(words: Sequence[str], code: None, stdout: str, stderr: str) -> dict[str, Any]:
    """What a section found that did not end by itself; the reason goes on."""
    found = _printed(words, stdout)
    outcome: dict[str, Any] = {"status": "timeout", "reason": "", "stderr": _tail(stderr)}
    if found is None:
        return {**outcome, "reason": f" with nothing measured{_last(stderr)}"}
    if running := found.get("unfinished"):
        outcome["reason"] = f" while these ran: {', '.join(running)}"
    elif "pytest" not in words and "reason" in (verdict := judged(found)):
        outcome["reason"] = f"; {verdict['reason']}"
    return {**outcome, "incomplete": True, "result": found}


def _read_tests(code: int, found: Mapping[str, Any]) -> dict[str, Any]:
    if code == 5:
        return {"status": "absent", "reason": "there are no tests marked gpu"}
    counts = ", ".join(f"{found[name.lower()]} {name.lower()}" for name in OUTCOMES if found[name.lower()])
    if not found["passed"]:
        why = counts or "; ".join(found["broken_files"][:1]) or f"pytest ended with code {code}"
        return {"status": "failed", "reason": f"no test passed: {why}"}
    if found["broken_files"]:
        counts += f", {len(found['broken_files'])} files cannot be read"
    if code:
        return {"status": "failed", "reason": f"{counts}, pytest ended with code {code}"}
    return {"status": "ok", "reason": counts}


def judged(found: Mapping[str, Any]) -> dict[str, Any]:
    """`ok` if a result has figures, `partial` if an implementation has none in any case, `failed` if there are none."""
    if found.get("platform", "gpu") != "gpu":
        return {"status": "failed", "reason": f"it ran on the {found['platform']}, and not on the GPU"}
    if "cases" not in found:
        numbers = any(type(value) in (int, float) for value in _leaves(found))
        return {"status": "ok"} if numbers else {"status": "failed", "reason": "nothing was measured"}
    made, errors = Counter[str](), {}
    for case in found["cases"]:
        for name, one in case["implementations"].items():
            made[name] += "error" not in one
            if "error" in one:
                errors.setdefault(name, one["error"])
    nothing = [f"{name}: {errors[name].splitlines()[0][:200]}" for name in made if not made[name]]
    if not made.total():
        return {"status": "failed", "reason": f"nothing was measured; {'; '.join(nothing) or 'there was no case'}"}
    if nothing:
        return {"status": "partial", "reason": f"no figures of {'; '.join(nothing)}"}
    return {"status": "ok"}


def _leaves(found: Any) -> Iterator[Any]:
    inner = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else None
    if inner is None:
        yield found
    else:
        for value in inner:
            yield from _leaves(value)


def _printed(words: Sequence[str], stdout: str) -> dict[str, Any] | None:
    """What a section measured according to its output: pytest's outcomes, else the last whole JSON object."""
    if "pytest" in words:
        return outcomes(stdout)
    for start in reversed([match.start() for match in re.finditer(r"^\{", stdout, re.MULTILINE)]):
        try:
            return json.JSONDecoder().raw_decode(stdout, start)[0]
        except ValueError:
            # cut off where the section ended
            continue
    return None


def outcomes(report: str) -> dict[str, Any]:
    """Of pytest's verbose report, whole or not: how many tests have each outcome, by file too, which failed, and which
    had begun and not ended."""
    found: dict[str, str] = {}
    began: dict[str, None] = {}
    for line in report.split("= short test summary info =")[0].splitlines():
        if match := _OUTCOME.match(line):
            found[(match[2] or match[3]).strip()] = match[1] or match[4]
        elif match := _BEGAN.match(line):
            began[match[1]] = None
    by_file: dict[str, Counter[str]] = {}
    for name, outcome in found.items():
        by_file.setdefault(name.partition("::")[0], Counter())[outcome.lower()] += 1
    selected = next((match for pattern in _SELECTED if (match := re.search(pattern, report))), None)
    return {
        "selected": int(selected[1]) if selected else None,
        **{outcome.lower(): list(found.values()).count(outcome) for outcome in OUTCOMES},
        "by_file": {file: dict(counts) for file, counts in sorted(by_file.items())},
        "not_passed": sorted(name for name, outcome in found.items() if outcome in ("FAILED", "ERROR")),
        "unfinished": sorted(name for name in began if name not in found),
        "broken_files": sorted(set(_BROKEN.findall(report))),
        "report": _tail(report, 80),
    }


def _last(text: str) -> str:
    """The last thing that was said, as the end of a reason."""
    lines = text.strip().splitlines()
    return f": {lines[-1].strip()[:300]}" if lines else ""


def _tail(text: str, lines: int = 40) -> list[str]:
    return [line[:500] for line in text.strip().splitlines()[-lines:]]
