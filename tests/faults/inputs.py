"""What is damaged: every kind of file that a user may bring, the command or function that reads it, and its rule."""

import gzip
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from jaxtron.config import settings
from jaxtron.run.configuration import Configuration
from jaxtron.weights.hub import FAMILIES
from jaxtron.weights.peft import write_adapters
from tests.faults import mutations as change
from tests.faults import readers, rules
from tests.hugging_face import fixtures
from tests.sweep.damaged_inputs import INPUTS, PLAN, TOKENIZE, Input
from tests.sweep.workplace import write_workplace
from tests.weights.megatron.models import ARGS, saved_by_ranks, saved_distributed, whole_tensors

HUB = "qwen3"


@dataclass(frozen=True)
class Target:
    """A file of the workplace and who reads it: a line after `jaxtron`, or a function of `readers.py`.

    `kinds` are its damages, beside those of bytes unless `is_text_only`. `named`: fragments one of which the error must
    have. `is_whole`: damage is refused, or gives what the whole file gives.
    """

    name: str
    file: str
    read: tuple[str, ...] | Callable[[], Any]
    kinds: tuple[change.Mutation, ...] = ()
    rule: rules.Rule | None = None
    named: tuple[str, ...] = ("",)
    is_whole: bool = False
    is_text_only: bool = False

    def damaged(self, content: bytes, chance: random.Random) -> bytes:
        """The file with one of its damages."""
        kinds = self.kinds if self.is_text_only else (change.bytes_changed, *self.kinds, *self.kinds)
        return chance.choice(kinds)(content, chance)


@dataclass(frozen=True)
class Flags:
    """Command lines with flags that are drawn: names that are settings, nearly, or not at all, and any values."""

    name: str = "flags"
    names: tuple[str, ...] = field(default_factory=lambda: tuple(settings(Configuration)))

    def words(self, chance: random.Random) -> tuple[tuple[str, ...], str | None]:
        """The line, and a reason for which it must be refused."""
        words: list[str] = ["train", "tiny.yaml"]
        wrong = None
        for _ in range(chance.choice((1, 1, 2, 3))):
            name = chance.choice(self.names)
            if chance.random() < 0.2:
                name = chance.choice((name + "x", name[:-1], name.replace(".", "..", 1), name.upper(), "run", ""))
                if not any(f"{one}.".startswith(f"{name}.") for one in self.names):
                    wrong = f"no setting is called {name!r}"
            value = json.dumps(change.value(chance)) if chance.random() < 0.7 else chance.choice(change.TEXTS)
            words += [f"--{name}={value}"] if chance.random() < 0.2 else [f"--{name}", value]
        return tuple(words), wrong


def gzipped(path: Path) -> str | None:
    """A whole archive of documents."""
    try:
        return _documents(gzip.decompress(path.read_bytes()), path)
    except (OSError, EOFError, ValueError) as error:
        return repr(error)
    # zlib's own
    except Exception as error:
        return repr(error)


def zstandard_frames(path: Path) -> str | None:
    """Whole frames of documents."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True) as frames:
            return _documents(frames.read(1 << 26), path)
    except zstandard.ZstdError as error:
        return repr(error)


def _documents(content: bytes, path: Path) -> str | None:
    inner = path.with_suffix(".inner")
    try:
        inner.write_bytes(content)
        return rules.documents(inner)
    finally:
        inner.unlink()


def pair(path: Path) -> str | None:
    """A pair of token files that agree, of which `path` is one."""
    return rules.token_files(path.with_suffix(""), None)


def ids(path: Path) -> str | None:
    """A pair of token files whose ids are tokens."""
    return rules.token_files(path.with_suffix(""), readers.VOCABULARY)


def weights(path: Path) -> str | None:
    """Tensors of just the names and shapes that the model has."""
    return rules.safetensors(path, {name: array.shape for name, array in fixtures.load(HUB).weights.items()})


def template_changed(content: bytes, chance: random.Random) -> bytes:
    """A chat template with loops that do not end, numbers that do not fit, and what reaches for Python."""
    text = content.decode()
    more = chance.choice(
        (
            "{% for i in range(10**9) %}x{% endfor %}",
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "{{ 'x' * 10**9 }}",
            "{{ [0] * 10**9 }}",
            "{{ 9 ** 9 ** 9 }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.append(1) }}",
            "{{ cycler.__init__.__globals__.os.system('true') }}",
            "{{ '%0999999999d' % 1 }}",
            "{{ '{:>999999999}'.format(1) }}",
            "{{ 'x'.center(999999999) }}",
            "{% set a = namespace(x='x'*999) %}{% for i in range(999) %}{% set a.x = a.x + a.x %}{% endfor %}{{ a.x }}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "{% include 'tiny.yaml' %}",
            "{% import 'os' as os %}",
            "{{ lipsum(n=100000) }}",
            "{{ messages | tojson(indent=999999) }}",
            "{{ raise_exception('\\n' * 9) }}",
            "{{ nothing.at.all }}",
            "{% if",
            "{{ 1 / 0 }}",
            "{{ messages[10**30] }}",
            "{{ (1).__add__ }}",
            "{{ '\\ud800' }}",
        )
    )
    place = chance.choice((0, len(text), text.index("%}") + 2))
    return (text[:place] + more + text[place:]).encode("utf-8", "replace")


def zipped_changed(content: bytes, chance: random.Random) -> bytes:
    """An archive of torch whose members are changed and have the right checksums: pickles, numbers, names."""
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    except (zipfile.BadZipFile, OSError):
        return change.bytes_changed(content, chance)
    pickles = [place for place, (name, _) in enumerate(members) if name.endswith(".pkl")]
    place = chance.choice(pickles) if chance.random() < 0.7 else chance.randrange(len(members))
    name, data = members[place]
    kind = chance.randrange(6)
    if kind == 0:
        members.pop(place)
    elif kind == 1:
        members[place] = (chance.choice(("../x", "/etc/x", "a\\b", name + "x", name.upper())), data)
    else:
        members[place] = (name, change.bytes_changed(data, chance))
    written = BytesIO()
    with zipfile.ZipFile(
        written, "w", chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data)
    return written.getvalue()


def record_changed(content: bytes, chance: random.Random) -> bytes:
    """The record of a checkpoint with another content and the right checksum, as one who means harm would write it."""
    _, body, _ = content.decode().split("\n")
    tree = json.loads(body)
    kind = chance.randrange(4)
    if kind == 0:
        tree["files"][chance.choice(("../../tiny.yaml", "/etc/passwd", "", ".", "a\0b"))] = [1, 2]
    elif kind == 1:
        first = next(iter(tree["arrays"]))
        tree["arrays"][chance.choice((first, "more"))] = chance.choice(
            (["float32", [2**40, 2**40]], ["object", [1]], [1])
        )
    else:
        tree = change.tree_changed(tree, chance)
    body = json.dumps(tree)
    return f"{readers.checksum(body):08x}\n{body}\n".encode()


# by name of a sweep's input: its damages beside those of bytes, and its rule
KNOWN: dict[str, tuple[tuple[change.Mutation, ...], rules.Rule | None]] = {
    "configuration": ((change.yaml_changed, change.yaml_changed, change.text_changed), rules.configuration),
    "parent of a configuration": ((change.yaml_changed, change.text_changed), rules.configuration),
    "curation": ((change.yaml_changed, change.text_changed), None),
    "text": ((change.text_changed,), None),
    "conversations": ((change.lines_changed, change.lines_changed), rules.json_lines),
    "chat template": ((template_changed, template_changed, template_changed), None),
    "documents": ((change.lines_changed, change.lines_changed), rules.documents),
    "gzip": ((), gzipped),
    "zstd": ((), zstandard_frames),
    "parquet": ((), None),
    "curated documents": ((change.lines_changed,), rules.documents),
    "tasks": ((change.lines_changed,), rules.documents),
    "configuration of a run": ((change.yaml_changed, change.text_changed), rules.configuration),
    "tokenizer.json": ((change.json_changed, change.json_changed), rules.any_json),
    "SentencePiece": ((change.protobuf_changed, change.protobuf_changed), None),
    "ranks": ((change.ranks_changed, change.ranks_changed), rules.ranks),
    "index": ((change.index_changed,) * 3, pair),
    "index of a run": ((change.index_changed,) * 3, pair),
    "index that is merged": ((change.index_changed,) * 3, pair),
    "tokens": ((), pair),
    "tokens of a run": ((), pair),
    "blend": ((change.text_changed,), None),
    "schedule": ((change.text_changed,), None),
    "machine": ((change.yaml_changed,), None),
    "plan": ((change.json_changed, change.json_changed), rules.json_object),
    "metrics": ((change.lines_changed, change.lines_changed), None),
    "target": ((change.text_changed,), None),
}


def named(one: Input) -> tuple[str, ...]:
    """What an error must name; one of YAML may name the file that it extends."""
    return (one.file, *one.others) if one.is_named and not one.file.endswith(".yaml") else ("",)


SWEPT = tuple(
    Target(one.name, one.file, one.words, *KNOWN[one.name], named(one)) for one in INPUTS if one.name in KNOWN
)
HUB_FILES, JSON = ("hub",), (change.json_changed, change.json_changed)
LINES = (change.lines_changed, change.lines_changed)
SHOW = ("runs", "show", "run")
CHECKPOINT_FILES = ("jaxtron.json", "manifest.ocdbt", "_METADATA", "_sharding")
TARGETS: tuple[Target | Flags, ...] = (
    *SWEPT,
    Flags(),
    Flags("more flags"),
    Target("tokens that are sampled", "tokens.bin", readers.samples, (), ids, ("tokens",)),
    Target("index that is sampled", "tokens.idx", readers.samples, (change.index_changed,) * 3, ids, ("tokens",)),
    Target("config.json", "hub/config.json", readers.hub, JSON, rules.json_object, HUB_FILES),
    Target(
        "config.json that is planned", "hub/config.json", ("plan", "hub", *PLAN[2:]), JSON, rules.json_object, HUB_FILES
    ),
    Target("index of weights", "hub/model.safetensors.index.json", readers.hub, JSON, rules.json_object, HUB_FILES),
    Target(
        "weights", "hub/a.safetensors", readers.hub, (change.safetensors_changed,) * 3, rules.safetensors, HUB_FILES
    ),
    Target(
        "tokenizer of weights",
        "hub/tokenizer.json",
        (*TOKENIZE, "hub/tokenizer.json"),
        JSON,
        rules.any_json,
        HUB_FILES,
    ),
    Target(
        "adapters",
        "adapters/adapter_model.safetensors",
        readers.adapters,
        (change.safetensors_changed,) * 3,
        rules.safetensors,
        ("adapters",),
    ),
    Target(
        "settings of adapters",
        "adapters/adapter_config.json",
        readers.adapters,
        JSON,
        rules.json_object,
        ("adapters", "alpha"),
    ),
    Target(
        "ranks of Megatron",
        "ranks/iter_0000007/mp_rank_00/model_optim_rng.pt",
        partial(readers.megatron, "ranks"),
        (zipped_changed,) * 2,
        None,
        ("ranks",),
    ),
    Target("index of Megatron", "dist/.metadata", partial(readers.megatron, "dist"), (), None, ("dist",)),
    Target(
        "parts of Megatron",
        "dist/__0_0.distcp",
        partial(readers.megatron, "dist"),
        (),
        None,
        ("dist",),
        True,
    ),
    *(
        Target(f"checkpoint {name}", f"checkpoints/step_00000002/{name}", readers.checkpoint)
        for name in CHECKPOINT_FILES
    ),
    Target(
        "forged record",
        "checkpoints/step_00000002/jaxtron.json",
        partial(readers.checkpoint, is_forged=True),
        (record_changed,),
        None,
        ("checkpoint",),
        False,
        True,
    ),
    Target(
        "forged record that is shown",
        "run/checkpoints/step_00000002/jaxtron.json",
        SHOW,
        (record_changed,),
        None,
        ("run",),
        False,
        True,
    ),
    Target("metrics that go on", "run/metrics.jsonl", readers.metrics, LINES),
    Target("metrics that are shown", "run/metrics.jsonl", SHOW, LINES),
    Target("events", "run/events.jsonl", readers.events, LINES),
    Target("events that are shown", "run/events.jsonl", SHOW, LINES),
    Target("history", "run/history.jsonl", SHOW, LINES),
    Target("configuration that is shown", "run/config.yaml", SHOW, (change.yaml_changed, change.text_changed)),
    Target("body of a completion", "body.json", readers.completion, JSON, rules.json_object, ("",)),
    Target("body of a chat", "chat_body.json", readers.chat, JSON, rules.json_object, ("",)),
)


def write_inputs(folder: Path) -> None:
    """The sweep's workplace, and what only this has: weights, adapters, checkpoints, files of a run, bodies."""
    write_workplace(folder)
    model = fixtures.load(HUB)
    fixtures.write(folder / "hub", model.config, model.weights, ("a", "b"))
    shutil.copy(folder / "tokenizer.json", folder / "hub")
    (folder / "adapters").mkdir()
    drawn = np.random.default_rng(0)
    arrays = {name: drawn.standard_normal(shape, np.float32) for name, shape in readers.SHAPES.items()}
    write_adapters(folder / "adapters", arrays, FAMILIES["llama"].tensors, readers.ADAPTED, readers.LORA, "base")
    saved_by_ranks(folder / "ranks", ARGS, whole_tensors(ARGS))
    saved_distributed(folder / "dist", ARGS, whole_tensors(ARGS))
    readers.save_checkpoints(folder / "checkpoints")
    shutil.copytree(folder / "checkpoints", folder / "run" / "checkpoints")
    shutil.copy(folder / "metrics.jsonl", folder / "run")
    entry = {"time": "2026-11-01T00:00:00+00:00", "step": 0, "changes": {"seed": [1, 2]}, "versions": {"jax": "0.11"}}
    lines = [entry, {**entry, "step": 4}, {"time": entry["time"], "step": 8, "ended": "diverged", "reason": "loss"}]
    (folder / "run" / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [{"step": step, "time": entry["time"], "event": "checkpoint", "position": 8 * step} for step in (2, 4)]
    (folder / "run" / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    sampling = {"temperature": 0.7, "top_p": 0.9, "stop": ["a"], "seed": 1, "logit_bias": {"3": 1.5}, "n": 2}
    (folder / "body.json").write_text(json.dumps({"prompt": "the cat", "max_tokens": 4, **sampling}))
    turns = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}, {"role": "assistant", "content": "hi"}]
    (folder / "chat_body.json").write_text(json.dumps({"messages": turns, "logprobs": True, "top_logprobs": 2}))
