"""What a supervisor is told, and which flags so many hosts get."""

from pathlib import Path

import pytest

from jaxtron.config import UserError, load
from jaxtron.launch.__main__ import main
from jaxtron.launch.children import visible_gpus
from jaxtron.launch.fitting import Fitting
from jaxtron.launch.request import parse
from jaxtron.launch.run import slurm_first_node
from jaxtron.run.configuration import Configuration
from tests.support.commands import run_main

CONFIG = Path(__file__).parent.parent.parent / "configs" / "gpt_tiny.yaml"
TRAIN = ("python", "-m", "jaxtron.train")


def fitting(*flags: str, most: int = 4, devices: int = 1) -> Fitting:
    return Fitting(load(Configuration, CONFIG, flags), most=most, devices=devices)


def test_a_line_is_taken_apart():
    words = "--nodes 2:4 --rendezvous [::1]:29400 --processes-per-node 2 --restarts 0 --"
    request = parse([*words.split(), *TRAIN, "a.yaml", "--mesh.data", "4"])
    assert request is not None
    assert (request.fewest, request.most, request.rendezvous, request.processes) == (2, 4, ("::1", 29400), 2)
    assert (request.command, request.settings, request.restarts) == (TRAIN, ("a.yaml", "--mesh.data", "4"), 0)
    other = parse(["--nodes", "3", "--", "bin/jaxtron", "train", "a.yaml"])
    assert other is not None and (other.fewest, other.most, other.settings) == (3, 3, ("a.yaml",))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-- python -m jaxtron.train", "--nodes is missing"),
        ("--nodes 2", "what to start is missing"),
        ("--nodes 4:2 -- python -m jaxtron.train", "--nodes 4:2 is no range of hosts"),
        ("--nodes 0:2 -- python -m jaxtron.train", "--nodes 0:2 is no range of hosts"),
        ("--nodes two -- python -m jaxtron.train", "--nodes two is no range of hosts"),
        ("--nodes 2 -- python train.py", "python train.py is no training to start"),
        ("--nodes 2 --rendezvous here -- python -m jaxtron.train", "--rendezvous here is not HOST:PORT"),
        ("--nodes 2 --rendezvous a:99999 -- python -m jaxtron.train", "--rendezvous a:99999 is not HOST:PORT"),
        ("--nodes 2 --node 3 -- python -m jaxtron.train", "unknown flag --node; did you mean --nodes?"),
        ("--nodes 2 -- python -m jaxtron.train CONFIG --devices 1", "--rendezvous is missing"),
        ("--nodes 1 -- python -m jaxtron.train CONFIG --devices 2 --mesh.data 4", "mesh.data 4 needs 4 devices"),
        (
            "--nodes 1 -- python -m jaxtron.train CONFIG --devices 1 --runtime.coordinator_address a:1 "
            "--runtime.num_processes 1 --runtime.process_id 0",
            "are the supervisor's to set",
        ),
    ],
)
def test_what_does_not_read_is_one_line(line: str, said: str):
    ended = run_main(main, [str(CONFIG) if word == "CONFIG" else word for word in line.split()])
    assert ended.code == 2 and ended.err.startswith("error: ") and said in ended.err and ended.err.count("\n") == 1


def test_fewer_hosts_have_more_microbatches_of_the_same_batch():
    made = fitting("--train.global_batch", "24")
    # 6 sequences of a device at once, and never more
    assert {hosts: made.flags(hosts) for hosts in (1, 2, 3, 4)} == {
        4: (),
        3: ("--train.microbatches", "2"),
        2: ("--train.microbatches", "2"),
        1: ("--train.microbatches", "4"),
    }
    assert made.largest(4, 1) == 4 and made.largest(3, 1) == 3


def test_what_the_user_split_stays_and_data_is_filled():
    made = fitting("--mesh.data", "4", "--mesh.tensor", "2", "--train.global_batch", "16", devices=2)
    assert made.flags(4) == ("--mesh.data", "-1")
    assert made.flags(2) == ("--mesh.data", "-1", "--train.microbatches", "2")
    # another axis that is open is the one that is filled
    assert fitting("--mesh.data", "1", "--mesh.fsdp", "-1", "--train.global_batch", "16").flags(2) == (
        "--train.microbatches",
        "2",
    )


def test_what_is_left_may_not_fit_and_says_why():
    made = fitting("--train.global_batch", "32")
    assert made.refusals(2, 4) == {
        3: "train.global_batch 32 is not a multiple of mesh.data 3 x mesh.fsdp 1 x train.microbatches 1 = 3"
    }
    assert made.largest(3, 2) == 2 and made.largest(3, 3) is None
    whole = fitting("--mesh.tensor", "2", "--train.global_batch", "16")
    assert "needs a multiple of 2 devices, there are 3" in whole.refusals(1, 4)[3]
    with pytest.raises(UserError, match=r"train.global_batch 30 is not a multiple of mesh.data 4"):
        fitting("--train.global_batch", "30")


def test_a_pipeline_keeps_a_number_of_microbatches_that_its_schedule_runs():
    flags = ("--mesh.pipe", "2", "--pipeline.schedule", "interleaved", "--pipeline.chunks", "2")
    made = fitting(*flags, "--train.microbatches", "4", "--train.global_batch", "24", devices=2, most=3)
    # 6 does not divide by what interleaving needs unless it is a multiple of the stages
    for hosts in (1, 2, 3):
        words = made.flags(hosts)
        count = int(words[-1]) if words else 4
        assert count % 2 == 0 and (24 // hosts) // count <= 2


@pytest.mark.parametrize(
    ("nodes", "found"),
    [("n[001-004,007]", "n001"), ("a,b", "a"), ("gpu7", "gpu7"), ("rack1-n[9-10],other", "rack1-n9")],
)
def test_under_slurm_its_first_node_is_where_supervisors_meet(nodes: str, found: str):
    environment = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "4097"}
    assert slurm_first_node(environment) == (found, 61441)
    assert slurm_first_node({"SLURM_JOB_ID": "4097"}) is None


def test_the_gpus_of_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("nvidia0", "nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(tmp_path) == ["0", "2", "10"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert visible_gpus(tmp_path) == ["3", "GPU-5"]
