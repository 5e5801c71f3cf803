"""Nothing that a checkpoint, a configuration or a data set says is run, and no name in one leads out of its folder."""

import ast
import os
import pickle
import re
import zlib
from pathlib import Path

import numpy as np
import pytest

from jaxtron.checkpoint import record
from jaxtron.checkpoint.record import RECORD_FILE, DamageError
from jaxtron.config import UserError
from jaxtron.data.chat.template import Conversation, JinjaTemplate, Message
from jaxtron.train.__main__ import main as train
from jaxtron.weights.files import INDEX, open_files
from jaxtron.weights.megatron.torch_file import open_torch_file
from tests.support.commands import run_main

ROOT = Path(__file__).parents[2]
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(ROOT.glob("jaxtron/**/*.py"))}
# readers of formats that can hold code, and what unpacks files where an archive says
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch", "tarfile", "runpy", "code"}
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "extractall", "unpack_archive"}
# `exec("")` runs nothing: its effect on signals is what is wanted
EMPTY = {Path("jaxtron/interrupts.py"): 'exec("")'}
# a module by a name that is no constant: verbs of our own, packages that are optional by name, a user's own family
BY_NAME = {
    "jaxtron/__init__.py",
    "jaxtron/__main__.py",
    "jaxtron/command.py",
    "jaxtron/curate/records.py",
    "jaxtron/data/files/decompress.py",
    "jaxtron/data/tokenizer_models.py",
    "jaxtron/models/families.py",
    "jaxtron/plan/compiled/deviceless.py",
    "jaxtron/preprocess/inputs.py",
    "jaxtron/train/trackers.py",
    "jaxtron/weights/cache.py",
}


def calls(tree: ast.AST) -> list[tuple[ast.Call, str]]:
    """Every call with the last word of what is called."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(node, getattr(node.func, "attr", getattr(node.func, "id", ""))) for node in found]


def test_no_module_reads_what_can_hold_code():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.partition(".")[0] for name in names} & MODULES, f"{path}:{getattr(node, 'lineno', 0)}"


def test_no_call_runs_text():
    for path, tree in TREES.items():
        for node, name in calls(tree):
            where, text = f"{path}:{node.lineno} calls {name}", ast.unparse(node)
            is_of_ours = isinstance(node.func, ast.Name) or ast.unparse(node.func).startswith(("os.", "builtins."))
            # `re.compile` and JAX's `.lower().compile()` are others
            if name in CALLS and (is_of_ours or name in ("extractall", "unpack_archive")):
                assert ast.unparse(ast.parse(EMPTY.get(path, "0"))) == text, where
            arguments = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert arguments.get("shell", "False") == "False", where
            assert arguments.get("allow_pickle", "False") == "False", where
            assert arguments.get("trust_remote_code", "False") == "False", where
            if text.startswith("yaml.load("):
                assert re.search(r"(Loader=)?(Fast)?YamlLoader\)$", text), where
            if name == "import_module" and not isinstance(node.args[0], ast.Constant):
                assert str(path) in BY_NAME, where


class Trap:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """Where a trap that springs leaves a folder."""
    path = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(path)))
    assert path.is_dir()
    path.rmdir()
    return path


def test_pickles_are_not_opened(trap: Path, tmp_path: Path):
    content = pickle.dumps({"model": Trap(trap), "args": Trap(trap)})
    for name in ("pytorch_model.bin", "model.safetensors", "model.pt"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / name).write_bytes(content)
        with pytest.raises(UserError), open_files(folder):
            pass
    (tmp_path / "rank.pt").write_bytes(content)
    with pytest.raises(UserError):
        open_torch_file(tmp_path / "rank.pt")
    array = np.empty(1, object)
    array[0] = Trap(trap)
    np.save(tmp_path / "lengths.npy", array)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "lengths.npy")
    assert not trap.exists()


def test_a_configuration_chooses_no_file_of_code(tmp_path: Path, monkeypatch):
    """`model.family` names a package that can be imported; no path, and none that a folder of a run brings along."""
    run = tmp_path / "run"
    (run / "evil").mkdir(parents=True)
    (run / "evil" / "family.py").write_text("raise SystemError('was run')")
    monkeypatch.chdir(tmp_path)
    for name in ("run/evil", "./run/evil", "run/evil/family.py", "file:run/evil", "..run.evil", "/run/evil"):
        ended = run_main(train, ["--model.family", name])
        assert ended.code == 2 and ended.err.startswith("error: ") and "was run" not in ended.err, ended
    # tags of YAML make no objects
    (tmp_path / "a.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path}/sprung']\n")
    ended = run_main(train, ["a.yaml"])
    assert ended.code == 2 and "not valid YAML" in ended.err and not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["../model", "/etc/model", "a/model", "..\\model", "model\0", "a" * 300])
def test_names_in_an_index_do_not_lead_out(name: str, tmp_path: Path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    written = f"{name}.safetensors".replace("\\", "\\\\").replace("\0", "\\u0000")
    (tmp_path / "inside" / INDEX).write_text(f'{{"weight_map": {{"a": "{written}"}}}}')
    with pytest.raises(UserError, match="that is no name of a .safetensors file in"):
        with open_files(tmp_path / "inside"):
            pass


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../secret", "", ".", "./a", "a\0"])
def test_names_in_a_checkpoint_do_not_lead_out(path: str, tmp_path: Path):
    (tmp_path / "step").mkdir()
    (tmp_path / "secret").write_bytes(b"abc")
    record.write(record.CheckpointRecord(1, {}, {}, {path: (3, zlib.crc32(b"abc"))}), tmp_path / "step")
    with pytest.raises(DamageError, match=f"{RECORD_FILE} is not what a checkpoint says"):
        record.read(tmp_path / "step")


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": True},
        {"extra": []},
        {"arrays": {"a": 3}},
        {"arrays": {"a": ["float32", [-1]]}},
        {"arrays": {"a": [1, [1]]}},
        {"files": {"a": [1]}},
        {"files": ["a"]},
        {"files": {"a": [1, "2"]}},
    ],
    ids=str,
)
def test_a_record_of_another_form_is_damage(change: dict, tmp_path: Path):
    written = {"step": 1, "extra": {}, "arrays": {"a": ["float32", [2]]}, "files": {"a": [1, 2]}} | change
    body = str(written).replace("'", '"').replace("True", "true")
    (tmp_path / RECORD_FILE).write_text(f"{zlib.crc32(body.encode()):08x}\n{body}\n")
    with pytest.raises(DamageError, match="is not what a checkpoint says"):
        record.read(tmp_path)


TALK = Conversation([Message("user", "hello"), Message("assistant", "hi")])
ESCAPES = (
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ (messages | attr('__class__')).__subclasses__() }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ messages | map(attribute='__class__') | first }}",
    "{% include '/etc/passwd' %}",
    "{% from 'os' import system %}",
    "{{ messages.append(1) }}",
    "{{ self.__init__ }}",
)
TOO_MUCH = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "turns of its loops",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}": "turns of its loops",
    "{{ 'x' * 10**9 }}": "characters",
    "{{ [0] * 10**9 }}": "characters",
    "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}": "characters",
    "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "characters",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}": "items",
    "{% set x %}{% for i in range(999) %}{{ 'x' * 1000000 }}{% endfor %}{% endset %}": "writes more than",
    "{{ 'x' | replace('x', 'y' * 1000000) | replace('y', 'z' * 1000000) }}": "characters",
    "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}": "characters",
    "{{ (['x' * 1000000] * 1000) | join }}": "characters",
    "{{ 'x'.center(10**9) }}": "columns",
    "{{ 'x' | center(10**9) }}": "columns",
    "{{ [1] | batch(10**9, 'x') | list }}": "columns",
    "{{ messages | tojson(indent=10**9) }}": "columns",
    "{{ '%0999999999d' % 1 }}": "width",
    "{{ '%*d' % (10**9, 1) }}": "width",
    "{{ '{:>999999999}'.format(1) }}": "width",
    "{{ '{:{}}'.format(1, 10**9) }}": "width",
    "{{ '%999999999d' | format(1) }}": "width",
    "{{ messages[0].content | int ** 9 }}{{ (2**60000) * (2**60000) }}": "bits",
    "{{ 2 ** (10 ** 9) }}": "bits",
}


@pytest.mark.parametrize("source", ESCAPES)
def test_a_chat_template_reaches_nothing_of_python(source: str):
    with pytest.raises(UserError, match="^the chat template (cannot write it|writes what has no value)"):
        JinjaTemplate(source).prompt(TALK)


@pytest.mark.parametrize("source", TOO_MUCH)
def test_a_chat_template_has_bounds(source: str):
    with pytest.raises(UserError, match=f"^the chat template cannot write it: .*{TOO_MUCH[source]}"):
        JinjaTemplate(source).prompt(TALK)


def test_bounds_are_a_rendering_s_and_ordinary_templates_have_room():
    source = (
        "{% for m in messages %}{{ loop.length }}{{ loop.last }} {{ '%5.1f' % 2 }}{{ '{:>4}'.format('a') }}{% endfor %}"
    )
    text = JinjaTemplate(source).prompt(TALK)
    assert text == "2False   2.0   a2True   2.0   a"
    long = Conversation([Message("user", "x" * 10_000)] * 300)
    template = JinjaTemplate(
        "{% for m in messages %}{{ m.content ~ '\\n' }}{% endfor %}{% for i in range(90000) %}{% endfor %}"
    )
    for _ in range(15):
        assert len(template.prompt(long)) == 300 * 10_001
