"""`make grid`: generated layouts of every family and kind of layer, each step held to plain differentiation.

A case is a function of the seed, its number and the subjects that there are: mesh, order of its flags, experts' flags,
ZeRO, schedule, microbatches, method of context and what is recomputed. The log has a line a case; with the same file
the cases that it has are not run again, so that the grid can be run in pieces.
"""

import argparse
import contextlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from pydantic import ValidationError

from jaxtron.config import UserError
from jaxtron.models.decoder.kinds import KINDS
from jaxtron.pipeline.schedules.named import SCHEDULES
from jaxtron.sharding.folding import FLAGS
from tests.conformance.runs import assert_same, reference, step
from tests.conformance.subjects import SUBJECTS, Layout, Subject
from tests.support.toy_kind import WAVE, wave_known

CASES, SEED = 200, 20
# sizes of meshes, the largest most often
DEVICES = (2, 4, 8, 8, 8)
METHODS = ("ring", "all_gather", "all_to_all", "hierarchical")
PIPED = 0.4
MOST_TRIES = 1000


@dataclass(frozen=True)
class Case:
    """A generated layout of a subject; `tries` is how many were drawn before one that fits."""

    number: int
    subject: Subject
    layout: Layout
    changes: Mapping[str, Any]
    tries: int

    def __str__(self) -> str:
        words = [
            str(self.subject),
            str(self.layout),
            *(f"{name} {value}" for name, value in self.layout.context.items()),
        ]
        return " ".join([*words, *(f"{name} {value}" for name, value in self.changes.items())])

    def check(self) -> None:
        """An `AssertionError` unless loss, reports and gradients are those of one device."""
        assert_same(step(self.subject, self.layout, **self.changes), reference(self.subject), self.subject.tolerance)


def generated(seed: int, number: int) -> Case:
    """The case of a number: subjects go round, all else is drawn until it fits."""
    chance = random.Random(f"{seed}/{number}")
    subjects = random.Random(seed).sample(SUBJECTS, len(SUBJECTS))
    subject = subjects[number % len(subjects)]
    # layouts of stages are refused more often, and would be rare
    is_piped = chance.random() < PIPED
    for tries in range(MOST_TRIES):
        layout, changes = _layout(subject, chance), _changes(subject, chance)
        if (layout.num_stages > 1) == is_piped and subject.fits(layout) and _is_accepted(subject, layout, changes):
            return Case(number, subject, layout, changes, tries)
    raise AssertionError(f"no layout of {MOST_TRIES} fits {subject}")


def _layout(subject: Subject, chance: random.Random) -> Layout:
    devices, mesh = chance.choice(DEVICES), dict.fromkeys(FLAGS, 1)
    for _ in range(devices.bit_length() - 1):
        mesh[chance.choice(FLAGS)] *= 2
    sizes: dict[str, Any] = {flag: size for flag, size in mesh.items() if size > 1}
    in_stage = devices // mesh["pipe"]
    if "E" in subject.settings.get("pattern", ""):
        expert = chance.choice([size for size in (1, 2, 4) if size <= in_stage])
        width = chance.choice([size for size in (1, 2) if size * expert <= in_stage])
        sizes |= {flag: size for flag, size in (("expert", expert), ("expert_tensor", width)) if size > 1}
    if chance.random() < 0.25:
        sizes["order"] = tuple(chance.sample(FLAGS, len(FLAGS)))
    schedule, parts, microbatches = "1f1b", 1, chance.choice((1, 2, 4))
    if mesh["pipe"] > 1:
        schedule, microbatches = chance.choice(list(SCHEDULES)), chance.choice((2, 4, 8))
        parts = chance.choice((1, 2, 2, 4))
    context: dict[str, Any] = {}
    if mesh["context"] > 1:
        context = {"method": chance.choice(METHODS)}
        context |= {"inner": 2} if context["method"] == "hierarchical" else {}
    zero = chance.choice(("none", "optimizer", "parameters"))
    return Layout(sizes, microbatches, zero, schedule, parts, context)


def _changes(subject: Subject, chance: random.Random) -> dict[str, Any]:
    """What is recomputed: nothing, a level, or some of the regions that its kinds have."""
    if subject.family != "decoder":
        return {}
    kinds = [KINDS[symbol] for symbol in subject.settings["pattern"] if symbol not in "()"]
    regions = sorted({region for kind in kinds if kind is not WAVE for region in kind.regions})
    levels = ["none", "full", *(["selective", "all_but_cores"] if any(kind.selective for kind in kinds) else [])]
    some = tuple(region for region in regions if chance.random() < 0.5)
    return {"recompute": chance.choice([*levels, *([some] if some else [])])}


def _is_accepted(subject: Subject, layout: Layout, changes: Mapping[str, Any]) -> bool:
    """Whether a user could run it: what a configuration refuses is no case."""
    try:
        config = subject.configuration(layout, **changes)
        config.check_mesh(config.mesh.shape(_devices(layout)))
        # of a model without attention nothing of it is looked at there
        config.context.groups(layout.mesh.get("context", 1))
    # a `UserError` of a validator comes as pydantic's
    except (UserError, ValidationError):
        return False
    return True


def _devices(layout: Layout) -> int:
    return math.prod(layout.mesh.get(flag, 1) for flag in FLAGS)


def outcome_of(case: Case) -> dict[str, Any]:
    """The case's line of the log."""
    begun = time.monotonic()
    line: dict[str, Any] = {"case": case.number, "what": str(case), "tries": case.tries}
    try:
        case.check()
        line["outcome"] = "equal"
    except AssertionError as error:
        line["outcome"] = "differs: " + " ".join(str(error).split())[:400]
    except Exception as error:
        line["outcome"] = f"failed: {type(error).__name__}: " + " ".join(str(error).split())[:400]
    # programs of hundreds of layouts are gigabytes
    jax.clear_caches()
    return line | {"seconds": round(time.monotonic() - begun, 1)}


def finished(log: Path) -> dict[int, dict[str, Any]]:
    """The lines of a log by the numbers of their cases."""
    lines = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
    return {line["case"]: line for line in lines}


def run(log: Path, *, seed: int, cases: int, minutes: float) -> Iterator[dict[str, Any]]:
    """Runs the cases that the log does not have, and writes a line of each, until the time is over."""
    end, known = time.monotonic() + 60 * minutes, finished(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    known_kinds = contextlib.nullcontext() if WAVE.symbol in KINDS else wave_known()
    with known_kinds, log.open("a") as file:
        for number in range(cases):
            if time.monotonic() >= end:
                return
            case = generated(seed, number)
            # with a new family the same number is another case
            if known.get(number, {}).get("what") == str(case):
                continue
            line = outcome_of(case)
            file.write(json.dumps(line) + "\n")
            file.flush()
            yield line


def main(arguments: list[str]) -> int:
    """Runs the grid; 1 where a case differs or fails."""
    parser = argparse.ArgumentParser(description="Generated layouts, each held to one device.")
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so many")
    parser.add_argument("--log", type=Path, default=Path("build/grid.jsonl"))
    given = parser.parse_args(arguments)
    for line in run(given.log, seed=given.seed, cases=given.cases, minutes=given.minutes):
        print(f"{line['case']:4} {line['seconds']:6.1f} s  {line['outcome']}  {line['what']}", flush=True)
    lines = [line for number, line in finished(given.log).items() if number < given.cases]
    counts = Counter(line["outcome"].partition(":")[0] for line in lines)
    print(f"{len(lines)} of {given.cases} cases (seed {given.seed}): {dict(counts)}")
    return int(set(counts) != {"equal"})
