"""`python -m jaxtron.plan` as a user types it."""

import re
from json import dumps
from pathlib import Path

import pytest

from jaxtron.config import UserError, load
from jaxtron.gpus import GPUS
from jaxtron.pipeline.schedules.named import make_schedule
from jaxtron.pipeline.schedules.table_file import read_csv
from jaxtron.plan.__main__ import main
from jaxtron.plan.formula.activations import layer_bytes
from jaxtron.plan.request import parse
from jaxtron.run.configuration import Configuration
from jaxtron.words import readable_bytes
from tests.support.commands import run_main

# the devices that the tests run on
PIPE = "--devices 8 --mesh.pipe 4 --mesh.tensor 2 --train.microbatches 8 --model.num_layers 8 --model.hidden_size 64 "
PIPE += "--model.num_heads 4"


def plan(arguments: str) -> tuple[int, str, str]:
    ended = run_main(main, arguments.split())
    return ended.code, ended.out, ended.err


def test_a_schedule_drawn_and_written(tmp_path: Path):
    csv, png = tmp_path / "table.csv", tmp_path / "table.png"
    code, out, err = plan(f"--schedule {PIPE} --pipeline.schedule zero_bubble --csv {csv} --png={png}")
    assert (code, err) == (0, "")
    assert out.startswith("mesh: pipe 4 x tensor 2\nzero_bubble: 4 stages, 8 microbatches\n")
    assert "2 in each of 4 parts" in out and f"written   {csv}\nwritten   {png}\n" in out
    schedule = make_schedule("zero_bubble", 4, 8)
    assert read_csv(csv).table == schedule.table and png.read_bytes().startswith(b"\x89PNG")
    code, again, _ = plan(f"--schedule {PIPE} --pipeline.schedule {csv}")
    assert code == 0 and again.splitlines()[2:15] == out.splitlines()[2:15]


def test_bytes_of_a_stage_are_those_of_its_layers():
    # uneven stages: a chunk takes the rows of the longest
    code, out, _ = plan(f"--schedule {PIPE} --pipeline.stage_layers 1 2 3 2")
    # the mesh is filled with one replica; a microbatch is four rows of the batch of 32
    (one,) = layer_bytes(configuration(PIPE), {"pipe": 4, "data": 1, "fsdp": 1, "context": 1, "tensor": 2})
    assert f"one keeps {readable_bytes(one)} of a microbatch" in out
    rows = re.findall(r"^ +(\d) +\d+ +(\d+) +([\d.]+ \w+)$", out, re.MULTILINE)
    assert code == 0 and "1, 2, 3, 2 in the parts" in out
    assert [(int(stage), int(count)) for stage, count, _ in rows] == [(0, 4), (1, 3), (2, 2), (3, 1)]
    assert [text for *_, text in rows] == [readable_bytes(count * 3 * one) for count in (4, 3, 2, 1)]


def configuration(flags: str) -> Configuration:
    return load(Configuration, None, flags.split()).resolved()


def test_bytes_of_a_layer_shrink_with_what_splits_them():
    # no masks and no statistics of whole sequences: what is left is split by tensor
    flags = "--model.hidden_size 64 --model.num_heads 4 --train.microbatches 8 --model.recompute"
    whole = {"pipe": 2, "data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    full, none = (layer_bytes(configuration(f"{flags} {level}"), whole)[0] for level in ("full", "none"))
    # all of its input in bf16: batch 4, sequence, width
    assert full == 4 * configuration(flags + " full").data.sequence_length * 64 * 2 < none / 8
    config = configuration(flags + " full")
    assert layer_bytes(config, whole | {"tensor": 4}) == (full // 4,)
    assert layer_bytes(config, whole | {"data": 2, "fsdp": 2}) == (full // 4,)


def test_without_devices_axes_left_open_are_one():
    code, out, _ = plan("--schedule --mesh.pipe 4 --mesh.tensor 8 --model.num_heads 16 --model.hidden_size 64")
    assert code == 0 and out.startswith("mesh: pipe 4 x tensor 8\n1f1b: 4 stages, 1 microbatch\n")
    assert "3 in each of 4 parts" in out


def test_layout_counts_layers_and_not_empty_rows():
    code, out, err = plan(f"--layout {PIPE}")
    assert (code, err) == (0, "") and "empty" not in out
    total = re.search(r"^([\d,]+) parameters; ", out, re.MULTILINE)[1]
    code, uneven, _ = plan(f"--layout {PIPE} --pipeline.stage_layers 1 2 3 2")
    assert code == 0 and f"\n{total} parameters; " in uneven
    assert "12 rows of layers hold 8: the others are empty" in uneven


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--mesh.tensor 2",
            "say for which GPU: --gpu a100, h100, h200, b200, gb200 or a target's file; or --layout, --schedule",
        ),
        ("--layout --schedule", "--layout and --schedule: one at a time"),
        ("--layout --png a.png", "--png a.png has no effect with --layout, only with a plan or --schedule"),
        ("--layout --gpu h100", "--gpu h100 has no effect with --layout, only with a plan or --search"),
        ("--schedule --csv", "--csv: expected one argument"),
        ("--gpu h1000 --nodes 1", "unknown GPU 'h1000': known are a100, h100, h200, b200, gb200, or a target's file"),
        ("--gpu mine.textproto", "cannot read the target mine.textproto: No such file or directory"),
        ("--gpu h100 --nodes 0", "--nodes: '0' must be a whole number above 0"),
        ("--gpu h100 --nodes x", "--nodes: 'x' must be a whole number above 0"),
        ("--gpu h100 --tokens nan", "--tokens: 'nan' must be a number above 0, such as 300e9"),
        ("--gpu h100 --csv a.csv", "--csv a.csv has no effect in a plan, only with --schedule"),
        ("--gppu h100", "unknown flag --gppu; did you mean --gpu?"),
        ("--schedule --mesh.pip 2", "unknown flag --mesh.pip; did you mean --mesh.pipe?"),
        ("--gpu h100 --nodes 1 --gpus 8", "--nodes 1 and --gpus 8: give one of them"),
        ("--gpu h100 --gpus 12 --mesh.tensor 4 --train.global_batch 12", "--gpus 12 do not fill nodes of 8"),
        (
            "--gpu h100 --gpus 8 --mesh.tensor 3 --mesh.data 1",
            "there are 8; change the mesh, set one axis to -1, or plan for them: --gpus 3",
        ),
        ("--gpu h100 --gpus 8 --mesh.tensor 8", "is not a multiple of"),
        ("--gpu h100 --compare /dev/null", "/dev/null is no plan"),
        ("--gpu h100 --compare none.json", "cannot read the plan none.json: No such file or directory"),
        ("--gpu h100 --machine none.yaml", "none.yaml does not exist"),
        ("--schedule --devices 8 --mesh.pipe 2 --pipeline.schedule gpip", "did you mean gpipe?"),
        (
            "--schedule --devices 8 --mesh.pipe 2 --csv /dev/null/a.csv",
            "--csv /dev/null/a.csv: /dev/null is no folder",
        ),
        (
            "--schedule --devices 8 --mesh.pipe 2 --png /dev/null/a.png",
            "--png /dev/null/a.png: /dev/null is no folder",
        ),
    ],
)
def test_bad_input_is_one_line(arguments: str, message: str):
    code, out, err = plan(arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


OWN = {"gpu", "nodes", "gpus", "gpus-per-node", "tokens", "html", "json", "machine"}
VALUES = dict.fromkeys(("nodes", "gpus", "gpus-per-node", "tokens", "top"), "1") | {"html": "a.html"}
MODES = {
    "": {*OWN, "hlo", "compare", "calibrate", "png", "layout", "schedule", "search"},
    "--layout": set(),
    "--schedule": {"png", "csv"},
    "--search": {*OWN, "top"},
}


@pytest.mark.parametrize("mode", MODES)
def test_help_shows_the_flags_that_the_mode_takes_and_no_others(mode: str):
    code, out, err = plan(f"{mode} --help")
    assert (code, err) == (0, "") and out.startswith(f"usage: {' '.join(['python -m jaxtron.plan', mode]).strip()} [")
    assert set(re.findall(r"^  --([a-z-]+) ", out[: out.index("\nsettings\n")], re.MULTILINE)) == MODES[mode]
    assert "  --mesh.tensor " in out
    # and it takes what it shows, refuses the rest
    for flag in MODES[""] | MODES["--schedule"] | MODES["--search"]:
        if flag in ("layout", "schedule", "search"):
            continue
        line = f"{mode} --{flag} {VALUES.get(flag, 'a')}".split()
        if flag in MODES[mode]:
            assert parse(line).kind == (mode.removeprefix("--") or "plan")
        else:
            with pytest.raises(UserError, match=f"--{flag} .* has no effect"):
                parse(line)


def test_help_of_a_section_is_that_section():
    code, out, err = plan("--search --help mesh")
    assert (code, err) == (0, "") and set(re.findall(r"--(\w+)\.", out)) == {"mesh"} and "--gpu" not in out


def test_without_a_word_it_says_how_it_is_used():
    code, out, err = plan("")
    assert (code, err) == (2, "") and out.startswith("usage: python -m jaxtron.plan CONFIG.yaml --gpu NAME")
    assert all(f"{mode} " in out for mode in MODES) and len(out.splitlines()) < 12


SMALL = (
    "--model.num_layers 2 --model.hidden_size 64 --model.num_heads 2 --data.sequence_length 64 --train.precision bf16"
)


@pytest.mark.slow
def test_a_plan_of_a_cluster_that_holds_more_replicas(tmp_path: Path):
    json, hlo = tmp_path / "plan.json", tmp_path / "step.hlo"
    command = f"--gpu h100 --nodes 2 --mesh.data 1 --mesh.tensor 2 --train.global_batch 4 {SMALL} --tokens 1e9"
    code, out, err = plan(f"{command} --json {json} --hlo {hlo}")
    assert (code, err) == (0, "")
    assert out.startswith("16 GPUs hold 8 of this mesh: --mesh.data 8 --train.global_batch 32\n")
    assert "on 16 h100 (2 nodes)" in out and "\nmesh: data 8 x tensor 2; 1 microbatch of 4 x 64 tokens\n" in out
    assert hlo.read_text().startswith("HloModule") and out.endswith(f"written   {json}\nwritten   {hlo}\n")
    code, out, err = plan(f"{command} --compare {json}")
    assert (code, err) == (0, "") and out.endswith("\nchanges: none\n")


@pytest.mark.slow
def test_a_plan_calibrated_by_a_run(tmp_path: Path):
    # 32 sequences of 64 tokens in half a second
    run = {"step_seconds": 0.5, "tokens_per_second": 4096.0, "device": GPUS["h100"].device_kind, "devices": 1}
    records = [{"step": step, "loss": 1.0, **run} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{dumps(record)}\n" for record in records))
    code, out, err = plan(f"--gpu h100 --gpus 1 {SMALL} --calibrate {tmp_path / 'metrics.jsonl'}")
    assert (code, err) == (0, "")
    assert "prediction: 0.5 s a step" in out or "prediction: 500 ms a step" in out
    code, again, _ = plan(f"--gpu h100 --gpus 1 {SMALL} --machine {tmp_path / 'machine.yaml'}")
    assert code == 0 and re.search(r"prediction:.*", again)[0] == re.search(r"prediction:.*", out)[0]


def test_partition_of_one_stage_is_whole():
    config = configuration("--model.num_layers 1 --model.pattern *-|*-*-")
    assert [config.stage_plan(stages).partitions[0].lengths for stages in (1, 2)] == [(3,), (1, 2)]
