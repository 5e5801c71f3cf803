"""Command lines as people type them: the file anywhere, settings that a flag makes useless, help, versions, speed."""

import errno
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxtron.command import check_output
from jaxtron.config import UserError, load, settings, take_file
from jaxtron.curate.config import Curation
from jaxtron.evaluate.request import parse as parse_evaluate
from jaxtron.pipeline.schedules.named import SCHEDULES
from jaxtron.run.configuration import Configuration
from jaxtron.runtime.machine import known_devices
from jaxtron.train.__main__ import main as train
from tests.support.commands import run_main

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "gpt_tiny.yaml"
# what takes longer to import than a refused setting may take to be refused
HEAVY = ("jax", "flax", "optax", "orbax", "grain", "matplotlib", "tokenizers", "pyarrow")
VERBS = ("train", "plan", "evaluate", "generate", "serve", "preprocess", "convert upcycle", "doctor")
VERBS += ("launch --nodes 1 -- python -m jaxtron.train",)


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "line",
    [
        "{file} --data.path a.txt b.txt",
        "--data.path a.txt b.txt {file}",
        "--data.path a.txt b.txt {file} --seed 3",
        "--seed 3 --pipeline.stage_layers 1 2 {file}",
        "--data.path=[a.txt,b.txt] {file}",
        "--checkpoint.resume {file} --data.path a.txt b.txt",
    ],
)
def test_the_file_may_stand_after_a_list(line: str, tmp_path: Path):
    file = write(tmp_path, "seed: 5\n")
    path, rest = take_file(Configuration, line.format(file=file).split())
    assert path == file and str(file) not in rest
    assert len(rest) == len(line.split()) - 1


def test_a_list_keeps_files_of_yaml_where_another_is_the_configuration(tmp_path: Path):
    words = f"{TINY} --data.path a.txt notes.yaml".split()
    assert take_file(Configuration, words) == (TINY, words[1:])
    # a single value is a value
    assert take_file(Configuration, ["--data.path", "notes.yaml"]) == (None, ["--data.path", "notes.yaml"])
    with pytest.raises(UserError, match="which is the CONFIG.yaml, b.yaml or d.yaml"):
        take_file(Configuration, "--data.path a b.yaml --data.train c d.yaml".split())


def test_the_run_may_stand_after_the_texts(tmp_path: Path):
    (tmp_path / "run").mkdir()
    request = parse_evaluate(["--text", "a.txt", "b.txt", str(tmp_path / "run")])
    assert request.run == tmp_path / "run" and [str(path) for path in request.text] == ["a.txt", "b.txt"]


USELESS = [
    ("optimizer: {beta2: 0.99}", "--optimizer.name sgd", "optimizer.beta2 0.99", "optimizer.name sgd"),
    (
        "optimizer: {minimum_learning_rate: 1e-5}",
        "--optimizer.schedule constant",
        "1e-05",
        "optimizer.schedule constant",
    ),
    ("model: {position: rotary, rotary: {base: 5e5}}", "--model.position alibi", "model.rotary.base", "alibi"),
    ("model: {max_positions: 512}", "--model.position none", "model.max_positions 512", "model.position none"),
    ("model: {norm_bias: true}", "--model.norm rms_norm", "model.norm_bias true", "model.norm rms_norm"),
    ("model: {num_kv_heads: 2}", "--model.pattern -", "model.num_kv_heads 2", "model.pattern -"),
    (
        "train: {precision: fp16, loss_scale: {initial: 8}}",
        "--train.precision bf16",
        "initial 8",
        "train.precision bf16",
    ),
    ("mesh: {pipe: 2}\npipeline: {schedule: gpipe}", "--mesh.pipe 1", "pipeline.schedule gpipe", "mesh.pipe 1"),
    ("mesh: {context: 2}\ncontext: {method: all_to_all}", "--mesh.context 1", "context.method", "mesh.context 1"),
    ("data: {split: '9,1,0'}", "--data.format text", "data.split 9,1,0", "data.format text"),
    ("run: {trackers: [wandb], wandb_project: mine}", "--run.trackers []", "run.wandb_project mine", "run.trackers []"),
]


@pytest.mark.parametrize(("text", "flags", "setting", "choice"), USELESS, ids=[row[1] for row in USELESS])
def test_a_files_setting_that_a_flag_makes_useless_is_left_out(text, flags, setting, choice, tmp_path: Path):
    path = write(tmp_path, text + "\n")
    told: list[str] = []
    config = load(Configuration, path, flags.split(), tell=told.append)
    assert any(setting in line and f"{path} line" in line and choice in line for line in told), told
    # without it there is nothing to leave out, and all else is the file's
    assert load(Configuration, write(tmp_path, "", "none.yaml"), flags.split()) == config or len(text.split()) > 3


@pytest.mark.parametrize(("text", "flags", "setting", "choice"), USELESS, ids=[row[1] for row in USELESS])
def test_on_one_layer_it_is_an_error(text, flags, setting, choice, tmp_path: Path):
    """Both in the file, or the useless one on the command line."""
    tree = yaml.safe_load(text)
    name, value = flags.removeprefix("--").split()
    section, _, key = name.partition(".")
    tree.setdefault(section, {})[key] = value if value == "-" else yaml.safe_load(value)
    with pytest.raises(UserError, match="has no effect with"):
        load(Configuration, write(tmp_path, yaml.safe_dump(tree)))


def test_a_file_overrules_the_one_that_it_extends(tmp_path: Path):
    write(tmp_path, "optimizer: {beta2: 0.99}\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\noptimizer: {name: sgd}\n")
    told: list[str] = []
    assert load(Configuration, path, tell=told.append).optimizer.name == "sgd"
    assert len(told) == 1 and "base.yaml line 1" in told[0]
    with pytest.raises(UserError, match="optimizer.beta1 0.8 has no effect with optimizer.name sgd"):
        load(Configuration, path, ["--optimizer.beta1", "0.8"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run.directory", ""], "run.directory needs a value"),
        (["--run.directory="], "run.directory needs a value"),
        (["--devices", ""], "devices needs a value: int >= 1 | none"),
        (["--data.path", "a", ""], "data.path needs a value"),
        (["--data.cache_directory", ""], "data.cache_directory needs a value"),
        (["--optimizer.learning_rate", ".inf"], "optimizer.learning_rate: must be a finite number, got inf"),
        (["--model.norm_epsilon", ".nan"], "model.norm_epsilon: must be"),
        (["--optimizer.learning_rate", "1e308"], "optimizer.learning_rate: must be below 3.4e+38"),
        (["--optimizer.epsilon", "1e-320"], "optimizer.epsilon: must be above 1.2e-38"),
        (["--train.steps", "2147483648"], "train.steps: must be at most 2,147,483,647, got 2147483648"),
        (["--data.fill_in_middle.middle", "many"], "data.fill_in_middle.middle: expected int"),
        (["--run.directory", "a\udcfb"], "--run.directory: 'a\\udcfb' is not UTF-8 text"),
    ],
)
def test_values_that_nothing_can_hold(flags: list[str], message: str):
    with pytest.raises(UserError) as caught:
        load(Configuration, None, flags)
    assert message in str(caught.value)


def test_a_word_that_nobody_can_read_is_shortened():
    ended = run_main(train, [TINY, "--model.pattern", "x" * 5000])
    assert ended.code == 2 and "model.pattern" in ended.err and len(ended.err) < 600


def test_what_may_not_be_read_is_a_line():
    def main(argv: list[str]) -> int:
        # as `Path.is_file` does where a folder may not be entered
        raise PermissionError(errno.EACCES, "Permission denied", *argv)

    ended = run_main(main, ["runs/other/config.yaml"])
    assert (ended.code, ended.err) == (2, "error: runs/other/config.yaml: Permission denied\n")
    # of which nobody knows what it was
    with pytest.raises(PermissionError):
        run_main(main, [])


def test_home_is_expanded_in_every_name_of_a_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/ada")
    names = ("run.directory", "data.path", "data.tokenizer", "data.cache_directory", "data.chat.template")
    names += ("runtime.compilation_cache", "data.train", "data.validation")
    for name in names:
        flags = [f"--{name}", "~/x"] + (["--data.train", "y"] if name == "data.validation" else [])
        value = load(Configuration, None, flags).model_dump()
        for part in name.split("."):
            value = value[part]
        assert value == "/home/ada/x", name
    assert load(Configuration, None, ["--data.path", "0.3", "~/a", "0.7", "b"]).data.path == (
        "0.3",
        "/home/ada/a",
        "0.7",
        "b",
    )
    assert (
        load(Configuration, None, ["--mesh.pipe", "2", "--pipeline.schedule", "~/a.csv"]).pipeline.schedule
        == "/home/ada/a.csv"
    )
    assert load(Curation, None, ["--input", "~/a", "--output", "~/b"]).input == ("/home/ada/a",)
    assert parse_evaluate(["~/run", "--text", "~/t"]).run == Path("/home/ada/run")
    # no such user: the name is taken as it is
    assert load(Configuration, None, ["--run.directory", "~nobody-here/x"]).run.directory == "~nobody-here/x"


def test_nothing_is_usage():
    ended = run_main(train, [])
    assert ended.code == 2 and ended.out.startswith("usage: python -m jaxtron.train CONFIG.yaml") and not ended.err


def test_the_configuration_that_would_run(tmp_path: Path):
    ended = run_main(train, [TINY, "--seed", "7", "--print_config"])
    assert ended.code == 0 and not ended.err
    assert load(Configuration, write(tmp_path, ended.out)) == load(Configuration, TINY, ["--seed", "7"]).resolved()
    # what is left out does not spoil the YAML
    assert yaml.safe_load(run_main(train, [TINY, "--optimizer.name", "sgd", "--print_config"]).out)


def test_help_of_a_section():
    ended = run_main(train, [TINY, "--help", "model.attention"])
    names = {line.split()[0] for line in ended.out.splitlines() if line.startswith("  --")}
    assert names == {f"--{name}" for name in settings(Configuration) if name.startswith("model.attention.")}
    both = run_main(train, ["--help", "mesh", "seed"]).out
    assert "--mesh.tensor" in both and "--seed" in both and "--model" not in both
    assert (
        "no such section or setting; did you mean model.attention" in run_main(train, ["--help", "model.atention"]).err
    )


def test_a_reader_who_leaves_ends_the_command_without_a_word():
    line = f"{sys.executable} -m jaxtron.train --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 141) and done.stderr == "" and done.stdout.startswith("usage: ")


def test_help_of_the_schedule_names_them_all():
    text = " ".join(run_main(train, ["--help", "pipeline.schedule"]).out.split())
    assert all(f"{name}," in text for name in SCHEDULES) and "FILE.csv" in text


def test_the_mesh_is_checked_before_jax_starts_where_the_devices_are_known():
    config = load(Configuration, TINY)
    runtime = config.runtime
    assert known_devices(runtime, None, {}) in (1, None)
    assert known_devices(runtime, None, {"XLA_FLAGS": ""}) is None
    assert known_devices(runtime, None, {"JAX_PLATFORMS": "cpu"}) is None
    assert known_devices(runtime, 8, {"JAX_PLATFORMS": "cuda"}) == 8
    # each of two processes simulates as many; how many a launcher starts is not known here
    two = {"coordinator_address": "node001:12345", "num_processes": 2, "process_id": 0}
    assert known_devices(runtime.model_copy(update=two), 8, {}) == 16
    assert known_devices(runtime, 8, {"OMPI_COMM_WORLD_SIZE": "2"}) is None
    ended = run_main(train, [TINY, "--devices", "8", "--mesh.tensor", "3"])
    assert ended.code == 2 and ended.out == ""
    assert "mesh.tensor 3 needs a multiple of 3 devices, there are 8" in ended.err and "--devices 3" in ended.err


def python(*words: str, compiled: Path) -> float:
    """CPU seconds that a Python process takes, which other work beside it hardly changes.

    Its modules come compiled from this directory, as a user has them from the second start on, wherever tests may not
    write beside their sources.
    """
    left_out = ("XLA_FLAGS", "JAX_PLATFORMS", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment["PYTHONPYCACHEPREFIX"] = str(compiled)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("verb", VERBS)
def test_reading_a_configuration_imports_nothing_heavy(verb: str):
    name, *subcommand = verb.split()
    program = (
        f"import sys, jaxtron.{name}.__main__ as verb\n"
        f"from jaxtron.command import run_command\n"
        f"run_command(verb.main, [*{subcommand}, '{TINY}', '--mesh.tensro', '2'])\n"
        f"print(*(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "error: unknown" in done.stderr
    assert done.stdout.split() == []


@pytest.mark.slow
@pytest.mark.parametrize("line", ["train {} --mesh.tensro 2", "train {} --help", "plan {} --mesh.tensro 2"])
def test_a_refused_setting_is_quick(line: str, tmp_path: Path):
    """At most four times what its libraries take to start; the best of several, on a machine with other work.

    `import pydantic` alone reads next to nothing: its classes are read when one is first named.
    """
    words = ["-m", *f"jaxtron.{line.format(TINY)}".split()]
    libraries = ["-c", "import yaml; from pydantic import BaseModel"]
    # in turn, so that a machine that grows slower slows both; the first pair compiles
    pairs = [[python(*each, compiled=tmp_path) for each in (words, libraries)] for _ in range(6)]
    ours, base = map(min, zip(*pairs, strict=True))
    assert ours < 4 * base, f"{ours:.2f} s against {base:.2f} s"


def test_a_warning_is_a_plain_line(caplog: pytest.LogCaptureFixture):
    """Whatever handlers a library gave the root, none repeats it with the name of a module."""

    def main(_argv: list[str]) -> None:
        logger = logging.getLogger("jaxtron.data.files.reader")
        logger.warning("%s is\nleft out", "a.txt")
        logger.info("a detail")

    ended = run_main(main, [])
    assert (ended.code, ended.err, caplog.text) == (0, "warning: a.txt is left out\n", "")
    # other programs that use Jaxtron's modules decide for themselves
    logging.getLogger("jaxtron.data.files.reader").warning("later")
    assert "later" in caplog.text


def test_a_preset_that_crashes_the_compiler_is_refused():
    flags = ["--runtime.xla_preset", "collective_matmul", "--devices", "8", "--mesh.tensor", "2"]
    ended = run_main(train, [TINY, *flags])
    assert ended.code == 2 and "collective_matmul with mesh.tensor 2 and train.microbatches 1 crashes" in ended.err
    config = load(Configuration, TINY, [*flags, "--train.microbatches", "2", "--train.global_batch", "16"])
    config.check_mesh(config.mesh.shape(8))


def test_an_output_replaces_nothing_but_an_earlier_one(tmp_path: Path):
    for name, content in (
        ("t.txt", "precious"),
        ("config.yaml", "seed: 1\n"),
        ("metrics.jsonl", '{"a": 1}\n{"a": 2}\n'),
    ):
        with pytest.raises(UserError, match="the file is there, and no earlier result"):
            check_output("--json", write(tmp_path, content, name))
    with pytest.raises(UserError, match="no earlier result"):
        check_output("--json", write(tmp_path, "[1, 2]", "list.json"))
    check_output("--json", write(tmp_path, '{"perplexity": 3}', "figures.json"))
    check_output("--json", write(tmp_path, "", "empty.json"))
    check_output("--json", tmp_path / "new.json")


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--train.batch_size", "train.global_batch"),
        ("--batch_size", "train.global_batch"),
        ("--seq_len", "data.sequence_length"),
        ("--num_attention_heads", "model.num_heads"),
        ("--first_k_dense_replace", "model.moe.leading_dense"),
        ("--model.moe_router_topk", "model.moe.top_k"),
        ("--model.moe.routed_scaling_factor", "model.moe.scaling"),
        ("--qk_pos_emb_head_dim", "model.latent.qk_rope_head_dim"),
        ("--mesh.expert_parallel", "mesh.expert"),
    ],
)
def test_other_programs_words_are_understood(flag: str, meant: str):
    assert f"did you mean {meant}?" in run_main(train, [TINY, flag, "4"]).err


def test_a_configuration_by_its_bare_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert "did you mean configs/gpt_tiny.yaml?" in run_main(train, ["gpt_tiny", "--seed", "1"]).err
