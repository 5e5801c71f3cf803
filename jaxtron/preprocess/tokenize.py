"""The command's work: chunks of the input to workers, their ids to the growing output, in the input's order."""

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jaxtron.config import UserError
from jaxtron.preprocess.encode import Encoded, Encoder, EncodeSettings, encode_in_worker, one_thread, start_worker
from jaxtron.preprocess.inputs import Chunk, find_inputs, kind_of, read_chunks
from jaxtron.preprocess.progress import Progress
from jaxtron.preprocess.request import Tokenize
from jaxtron.preprocess.work import WorkFolder

# what a kill can cost; writing the journal costs milliseconds
SAVE_SECONDS = 2.0
# chunks that wait in order behind a slow one, a worker
CHUNKS_AHEAD = 4


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
    files = find_inputs(request.input)
    if request.json_key != ("text",) and all(kind_of(path) == "text" for path in files):
        keys = " ".join(request.json_key)
        raise UserError(f"--json-key {keys} has no effect on plain text such as {files[0]}; leave it out")
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
        [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in map(Path.resolve, files)],
        {**asdict(settings), "tokenizer": encoder.tokenizer.fingerprint, "skip_damaged": None},
    ]
    prefixes = output_prefixes(request.output, request.json_key, sentences=request.split_sentences)
    total = sum(path.stat().st_size for path in files)
    with WorkFolder(request.output, identity, outputs=prefixes, dtype=encoder.dtype) as work:
        before = work.journal.text_bytes
        if work.journal.documents:
            say(f"going on after {work.journal.documents:,} documents that {work.folder} has")
        if work.journal.damaged and not request.skip_damaged:
            raise UserError(f"{work.folder} was begun with --skip-damaged; give it again, or delete that folder")
        with Progress(total) as progress, _mapping(encoder, settings, request.workers) as encode:
            chunks = () if work.journal.complete else read_chunks(files, work.journal.position, settings.keys)
            _run(work, encode(chunks), request, progress)
        work.finish()
    itemsize = encoder.dtype.itemsize
    return Outcome(
        prefixes=list(prefixes.values()),
        documents=work.journal.documents,
        tokens=sum(work.journal.sizes[::3]) // itemsize,
        damaged=work.journal.damaged,
        text_bytes=work.journal.text_bytes - before,
        seconds=time.perf_counter() - start,
    )


def _run(work: WorkFolder, results: Iterator[tuple[Chunk, Encoded]], request: Tokenize, progress: Progress) -> None:
    """Appends every result; what is done is saved now and then, and when anything stops it."""
    saved = -SAVE_SECONDS
    try:
        for chunk, encoded in results:
            if encoded.damages and not request.skip_damaged:
                raise UserError(
                    f"{encoded.damages[0]}; mend it, set --json-key to the right key, or go on without such entries: "
                    "--skip-damaged"
                )
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


Mapping = Callable[[Iterable[Chunk]], Iterator[tuple[Chunk, Encoded]]]


@contextmanager
def _mapping(encoder: Encoder, settings: EncodeSettings, workers: int) -> Iterator[Mapping]:
    """A function from chunks to chunks with their ids, in order; one worker is this process itself."""
    if workers == 1:
        with one_thread():
            yield lambda chunks: ((chunk, encoder.encode(chunk.pieces)) for chunk in chunks)
        return
    # a fresh server forks the workers: it imports once, and has none of this process's threads
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


def _in_order(executor: ProcessPoolExecutor, chunks: Iterable[Chunk], *, ahead: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Every chunk's result in order, `ahead` of them under way."""
    waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
    for chunk in chunks:
        waiting.append((replace(chunk, pieces=[]), executor.submit(encode_in_worker, chunk.pieces)))
        if len(waiting) > ahead:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()
