"""`make soak`: runs that are killed at random moments, again and again, and end as one that was left alone.

Each run is of one, two or four processes; a `kill -9` takes one of them, at a moment that the seed says: while Python
starts JAX, between steps, inside a save. The others must notice and end by themselves; the same command must then
continue from the newest finished checkpoint; and at the end weights, optimizer and metrics must be those of the
undisturbed run, bit for bit. Every process is forked from one that has imported everything and has started nothing,
and compiled programs are kept, so that a start costs two seconds and no more. The log has a line a kill and a run.
"""

import argparse
import atexit
import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax  # noqa: F401  (imported once, for all that are forked)

import jaxtron.generate.text
import jaxtron.train.early
import jaxtron.train.run  # noqa: F401
from jaxtron import interrupts
from jaxtron.checkpoint.parts import open_parts
from jaxtron.command import run_command
from jaxtron.train.__main__ import main as train
from tests.faults.inject import kill
from tests.support.command_runs import free_port, records, small
from tests.support.compiling import QUICK

KILLS, SEED = 1000, 20
STEPS, EVERY = 24, 2
# of one to go on with steps that are saved, and to notice a loss
MOST_SECONDS = 900.0
# the command again may help (sysexits.h), ended by a signal, and by a loss that JAX tells first
NOTICED = (interrupts.TRY_AGAIN,)
# gloo gives processes thirty seconds to meet, which a machine with more to do than cores may not have for them
STARVED = "Gloo context initialization failed"
MOST_STARTS = 5
COMMITTED = re.compile(r"step_(\d{8})")
CONTINUING = re.compile(r"checkpoint of step (\d+) found: continuing")
# dropout, microbatches, growing batches and warm-up: all that depends on the step, the sample or the key
VARIED = (
    *("--model.num_layers", "1", "--model.hidden_size", "16", "--model.num_heads", "2", "--data.sequence_length", "16"),
    *("--model.dropout", "0.1", "--train.precision", "bf16", "--train.microbatches", "2"),
    *("--train.batch_ramp.start", "4", "--train.batch_ramp.increment", "4", "--train.batch_ramp.samples", "40"),
    *("--optimizer.warmup_steps", "8", "--train.validate_every", "6", "--train.validation_batches", "1"),
    *("--train.sample_tokens", "0", "--checkpoint.every", str(EVERY), "--train.steps", str(STEPS)),
    *("--runtime.launcher", "none"),
)


@dataclass(frozen=True)
class Layout:
    """So many processes, devices of each, and what the mesh makes of them."""

    processes: int
    devices: int
    mesh: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.processes} x {self.devices} {' '.join(self.mesh)}".strip()


LAYOUTS = (
    Layout(1, 1),
    Layout(2, 1, ("--mesh.data", "2")),
    Layout(1, 2, ("--mesh.fsdp", "2")),
    Layout(1, 1),
    Layout(4, 1, ("--mesh.data", "2", "--mesh.fsdp", "2")),
    Layout(2, 1, ("--mesh.fsdp", "2")),
)


@dataclass(frozen=True)
class Moment:
    """So many seconds after so many steps of the command were logged."""

    steps: int
    seconds: float


@dataclass
class Kill:
    """One kill: when it came in seconds after the start, and what the directory was like."""

    run: int
    layout: str
    victim: int
    seconds: float
    phase: str
    logged: int
    saved: int
    noticed: float
    """Seconds until the last of the others had ended."""
    codes: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Soak:
    """Runs in one folder, with the text, the tokens and the programs that they share."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._undisturbed: dict[str, tuple[str, list[dict[str, Any]], float]] = {}

    def run(self, number: int, most_kills: int) -> Iterator[Kill | dict[str, Any]]:
        """The kills of a run, at most so many, and its end."""
        chance = random.Random(f"{self._seed}/{number}")
        layout = LAYOUTS[number % len(LAYOUTS)]
        expected, metrics, beginning = self._expected(layout)
        directory = self._folder / f"run_{number}"
        wrong: list[str] = []
        kills, continued = 0, -1
        while True:
            is_last = kills >= most_kills
            moment = None if is_last else _moment(chance, beginning)
            victim = chance.randrange(layout.processes)
            found = self._once(number, layout, directory, victim, moment, continued)
            if isinstance(found, Kill):
                kills += 1
                continued = found.saved
                yield found
                continue
            wrong += found
            break
        if not wrong:
            wrong += [] if self._digest(directory) == expected else ["weights are not those of the undisturbed run"]
            wrong += [] if records(directory) == metrics else ["metrics are not those of the undisturbed run"]
        shutil.rmtree(directory, ignore_errors=True)
        yield {"run": number, "layout": str(layout), "kills": kills, "wrong": wrong, "ended": True}

    def _expected(self, layout: Layout) -> tuple[str, list[dict[str, Any]], float]:
        """Digest and metrics of the undisturbed run, and its seconds to the first step once programs are compiled."""
        if str(layout) not in self._undisturbed:
            for name in ("first", "second"):
                directory = self._folder / name
                begun = time.time()
                wrong = self._once(-1, layout, directory, 0, None, -1)
                assert wrong == [], wrong
                # it is written with the first step
                seconds = (directory / "config.yaml").stat().st_mtime - begun
                found = self._digest(directory), records(directory), seconds
                shutil.rmtree(directory)
            self._undisturbed[str(layout)] = found
        return self._undisturbed[str(layout)]

    def _once(
        self,
        number: int,
        layout: Layout,
        directory: Path,
        victim: int,
        moment: Moment | None,
        continued: int,
        starts: int = 1,
    ) -> Kill | list[str]:
        """One start of the command, killed at the moment; what is wrong with how it ended by itself."""
        begun, since = time.monotonic(), time.time()
        children = self._start(layout, directory)
        codes: dict[int, int] = {}
        reached = None if moment is None or moment.steps else begun
        first = _saved(directory)
        while len(codes) < layout.processes and time.monotonic() < begun + MOST_SECONDS:
            codes |= _reap(children, codes)
            if moment is not None and reached is None and _logged_since(directory, since) - first >= moment.steps:
                reached = time.monotonic()
            if moment is not None and reached is not None and time.monotonic() >= reached + moment.seconds:
                break
            time.sleep(0.002)
        if len(codes) == layout.processes or reached is None:
            codes |= self._end(children, codes)
            output = self._output(directory, 0)
            wrong = [f"ended with {codes[one]}" for one in codes if codes[one] != 0]
            if wrong and starts < MOST_STARTS and STARVED in self._errors(directory, layout):
                return self._once(number, layout, directory, victim, moment, continued, starts + 1)
            wrong += self._wrong_beginning(output, continued) if not wrong else [self._errors(directory, layout)]
            return wrong
        now = time.monotonic()
        phase = _phase(directory, since)
        if victim not in codes:
            kill(children[victim])
        codes |= _wait(children, codes, now + MOST_SECONDS)
        ended = time.monotonic()
        hung = [one for one in range(layout.processes) if one not in codes]
        codes |= self._end(children, codes)
        logged, saved = _logged(directory), _saved(directory)
        wrong = [f"process {one} did not notice the loss" for one in hung]
        wrong += [
            f"process {one} ended with {codes[one]}: {self._errors(directory, layout)}"
            for one in codes
            if one != victim and one not in hung and codes[one] not in (0, *NOTICED)
            if STARVED not in self._errors(directory, layout)
        ]
        wrong += self._wrong_beginning(self._output(directory, 0), continued)
        wrong += _lost(directory, saved)
        return Kill(
            number,
            str(layout),
            victim,
            round(now - begun, 3),
            phase,
            logged,
            saved,
            round(ended - now, 3),
            [codes[one] for one in range(layout.processes)],
            wrong,
        )

    def _wrong_beginning(self, output: str, continued: int) -> list[str]:
        """It must go on from the newest finished checkpoint, if it came so far as to say so."""
        found = CONTINUING.search(output)
        if found is None or continued < 0 or int(found[1]) == continued:
            return []
        return [f"continued from step {found[1]}, and step {continued} was saved"]

    def _start(self, layout: Layout, directory: Path) -> list[int]:
        words = [*small(self._folder), *VARIED, *layout.mesh, "--devices", str(layout.devices)]
        words += ["--run.directory", str(directory), "--runtime.compilation_cache", str(self._folder / "programs")]
        if layout.processes > 1:
            address = f"127.0.0.1:{free_port()}"
            words += ["--runtime.coordinator_address", address, "--runtime.num_processes", str(layout.processes)]
        children = []
        for process in range(layout.processes):
            own = ["--runtime.process_id", str(process)] if layout.processes > 1 else []
            children.append(_fork([*words, *own], self._folder, _log(directory, process)))
        return children

    def _end(self, children: Sequence[int], codes: dict[int, int]) -> dict[int, int]:
        for one, child in enumerate(children):
            if one not in codes:
                kill(child)
        return _wait(children, codes, math.inf)

    def _output(self, directory: Path, process: int) -> str:
        return Path(f"{_log(directory, process)}.out").read_text(errors="replace")

    def _errors(self, directory: Path, layout: Layout) -> str:
        said = [
            Path(f"{_log(directory, one)}.err").read_text(errors="replace")[-300:] for one in range(layout.processes)
        ]
        return " | ".join(" ".join(text.split()) for text in said)

    def _digest(self, directory: Path) -> str:
        """Of every array of the last checkpoint, made in a process of its own: here nothing may start JAX."""
        reader, writer = os.pipe()
        child = _quiet_fork()
        if child == 0:
            try:
                os.write(writer, _digest_of(directory / "checkpoints" / f"step_{STEPS:08d}").encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            found = pipe.read()
        os.waitpid(child, 0)
        return found


def _moment(chance: random.Random, beginning: float) -> Moment:
    """Any moment of the beginning, or more often one among steps and saves; one that never comes kills nobody."""
    if chance.random() < 0.25:
        return Moment(0, chance.uniform(0.0, beginning))
    return Moment(chance.randint(1, 3 * EVERY), chance.uniform(0.0, 0.3))


def _digest_of(path: Path) -> str:
    record, arrays = open_parts(path)
    found = hashlib.sha256(json.dumps([record.step, record.extra.get("position")]).encode())
    for name in sorted(record.arrays):
        for starts, part in arrays.parts(name):
            found.update(f"{name} {starts} {part.dtype} {part.shape}".encode())
            found.update(part.tobytes())
    return found.hexdigest()


def _quiet_fork() -> int:
    with warnings.catch_warnings():
        # JAX warns of threads, and none is started here
        warnings.simplefilter("ignore")
        return os.fork()


def _fork(words: list[str], folder: Path, log: str) -> int:
    """A process that runs the command from its command line on, as `python -m jaxtron.train` does after its imports."""
    sys.stdout.flush()
    child = _quiet_fork()
    if child:
        return child
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ |= {"XDG_CACHE_HOME": str(folder), "XLA_FLAGS": QUICK}
    interrupts.watch()
    code: Any = 1
    try:
        code = run_command(train, words)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    # what Python does at its end, without a return to what called this
    threading._shutdown()  # pyright: ignore
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _log(directory: Path, process: int) -> str:
    return f"{directory}.{process}"


def _reap(children: Sequence[int], known: dict[int, int]) -> dict[int, int]:
    """Exit codes of those that have ended, by their number."""
    found = {}
    for one, child in enumerate(children):
        if one not in known:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                found[one] = os.waitstatus_to_exitcode(status)
    return found


def _wait(children: Sequence[int], known: dict[int, int], until: float) -> dict[int, int]:
    """Exit codes of the others, once they have ended or it is late."""
    found: dict[int, int] = {}
    while len(known) + len(found) < len(children) and time.monotonic() < until:
        found |= _reap(children, known | found)
        time.sleep(0.002)
    return found


def _phase(directory: Path, since: float) -> str:
    """What a command that began then, by the time of day, does at this moment, by what it changed in the directory."""

    def is_new(pattern: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_ctime >= since for path in directory.glob(pattern))
        return False

    if is_new("checkpoints/*.orbax-checkpoint-tmp*"):
        return "inside a save"
    if is_new("checkpoints/*.deleting"):
        return "inside a deletion"
    return "between saves" if is_new("metrics.jsonl") else "before the first step"


def _logged(directory: Path) -> int:
    """The last step in `metrics.jsonl`."""
    path = directory / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def _logged_since(directory: Path, since: float) -> int:
    """The last step in `metrics.jsonl` if that was written since then, else 0."""
    path = directory / "metrics.jsonl"
    return _logged(directory) if path.exists() and path.stat().st_ctime >= since else 0


def _saved(directory: Path) -> int:
    """The step of the newest finished checkpoint, 0 for none."""
    folder = directory / "checkpoints"
    found = [COMMITTED.fullmatch(name) for name in os.listdir(folder)] if folder.exists() else []
    return max((int(match[1]) for match in found if match), default=0)


def _lost(directory: Path, saved: int) -> list[str]:
    """A save that `events.jsonl` tells of has begun, and so the one before it is on disk."""
    path = directory / "events.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    told = [event["step"] for event in map(json.loads, lines) if event["event"] == "checkpoint"]
    newest = max(told, default=0)
    return [f"saves up to step {newest} were told, and step {saved} is the newest"] if saved < newest - EVERY else []


def summary(lines: list[dict[str, Any]]) -> str:
    """Kills by layout and by phase, what was lost, and what was wrong."""
    kills = [line for line in lines if "phase" in line]
    runs = [line for line in lines if line.get("ended")]
    wrong = [f"run {line['run']}: {text}" for line in lines for text in line["wrong"]]
    rows = [f"{len(kills):,} kills in {len(runs):,} runs; {len(wrong)} wrong"]
    for name in ("layout", "phase"):
        counts = Counter(line[name] for line in kills)
        rows += [f"  {count:6,}  {what}" for what, count in sorted(counts.items())]
    if noticed := sorted(line["noticed"] for line in kills if len(line["codes"]) > 1):
        rows.append(f"others ended after {noticed[len(noticed) // 2]:.1f} s (median), {noticed[-1]:.1f} s at most")
    if lost := [max(0, line["logged"] - line["saved"]) for line in kills]:
        rows.append(
            f"steps after the last finished save, taken again: {sum(lost) / len(lost):.1f} (mean), {max(lost)} at most"
        )
    return "\n".join([*rows, *wrong])


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    # by hand: one that is removed at Python's end would be removed at that of every child
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Kills until there were so many; 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description="Runs that are killed at random moments and end as undisturbed ones.")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--each", type=int, default=10, help="kills of a run at most")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--log", type=Path, default=Path("build/soak.jsonl"))
    given = parser.parse_args(arguments)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    end, kills, number = time.monotonic() + 60 * given.minutes, 0, given.first
    given.log.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    with _folder() as folder, given.log.open("a") as file:
        soak = Soak(folder, given.seed)
        while kills < given.kills and time.monotonic() < end:
            # more processes take longer to start
            most = max(2, given.each // LAYOUTS[number % len(LAYOUTS)].processes)
            for found in soak.run(number, min(most, given.kills - kills)):
                line = asdict(found) if isinstance(found, Kill) else found
                kills += isinstance(found, Kill)
                lines.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
            number += 1
    print(summary(lines))
    return int(any(line["wrong"] for line in lines))
