"""Files and figures that a plan is asked for: what is wrong with them is told before anything is compiled."""

import json
from pathlib import Path

import pytest

from jaxtron.config import UserError
from jaxtron.gpus import GPUS, gpu_named
from jaxtron.plan.__main__ import main
from jaxtron.plan.compare import read_plan
from jaxtron.plan.plan import FORMAT
from tests.support.commands import run_main


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu h100 --json nowhere/plan.json", "--json nowhere/plan.json: there is no folder nowhere; give a file in"),
        ("--gpu h100 --hlo .", "--hlo .: . is a folder; give a file in a folder that can be written"),
        ("--schedule --png /dev/null/x.png", "--png /dev/null/x.png: /dev/null is no folder"),
        ("--schedule --csv nowhere/x.csv", "--csv nowhere/x.csv: there is no folder nowhere"),
        ("--gpu h100 --calibrate nowhere.jsonl", "nowhere.jsonl does not exist: give the metrics.jsonl"),
        ("--gpu h100 --gpus 12", "--gpus 12 do not fill nodes of 8: give a multiple of 8, or another --gpus-per-node"),
        ("--gpu h100 --mesh.data 12", "the mesh's 12 GPUs do not fill nodes of 8"),
        ("--gpu h100 --nodes 999999", "--nodes 999999 of 8 GPUs: more than 1,048,576 GPUs cannot be planned"),
        ("--gpu h100 --nodes 0", "--nodes: '0' must be a whole number above 0"),
        (f"--gpu h100 --gpus {10**30}", "must be at most 9,223,372,036,854,775,807"),
        ("--gpu h100 --tokens inf", "--tokens: 'inf' must be a number above 0, such as 300e9"),
        ("--gpu h100 --tokens nan", "--tokens: 'nan' must be"),
    ],
)
def test_refused_before_anything_is_compiled(flags: str, message: str, monkeypatch, tmp_path: Path):
    def compile_nothing(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr("jaxtron.plan.show.rehearse", compile_nothing)
    monkeypatch.chdir(tmp_path)
    ended = run_main(main, flags.split())
    assert (ended.code, ended.out) == (2, "") and ended.err.count("\n") == 1 and message in ended.err, ended
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("platform_name", "<<<<<<< HEAD\nplatform_name", "is damaged in line 15: no field of a GpuTargetConfigProto"),
        ("clock_rate_ghz: 1.98", "clock_rate_ghz: 1.9.8", "has no clock_rate_ghz"),
        ("core_count: 132", "core_count: 0", "has a zero for core_count"),
        ("cuda_compute_capability {", "cuda_compute_capability", "is damaged in line"),
        ("gpu_device_info {", "gpu_device_info { more {", "is cut short: braces are left open"),
    ],
)
def test_damaged_targets(old: str, new: str, message: str, tmp_path: Path):
    text, path = GPUS["h100"].target_config, tmp_path / "my.textproto"
    path.write_text(text)
    assert gpu_named(str(path)).num_cores == 132
    assert old in text
    for name, content in (("broken", text.replace(old, new, 1).encode()), ("latin", b"caf\xe9")):
        (tmp_path / f"{name}.textproto").write_bytes(content)
    with pytest.raises(UserError, match=message):
        gpu_named(str(tmp_path / "broken.textproto"))
    with pytest.raises(UserError, match="is no text: byte 3 is not UTF-8"):
        gpu_named(str(tmp_path / "latin.textproto"))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("memory", {}, "memory.[a-z_]+ is no number of bytes"),
        (
            "communication",
            [{"key": ["all_gather", ["data"], [4], 2], "payload": "many", "each": 1}],
            "communication.0.payload: ",
        ),
        ("communication", 7, "communication: "),
        ("prediction", {"step_seconds": 0, "mfu": 0.4}, "prediction.step_seconds: "),
        ("prediction", None, "prediction: "),
        ("bound", {"step_seconds": 1.0, "mfu": "?", "classes": {}}, "bound.mfu: "),
        ("bound", {"step_seconds": 1.0, "mfu": 0.5, "classes": {"products": {}}}, "bound.classes.products.seconds: "),
    ],
)
def test_damaged_plans(place: str, value, message: str, tmp_path: Path):
    path = tmp_path / "plan.json"
    times = {"step_seconds": 1.0, "mfu": 0.5}
    whole = {"memory": {}, "communication": [], "prediction": times, "bound": {**times, "classes": {}}}
    path.write_text(json.dumps({"format": FORMAT, **whole, place: value}))
    with pytest.raises(UserError, match=f"plan.json is a damaged plan: {message}"):
        read_plan(path)
    for text in ("[" * 100_000, '{"format":'):
        path.write_text(text)
        with pytest.raises(UserError, match="is no plan: it is not JSON"):
            read_plan(path)
