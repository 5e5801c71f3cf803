"""The Kubernetes file says what JAX reads of it, and what exit codes mean; its schema is checked where the tool is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxtron.config import load
from jaxtron.interrupts import TRY_AGAIN
from jaxtron.run.configuration import Configuration

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "launch" / "kubernetes.yaml"
OBJECTS = {one["kind"]: one for one in yaml.safe_load_all(FILE.read_text())}
JOB = OBJECTS["Job"]["spec"]
POD = JOB["template"]["spec"]


def test_pods_find_each_other():
    name = OBJECTS["Job"]["metadata"]["name"]
    service = OBJECTS["Service"]
    assert JOB["completionMode"] == "Indexed" and JOB["completions"] == JOB["parallelism"]
    # process 0 is <job>-0.<subdomain>, before it is ready
    assert POD["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True and service["spec"]["selector"] == {"job-name": name}


def test_pods_may_ask():
    account = OBJECTS["ServiceAccount"]["metadata"]["name"]
    binding = OBJECTS["RoleBinding"]
    assert POD["serviceAccountName"] == account
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert binding["roleRef"]["name"] == OBJECTS["Role"]["metadata"]["name"]
    allowed = {resource for rule in OBJECTS["Role"]["rules"] for resource in rule["resources"]}
    assert allowed == {"pods", "services", "jobs"}


def meaning(code: int) -> str:
    script = f'. "{ROOT}/launch/environment.sh"; meaning_of {code}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_exit_codes_mean_the_same_to_every_launcher():
    rules = JOB["podFailurePolicy"]["rules"]
    ignored = next(
        rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "Ignore" and "onExitCodes" in rule
    )
    final = next(rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob")
    assert {code: meaning(code) for code in ignored} == {75: "lost", 130: "saved", 138: "saved", 143: "saved"}
    assert TRY_AGAIN in ignored and {meaning(code) for code in (0, *final)} == {"over"}
    assert {meaning(code) for code in (134, 137, 139)} == {"lost"}
    # which the policy needs
    assert POD["restartPolicy"] == "Never"
    text = (ROOT / "docs" / "clusters.md").read_text()
    assert all(str(code) in text for code in (75, 130, 134, 137, 138, 139, 143))


def test_its_command_reads():
    (container,) = POD["containers"]
    path, *words = container["args"]
    config = load(Configuration, ROOT / path, words)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert config.mesh.data == gpus * JOB["completions"] and config.run.directory == "/runs/gpt_1b"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/runs", "/dev/shm"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}


@pytest.mark.slow
def test_its_schema():
    tool = shutil.which("kubernetes-validate", path=f"{Path(sys.executable).parent}:{Path.home()}/.local/bin:/usr/bin")
    if tool is None:
        pytest.skip("no kubernetes-validate: pip install kubernetes-validate")
    assert subprocess.run([tool, "--strict", FILE]).returncode == 0


@pytest.mark.parametrize("name", ["environment.sh", "mpi.sh", "ssh.sh", "stage.sh", "slurm.sbatch"])
def test_scripts_are_bash(name: str):
    assert subprocess.run(["bash", "-n", ROOT / "launch" / name]).returncode == 0
    tool = shutil.which("shellcheck")
    if tool is not None:
        # SC1091: it is told the file's place when it runs
        assert (
            subprocess.run([tool, "-s", "bash", "-S", "warning", "-e", "SC1091", ROOT / "launch" / name]).returncode
            == 0
        )
