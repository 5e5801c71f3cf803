"""A folder as a user has it: small good inputs of every kind, and some that are not what their names say."""

import base64
import dataclasses
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import sentencepiece
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxtron.config import dump, load
from jaxtron.data.megatron.indexed import IndexedWriter
from jaxtron.gpus import GPUS
from jaxtron.plan.machine import machine_named
from jaxtron.plan.memory_use import MemoryUse
from jaxtron.plan.plan import FORMAT
from jaxtron.run.configuration import Configuration

TINY = """\
model: {num_layers: 1, hidden_size: 32, num_heads: 2}
data: {path: text.txt, sequence_length: 32, cache_directory: ../tokens}
train: {global_batch: 8, steps: 2, precision: fp32}
runtime: {launcher: none}
"""
CURATION = """\
input: documents.jsonl
output: curated
steps: [length, quality, language, exact, near, decontaminate]
decontaminate: {tasks: tasks.jsonl}
"""
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
PLAN = {
    "format": FORMAT,
    "memory": {name.name: 10 for name in dataclasses.fields(MemoryUse)} | {"total": 110, "fits": True, "stages": []},
    "communication": [{"key": ["all_gather", ["data"], [4], 2], "payload": 64, "each": 16}],
    "prediction": {"step_seconds": 0.5, "mfu": 0.4},
    "bound": {"step_seconds": 0.4, "mfu": 0.5, "classes": {"products": {"seconds": 0.3}}},
}


def write_workplace(folder: Path) -> None:
    """Fills a folder."""
    for name in ("folder", "folder.csv", "folder.textproto", "folder_with_file", "run"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "folder_with_file" / "file").write_text("mine")
    (folder / "text.txt").write_text("the cat sat on a mat\n" * 200)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("empty.txt", "empty.yaml"):
        (folder / name).write_bytes(b"")
    for name in ("binary.bin", "binary.csv", "binary.textproto"):
        (folder / name).write_bytes(b"\xff\xfe\x00\x01" * 20)
    _write_settings(folder)
    _write_documents(folder)
    _write_tokenizers(folder)
    _write_tokens(folder / "tokens", "u2", 256)
    _write_tokens(folder / "wide", "i4", 100_000)


def _write_settings(folder: Path) -> None:
    for name in ("tiny", "parent"):
        (folder / f"{name}.yaml").write_text(TINY)
    (folder / "run" / "config.yaml").write_text(dump(load(Configuration, folder / "tiny.yaml").resolved()))
    (folder / "child.yaml").write_text("extends: parent.yaml\nseed: 7\n")
    (folder / "no_data.yaml").write_text(TINY.replace("path: text.txt, ", ""))
    (folder / "chat.yaml").write_text(
        TINY.replace("path: text.txt, sequence_length: 32", "path: chat.jsonl, format: chat, sequence_length: 128")
    )
    (folder / "curation.yaml").write_text(CURATION)
    (folder / "exact.yaml").write_text("{input: documents.jsonl, output: curated, steps: [exact]}\n")
    (folder / "mix.blend").write_text("0.7 tokens\n0.3 tokens\n")
    (folder / "table.csv").write_text("stage 0,stage 1\nF0.0,\nF0.1,F0.0 B0.0\nB0.0,F0.1 B0.1\nB0.1,\n")
    (folder / "machine.yaml").write_text(dump(machine_named("h100")))
    (folder / "gpu.textproto").write_text(GPUS["h100"].target_config)
    (folder / "plan.json").write_text(json.dumps(PLAN, indent=1))
    measured = {"tokens_per_second": 512.0, "step_seconds": 0.5, "device": GPUS["h100"].device_kind, "devices": 1}
    steps = [{"step": step, "tokens": 256 * step, "loss": 3.0, **measured} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def _write_documents(folder: Path) -> None:
    texts = [f"document {number}: the cat sat on a mat" for number in range(20)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "documents.jsonl").write_bytes(content)
    (folder / "documents.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    (folder / "documents.jsonl.zst").write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(content))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "documents.parquet", write_page_checksum=True)
    (folder / "tasks.jsonl").write_text('{"text": "what did the cat sit on that day before it ran off again"}\n' * 3)
    talks = [
        [{"role": "user", "content": f"hello {number}"}, {"role": "assistant", "content": f"hello to you, {number}"}]
        for number in range(40)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in talks))
    (folder / "chat.jinja").write_text(TEMPLATE)


def _write_tokenizers(folder: Path) -> None:
    sample = ["to be or not to be that is the question", "the cat sat on a mat and then ran off"] * 5
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_writer=written,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "pieces.model").write_bytes(written.getvalue())
    ranks = [bytes([byte]) for byte in range(256)] + [b" b", b" t", b"to", b" be", b"th", b" th", b" the"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
    (folder / "ranks.tiktoken").write_bytes(b"".join(lines))


def _write_tokens(prefix: Path, dtype: str, most: int) -> None:
    with IndexedWriter(str(prefix), np.dtype(dtype)) as writer:
        for start in range(50):
            writer.add_item((np.arange(20) * 7919 + start) % most)
            writer.end_document()
