"""The command's work: chunks of the input to workers, their ids to the growing output, in the input's order."""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import resource_tracker

from jaxtron import interrupts
from jaxtron.config import UserError
from jaxtron.data.files.reader import few
from jaxtron.preprocess.documents import Damage
from jaxtron.preprocess.encode import Encoded, Encoder, EncodeSettings, encode_in_worker, one_thread, start_worker
from jaxtron.preprocess.inputs import Chunk, InputFile, find_inputs, read_chunks, taken_for
from jaxtron.preprocess.progress import Progress
from jaxtron.preprocess.request import Tokenize
from jaxtron.preprocess.work import PARTS, WorkFolder
from jaxtron.words import either, plural

# what a kill can cost; writing the journal costs milliseconds
SAVE_SECONDS = 2.0
# of most file systems
MOST_NAME_BYTES = 255
# chunks that wait in order behind a slow one, a worker
CHUNKS_AHEAD = 4
QUIET_TRACKER = "ignore:resource_tracker:UserWarning"


@dataclass(frozen=True)
class Outcome:
    """What was made: prefixes of the pairs, documents, tokens, damaged entries left out, bytes of text, seconds."""

    prefixes: list[str]
    documents: int
    tokens: int
    damaged: int
    text_bytes: int
    seconds: float


def output_prefixes(output: str, keys: Iterable[str], *, sentences: bool) -> dict[str, str]:
    """The prefix of each key's pair: as given for one key, as Megatron names them for several."""
    keys = list(keys)
    level = "sentence" if sentences else "document"
    return {key: output if len(keys) == 1 else f"{output}_{key}_{level}" for key in keys}


def tokenize(request: Tokenize, say: Callable[[str], None] = print) -> Outcome:
    """Writes the pairs that a request asks for, or goes on where an earlier process with the same request stopped."""
    start = time.perf_counter()
    files = find_inputs(request.input, request.json_key, say)
    prefixes = output_prefixes(request.output, request.json_key, sentences=request.split_sentences)
    _check(request, files, list(prefixes.values()))
    settings = EncodeSettings(
        tokenizer=request.tokenizer,
        end_of_document=request.end_of_document,
        keys=tuple(request.json_key),
        append_eod=request.append_eod,
        language=(request.language or "en") if request.split_sentences else None,
        skip_damaged=request.skip_damaged,
    )
    encoder = Encoder(settings)
    identity = [
        [(str(file.path.resolve()), file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in files],
        {**asdict(settings), "tokenizer": encoder.tokenizer.fingerprint, "skip_damaged": None},
    ]
    total = sum(file.path.stat().st_size for file in files)
    folder = WorkFolder(request.output, identity, outputs=prefixes, dtype=encoder.dtype, overwrite=request.overwrite)
    with folder as work, _kept(work):
        before = work.journal.text_bytes
        if work.journal.documents:
            say(f"going on after {plural(work.journal.documents, 'document')} that {work.folder} has")
        if work.journal.damaged and not request.skip_damaged:
            raise UserError(f"{work.folder} was begun with --skip-damaged; give it again, or delete that folder")
        for line in taken_for(files):
            say(f"read as   {line}")
        with Progress(total) as progress, _mapping(encoder, settings, request.workers) as encode:
            chunks = () if work.journal.complete else read_chunks(files, work.journal.position, settings.keys)
            _run(work, encode(chunks), request, progress)
        if not work.journal.complete:
            _check_something_is_there(work, request, files)
        work.finish()
    itemsize = encoder.dtype.itemsize
    return Outcome(
        prefixes=list(prefixes.values()),
        documents=work.journal.documents,
        tokens=sum(work.journal.sizes[:: len(PARTS)]) // itemsize,
        damaged=work.journal.damaged,
        text_bytes=work.journal.text_bytes - before,
        seconds=time.perf_counter() - start,
    )


def _check(request: Tokenize, files: Sequence[InputFile], prefixes: Sequence[str]) -> None:
    """UserError for inputs, keys and outputs that do not go together, before any work."""
    texts = [file for file in files if file.taken_for.kind == "text"]
    keys = " ".join(request.json_key)
    if request.json_key != ("text",) and len(texts) == len(files):
        raise UserError(f"--json-key {keys} has no effect on plain text such as {files[0].path}; leave it out")
    if len(request.json_key) > 1 and texts:
        how = "by its content" if texts[0].taken_for.by_content else "by its name"
        raise UserError(
            f"--json-key {keys}: {texts[0].path} is text ({how}), which is one document and has no keys; leave it out, "
            "or give one key"
        )
    for key, prefix in zip(request.json_key, prefixes, strict=True):
        name = os.path.basename(f"{prefix}.idx")
        if len(prefixes) > 1 and (not key or "/" in key or "\0" in key):
            raise UserError(f"--json-key {key!r} cannot be part of a file's name; give it alone, with its own --output")
        if len(os.fsencode(name)) > MOST_NAME_BYTES:
            raise UserError(f"the output {name[:40]}... has a name of more than {MOST_NAME_BYTES} bytes; shorten it")
    for prefix in prefixes:
        for path in (f"{prefix}.bin", f"{prefix}.idx"):
            if os.path.exists(path) and any(os.path.samefile(path, file.path) for file in files):
                raise UserError(f"--output {request.output} would replace its own input {path}; choose another")


def _check_something_is_there(work: WorkFolder, request: Tokenize, files: Sequence[InputFile]) -> None:
    """UserError, and no trace of the work, where a pair would have no token."""
    documents, damaged = work.journal.documents, work.journal.damaged
    sizes = work.journal.sizes[:: len(PARTS)]
    if documents and all(sizes):
        return
    work.discard()
    left_out = f" ({plural(damaged, 'damaged entry', 'damaged entries')} left out)" if damaged else ""
    what = f"no document in --input {few(request.input)}{left_out}"
    if documents and all(file.taken_for.kind == "text" for file in files):
        counted = "the text is" if documents == 1 else f"all {documents:,} texts are"
        what = f"{counted} {'blank' if work.journal.text_bytes else 'empty'} in --input {few(request.input)}{left_out}"
    elif documents:
        empty = request.json_key[sizes.index(0)]
        counted = "the one document" if documents == 1 else f"all {documents:,} documents"
        what = f"no token under the key {empty!r} in {counted} of --input {few(request.input)}"
    raise UserError(f"{what}: nothing is written; give files with text")


def _refusal(damage: Damage) -> UserError:
    """What ends the command at the first damage, and every way on."""
    if not damage.mend:
        return UserError(str(damage))
    by_key = ["set --json-key to the right key"] if damage.by_key else []
    return UserError(f"{damage}; {either([damage.mend, *by_key, 'go on without such entries: --skip-damaged'])}")


def _run(work: WorkFolder, results: Iterator[tuple[Chunk, Encoded]], request: Tokenize, progress: Progress) -> None:
    """Appends every result; what is done is saved now and then, and when anything stops it."""
    saved = -SAVE_SECONDS
    try:
        for chunk, encoded in results:
            if encoded.damages and not request.skip_damaged:
                raise _refusal(encoded.damages[0])
            for damage in encoded.damages:
                progress.message(f"left out: {damage}")
            journal = work.journal
            work.append(
                encoded.keys,
                position=chunk.end,
                consumed=chunk.consumed,
                documents=journal.documents + len(encoded.keys[0].sequences),
                text_bytes=journal.text_bytes + encoded.text_bytes,
                damaged=journal.damaged + encoded.num_damaged,
            )
            progress.update(chunk.consumed, documents=work.journal.documents, text_bytes=encoded.text_bytes)
            if time.monotonic() - saved >= SAVE_SECONDS:
                work.save()
                saved = time.monotonic()
    except (UserError, KeyboardInterrupt):
        work.save()
        raise


@contextmanager
def _kept(work: WorkFolder) -> Iterator[None]:
    """Should a signal end the work inside, it is said that what is done is kept."""

    def say(_word: str) -> None:
        if work.journal.documents:
            interrupts.say(f"what is done is kept in {work.folder}; the same command goes on")

    with interrupts.at_the_end(say):
        yield


Mapping = Callable[[Iterable[Chunk]], Iterator[tuple[Chunk, Encoded]]]


@contextmanager
def _mapping(encoder: Encoder, settings: EncodeSettings, workers: int) -> Iterator[Mapping]:
    """A function from chunks to chunks with their ids, in order; one worker is this process itself."""
    if workers == 1:
        with one_thread():
            yield lambda chunks: ((chunk, encoder.encode(chunk.pieces)) for chunk in chunks)
        return
    # a fresh server forks the workers: it imports once, and has none of this process's threads
    start_tracker()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxtron.preprocess.encode"])
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(settings,))
    try:
        yield lambda chunks: _in_order(executor, chunks, ahead=CHUNKS_AHEAD * workers)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker was killed, perhaps for want of memory; lower --workers and run again: it goes on"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def start_tracker() -> None:
    """Starts the process that removes what killed workers leave, and that would tell the user of it by a warning."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = f"{before},{QUIET_TRACKER}" if before else QUIET_TRACKER
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _in_order(executor: ProcessPoolExecutor, chunks: Iterable[Chunk], *, ahead: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Every chunk's result in order, `ahead` of them under way."""
    waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
    for chunk in chunks:
        # which may start a worker
        with interrupts.spared():
            waiting.append((replace(chunk, pieces=[]), executor.submit(encode_in_worker, chunk.pieces)))
        if len(waiting) > ahead:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()
