"""A signal at any moment ends a command with one line and 130 or 143, or is a request where work is to be finished."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

VERBS = (
    "jaxtron.train",
    "jaxtron.plan",
    "jaxtron.doctor",
    "jaxtron.launch",
    "jaxtron.evaluate",
    "jaxtron.convert",
    "jaxtron.preprocess",
    "jaxtron",
)
COMMAND = """
import ctypes, os, signal, subprocess, sys, time
from jaxtron import interrupts
from jaxtron.command import run_command

def main(argv):
    print("ready", flush=True)
    {body}

interrupts.watch()
code = run_command(main, [])
{after}
sys.exit(code)
"""
WAIT = "time.sleep(60)"


def wait_for(path: Path) -> None:
    """Until a program made a file."""
    while not path.exists():
        time.sleep(0.01)


def start(body: str, after: str = "", shell: str = "") -> subprocess.Popen[str]:
    """A command of this body, once it is in it."""
    program = COMMAND.format(body=textwrap.indent(textwrap.dedent(body), "    ").strip(), after=textwrap.dedent(after))
    process = begin([*(["bash", "-c", shell] if shell else []), sys.executable, "-c", program])
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def begin(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def hit(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> None:
    """What a terminal does: the signal goes to the process and all that it started."""
    os.killpg(process.pid, number)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    # not communicate(), which forgets what was read along with a line
    with process, process.stdout as out, process.stderr as err:
        return process.wait(timeout=30), out.read(), err.read()


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted\n"),
        (signal.SIGTERM, 143, "terminated\n"),
        (signal.SIGUSR1, 138, "terminated by SIGUSR1\n"),
    ],
)
@pytest.mark.parametrize(
    "body",
    [
        WAIT,
        # an exception in the wrong place is lost, and the command goes on
        "while True:\n    try: time.sleep(0.1)\n    except BaseException: pass",
        # nor does Python answer while a library computes
        "ctypes.CDLL(None).sleep(60)",
        # or makes another error of it
        "try: time.sleep(60)\nexcept BaseException: raise ImportError('broken') from None",
        "try: time.sleep(60)\nfinally: print('noise', file=sys.stderr)",
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'], "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)",
    ],
)
def test_a_signal_ends_whatever_runs(body: str, number: signal.Signals, code: int, line: str):
    process = start(body)
    hit(process, number)
    assert end(process) == (code, "", line)


# where a script's `&` has it ignore Ctrl-C, SIGTERM alone has to be enough
@pytest.mark.parametrize("shell", ["", 'trap \'\' INT; exec "$0" "$@"'], ids=["", "ignores Ctrl-C"])
def test_what_was_printed_and_opened_is_kept(shell: str, tmp_path: Path):
    closed = tmp_path / "closed"
    inside = tmp_path / "inside"
    body = f"print('before')\ntry: open({str(inside)!r}, 'w').close(); time.sleep(60)\n"
    process = start(f"{body}finally: open({str(closed)!r}, 'w').close()", shell=shell)
    wait_for(inside)
    hit(process, signal.SIGTERM if shell else signal.SIGINT)
    assert end(process) == ((143, "before\n", "terminated\n") if shell else (130, "before\n", "interrupted\n"))
    assert closed.exists()


def test_the_first_is_a_request_and_the_second_is_not():
    body = """
    with interrupts.finish_first("after this") as request:
        print("inside", flush=True)
        while not request.is_made: time.sleep(0.01)
        print("asked", flush=True)
        {then}
    return 7
    """
    process = start(body.format(then="pass"))
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    hit(process)
    assert end(process) == (7, "asked\n", "after this\n")
    process = start(body.format(then=WAIT))
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    hit(process)
    assert process.stdout.readline() == "asked\n"
    hit(process)
    assert end(process) == (130, "", "after this\ninterrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_one_that_comes_twice_at_once_is_one(number: signal.Signals):
    body = """
    with interrupts.finish_first("after this") as request:
        print("inside", flush=True)
        while not request.is_made: time.sleep(0.001)
        print("asked", flush=True)
        time.sleep(0.5)
    return 7
    """
    process = start(body)
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    # as a launcher and its wrapper both pass it on
    hit(process, number)
    assert process.stdout.readline() == "asked\n"
    hit(process, number)
    assert end(process) == (7, "", "")


def test_after_the_work_too():
    process = start("return 0", "print('done', flush=True); time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline() == "done\n"
    hit(process)
    assert end(process) == (130, "", "interrupted\n")


def test_in_the_background_of_a_script_ctrl_c_is_ignored():
    process = start("time.sleep(0.3); return 5", shell='trap \'\' INT; exec "$0" "$@"')
    hit(process)
    assert end(process) == (5, "", "")


def test_workers_neither_answer_nor_survive():
    body = """
    from concurrent.futures import ProcessPoolExecutor
    import multiprocessing
    executor = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver"))
    with interrupts.spared():
        futures = [executor.submit(time.sleep, 30) for _ in range(2)]
    while not multiprocessing.active_children(): pass
    print("started", flush=True)
    for future in futures: future.result()
    """
    process = start(body)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    hit(process)
    assert end(process) == (130, "", "interrupted\n")


def is_watched(process: subprocess.Popen[str]) -> bool:
    """Whether the command has come as far as our own first line; before it Python starts."""
    return len(os.listdir(f"/proc/{process.pid}/task")) > 1


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("later", [0.0, 0.1])
def test_while_a_verb_is_imported(verb: str, later: float):
    process = begin([sys.executable, "-m", verb, "plan" if verb == "jaxtron" else "--help"])
    while not is_watched(process):
        time.sleep(0.001)
    time.sleep(later)
    hit(process)
    code, _, err = end(process)
    # a quick machine may have printed its help by then
    assert (code, err) == (130, "interrupted\n") or (later and (code, err) == (0, ""))


def test_importing_the_modules_changes_no_signal():
    program = (
        "import signal, jaxtron.train.__main__; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "True\n"
