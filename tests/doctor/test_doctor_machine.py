"""Planted faults of a machine: the doctor names each, with what mends it, and nothing else."""

import resource
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from jaxtron.doctor.devices import check_devices
from jaxtron.doctor.finding import Finding, exit_code, report
from jaxtron.doctor.limits import check_limits, check_variables
from jaxtron.doctor.places import check_place
from jaxtron.doctor.request import DoctorRequest
from jaxtron.doctor.run import check_machine, within
from jaxtron.doctor.software import check_libraries, check_packages
from jaxtron.doctor.surroundings import ABSENT, SILENT, Answer, Surroundings, ask

GPU = "{index}, NVIDIA H100 80GB HBM3, {driver}, 81559, {used}, {mig}, {errors}"
PACKAGES = {
    "jax": "0.11.2",
    "jaxlib": "0.11.2",
    "jax-cuda13-plugin": "0.11.2",
    "jax-cuda13-pjrt": "0.11.2",
    "nvidia-nccl-cu13": "2.28.3",
}


def lines(count: int = 8, **changes: object) -> str:
    """What nvidia-smi says of so many GPUs; a change is of the last."""
    usual = {"driver": "580.65.06", "used": 4, "mig": "Disabled", "errors": 0}
    rows = [GPU.format(index=index, **usual) for index in range(count)]
    rows[-1:] = [GPU.format(index=count - 1, **(usual | changes))] if count else []
    return "\n".join(rows)


def machine(
    root: Path,
    *,
    said: str | None = None,
    code: int = 0,
    release: str = "13.0",
    packages: dict[str, str | None] | None = None,
    limits: dict[int, tuple[int, int]] | None = None,
    usable: int = 64,
    **environment: str,
) -> Surroundings:
    """A node of eight GPUs that lacks nothing, but for what is planted."""
    for name in ("dev/nvidiactl", "sys/class/net/eth0/mtu"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    versions = {**PACKAGES, **(packages or {})}

    def answer(command: Sequence[str]) -> Answer:
        if command[0] == "nvidia-smi":
            return Answer(code, lines() if said is None else said)
        return (
            Answer(ABSENT, "") if not release else Answer(0, f"Cuda compilation tools, release {release}, V{release}")
        )

    def limit(kind: int) -> tuple[int, int]:
        return (limits or {}).get(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return Surroundings(
        root=root,
        environment=environment,
        ask=answer,
        version=versions.get,
        limit=limit,
        processors=64,
        usable=usable,
        host="n1",
    )


def bad(found: Iterable[Finding]) -> list[tuple[str, str]]:
    """Level and line of all but the good."""
    found = list(found)
    assert all(finding.text and (finding.level == "good" or finding.mend) for finding in found)
    return [(finding.level, finding.line(0)) for finding in found if finding.level != "good"]


def all_of(around: Surroundings, expected: int | None = None) -> list[Finding]:
    """What concerns no directory."""
    return [
        *check_devices(around, expected),
        *check_packages(around, gpu=True),
        *check_libraries(around),
        *check_limits(around, gpu=True),
        *check_variables(around),
    ]


@pytest.fixture(autouse=True)
def shared_memory(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    size = getattr(request, "param", 64 * 2**30)
    monkeypatch.setattr("jaxtron.doctor.limits._size", lambda path: size)


def test_a_good_machine_has_nothing(tmp_path: Path):
    found = all_of(machine(tmp_path), 8)
    assert bad(found) == [] and exit_code(found) == 0
    text = "\n".join(report(found))
    assert "8 x NVIDIA H100 80GB HBM3" in text and "CUDA 13.0" in text and text.endswith("doctor: nothing wrong")


@pytest.mark.parametrize(
    ("planted", "level", "words"),
    [
        ({"said": lines(7)}, "fault", "gpus  7 where 8 are expected"),
        ({"said": ""}, "fault", "the driver has no GPU"),
        ({"said": lines(used=40_000)}, "fault", "GPU 7 has 40,000 of 81,559 MiB in use already; end what uses it"),
        ({"said": lines(errors=3)}, "fault", "GPU 7 had 3 errors of memory"),
        ({"said": lines(mig="Enabled")}, "doubt", "GPU 7 is cut into MIG instances"),
        ({"said": lines().replace("580.65.06", "550.54.15")}, "fault", "driver 550.54.15 is older than the 580"),
        ({"said": lines() + "\nhalf, a, line"}, "fault", "what nobody understands"),
        (
            {"said": "Failed to initialize NVML: Driver/library version mismatch", "code": 18},
            "fault",
            "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch; restart the machine",
        ),
        ({"code": SILENT}, "fault", "nvidia-smi gives no answer"),
        ({"code": ABSENT}, "fault", "no nvidia-smi; install the driver"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "fault", "2 where 8 are expected (CUDA_VISIBLE_DEVICES=0,1)"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "fault", "is empty and hides all GPUs; unset it"),
        (
            {"CUDA_VISIBLE_DEVICES": "3", "SLURM_LOCALID": "3"},
            "fault",
            "number 3 of its machine and sees 1 GPU (CUDA_VISIBLE_DEVICES=3); leave out --gpus-per-task",
        ),
        ({"packages": {"jaxlib": "0.10.2"}}, "fault", "jax 0.11.2 with jaxlib 0.10.2; pip install jaxlib==0.11.2"),
        ({"packages": {"jax": None}}, "fault", "no jax in "),
        ({"packages": {"jax": "0.9.1", "jaxlib": "0.9.1"}}, "fault", "jax 0.9.1 is not one that Jaxtron supports"),
        (
            {"packages": {"jax-cuda13-plugin": None, "jax-cuda13-pjrt": None}},
            "fault",
            "no plugin for CUDA in",
        ),
        (
            {"packages": {"jax-cuda13-pjrt": "0.10.2"}},
            "fault",
            "jax-cuda13-pjrt is 0.10.2 and jaxlib 0.11.2; pip install",
        ),
        ({"packages": {"jax-cuda12-plugin": "0.11.2"}}, "doubt", "plugins for CUDA 12 and 13 are both installed"),
        ({"packages": {"nvidia-nccl-cu13": None}}, "doubt", "no nvidia-nccl-cu13 beside JAX"),
        ({"release": "12.9"}, "fault", "JAX 0.11.2 writes of Jaxtron's kernels only that of CUDA 13.0"),
        ({"release": ""}, "fault", "no ptxas that runs"),
        ({"limits": {resource.RLIMIT_NOFILE: (256, 4096)}}, "fault", "may open 256 files; ulimit -n 4096"),
        ({"limits": {resource.RLIMIT_NOFILE: (1024, 2**20)}}, "doubt", "may open 1,024 files"),
        ({"limits": {resource.RLIMIT_AS: (2**33, 2**33)}}, "fault", "may map 8 GiB (ulimit -v)"),
        ({"usable": 1}, "doubt", "may use 1 of 64 processors"),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, "fault", "NCCL_SOCKET_IFNAME=ib0 and this machine has eth0"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "fault", "NCCL_SOCKET_IFNAME==eth and this machine has eth0"),
        ({"NCCL_P2P_DISABLE": "1"}, "doubt", "NCCL_P2P_DISABLE=1: GPUs of a machine would not speak over NVLink"),
        ({"XLA_FLAGS": "flags.txt"}, "fault", "XLA_FLAGS=flags.txt is a file"),
        ({"http_proxy": "http://proxy:3128"}, "doubt", "http_proxy is set"),
    ],
)
def test_planted_faults(planted: dict, level: str, words: str, tmp_path: Path):
    found = all_of(machine(tmp_path, **planted), 8)
    lines_found = bad(found)
    assert any(one == level and words in line for one, line in lines_found), lines_found
    # what has one cause is said once
    assert len(lines_found) <= (2 if "driver" in words or "plugin" in words else 1), lines_found
    assert exit_code(found) == (level == "fault")


@pytest.mark.parametrize(
    "harmless",
    [
        {"NCCL_SOCKET_IFNAME": "eth"},
        {"NCCL_SOCKET_IFNAME": "=eth0"},
        {"NCCL_SOCKET_IFNAME": "^docker"},
        {"NCCL_IB_DISABLE": "0"},
        {"XLA_FLAGS": " --xla_dump_to=x"},
        {"http_proxy": "http://p:1", "no_proxy": "127.0.0.1,localhost"},
        {"release": "13.1"},
        {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_LOCALID": "7"},
    ],
)
def test_what_is_meant_is_no_fault(harmless: dict, tmp_path: Path):
    assert bad(all_of(machine(tmp_path, **harmless), 8)) == []


@pytest.mark.parametrize("shared_memory", [64 * 2**20], indirect=True)
def test_shared_memory_of_a_container(tmp_path: Path):
    ((level, line),) = bad(all_of(machine(tmp_path)))
    assert level == "fault" and "/dev/shm has 64 MiB: too little for NCCL" in line and "--shm-size=16g" in line


def test_without_a_driver(tmp_path: Path):
    plain = Surroundings(root=tmp_path, environment={})
    assert bad(check_devices(plain, None)) == [] and bad(check_devices(plain, 0)) == []
    assert "no NVIDIA driver where 8 GPUs are expected" in bad(check_devices(plain, 8))[0][1]
    card = tmp_path / "sys/bus/pci/devices/0000:17:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x10de\n")
    assert "an NVIDIA card and no driver" in bad(check_devices(plain, None))[0][1]


def test_adapters_that_are_down_and_memory_that_may_not_be_locked(tmp_path: Path):
    port = tmp_path / "sys/class/infiniband/mlx5_0/ports/1"
    port.mkdir(parents=True)
    (port / "state").write_text("1: DOWN\n")
    around = machine(tmp_path, limits={resource.RLIMIT_MEMLOCK: (65536, 65536)})
    assert "mlx5_0 port 1 is 1: DOWN" in bad(check_variables(around))[0][1]
    assert "64 KiB may be locked (ulimit -l)" in bad(check_limits(around, gpu=True))[0][1]
    (port / "state").write_text("4: ACTIVE\n")
    assert bad(check_variables(around)) == []


def test_libraries_before_those_of_jax(tmp_path: Path):
    (tmp_path / "opt/cuda/lib64").mkdir(parents=True)
    (tmp_path / "opt/cuda/lib64/libnccl.so.2").touch()
    around = machine(tmp_path, LD_LIBRARY_PATH="/nowhere::/opt/cuda/lib64")
    assert "LD_LIBRARY_PATH puts /opt/cuda/lib64/libnccl.so.2 before" in bad(check_libraries(around))[0][1]


def test_places(tmp_path: Path):
    good_one = list(check_place("run.directory", tmp_path / "runs" / "a"))
    assert [finding.check for finding in good_one] == ["disk"] and list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    assert "file is no folder; give another --run.directory" in bad(check_place("run.directory", file / "a"))[0][1]
    needed = shutil.disk_usage(tmp_path).total * 2
    line = bad(check_place("run.directory", tmp_path, needed))[0][1]
    assert "are free and" in line and "make room, or change --run.directory" in line


def test_a_slow_disk_and_one_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxtron.doctor.places._write", lambda folder: 1e6)
    level, line = bad(check_place("run.directory", tmp_path, 2**30))[0]
    assert level == "doubt" and "a checkpoint takes 1,074 s; write to a faster disk" in line

    def refuse(folder: Path) -> float:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr("jaxtron.doctor.places._write", refuse)
    assert "cannot write: Disk quota exceeded; make room" in bad(check_place("run.directory", tmp_path))[0][1]


def test_what_hangs_is_a_fault():
    def hang() -> Iterable[Finding]:
        time.sleep(5)
        return []

    start = time.monotonic()
    assert "no answer within 0.1 s; a file system may hang" in within("disk", hang, 0.1)[0].line(0)
    assert time.monotonic() - start < 3

    def fail() -> Iterable[Finding]:
        raise OSError(116, "Stale file handle", "/data")

    assert "/data: Stale file handle" in within("disk", fail)[0].line(0)
    assert ask(["/nowhere/program"]).code == ABSENT


def test_a_program_that_hangs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxtron.doctor.surroundings.COMMAND_SECONDS", 0.1)
    assert ask(["sleep", "5"]).code == SILENT


def test_the_machine_alone(tmp_path: Path):
    found = check_machine(None, DoctorRequest(gpus=8), machine(tmp_path))
    assert {finding.check for finding in found} >= {"driver", "gpus", "jax", "plugin", "ptxas", "files", "disk"}
    checks = {finding.check for finding in check_machine(None, DoctorRequest(gpus=0), machine(tmp_path))}
    assert not checks & {"driver", "gpus", "plugin", "ptxas"}
