"""Two processes train by a real Open MPI, a real sshd here, and what Kubernetes gives a pod, and stop together."""

import getpass
import http.server
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.command_runs import free_port, small
from tests.support.compiling import QUICK

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow
ENDLESS = "1000000"
PATIENCE = 240


def environment(folder: Path) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | {
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "XLA_FLAGS": QUICK,
        "DOCTOR": "0",
    }


def flags(folder: Path, *, steps: str = ENDLESS) -> list[str]:
    return [
        str(ROOT / "configs" / "gpt_tiny.yaml"),
        *small(folder),
        *("--devices", "1", "--mesh.data", "2", "--optimizer.schedule", "constant", "--train.steps", steps),
        *("--train.sample_tokens", "0", "--train.validate_every", "0"),
    ]


def begin(command: list[str | Path], folder: Path, **settings: str) -> subprocess.Popen[str]:
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            command,
            env=environment(folder) | settings,
            stdout=log,
            stderr=log,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )


def end(process: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    try:
        code = process.wait(PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, (folder / "log").read_text()


def wait_for_steps(process: subprocess.Popen[str], folder: Path, count: int = 3) -> None:
    file, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + PATIENCE
    while not file.exists() or file.read_text().count("\n") < count:
        log = (folder / "log").read_text()
        assert process.poll() is None and time.monotonic() < deadline, log
        time.sleep(0.05)


def stopped_and_continued(command: list[str | Path], folder: Path, **settings: str) -> str:
    """Starts it, ends it by SIGTERM, and lets it do four more steps; what the second said."""
    process = begin([*command, *flags(folder)], folder, **settings)
    wait_for_steps(process, folder)
    process.send_signal(signal.SIGTERM)
    code, log = end(process, folder)
    found = re.search(r"stopped after step (\d+); the same command continues", log)
    assert code == 130 and found is not None, (code, log)
    step = int(found[1])
    code, log = end(begin([*command, *flags(folder, steps=str(step + 4))], folder, **settings), folder)
    assert code == 0 and f"checkpoint of step {step} found: continuing" in log, (code, log)
    return log


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun: apt-get install openmpi-bin")
def test_open_mpi(tmp_path: Path):
    command = ["bash", ROOT / "launch" / "mpi.sh", "-n", "2", "--oversubscribe", "--"]
    log = stopped_and_continued(command, tmp_path)
    # no terminal's bar in a file
    assert "\x1b[" not in log


@pytest.mark.skipif(
    shutil.which("sshd") is None or os.geteuid() != 0,
    reason="no sshd that root may start: apt-get install openssh-server",
)
def test_ssh(tmp_path: Path):
    port = free_port()
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    server = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "key.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "PasswordAuthentication": "no",
    }
    (tmp_path / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in server.items()))
    daemon = subprocess.Popen(
        [shutil.which("sshd") or "", "-D", "-e", "-f", tmp_path / "sshd_config"], stderr=subprocess.DEVNULL
    )
    try:
        ssh = f"ssh -F none -p {port} -i {tmp_path}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -q"
        hosts = f"{getpass.getuser()}@127.0.0.1,localhost"
        command = ["bash", ROOT / "launch" / "ssh.sh", hosts]
        settings = {"SSH": ssh, "PORT": str(free_port()), "DOCTOR": "1"}
        log = stopped_and_continued(command, tmp_path, **settings)
        assert "localhost: " in log and "127.0.0.1: " in log and "all 2 came to 127.0.0.1" in log
    finally:
        daemon.terminate()
        daemon.wait()


class _Api(http.server.BaseHTTPRequestHandler):
    """The two answers of Kubernetes that JAX asks for, made of the manifest."""

    def do_GET(self) -> None:
        job = next(one for one in manifest() if one["kind"] == "Job")
        spec = job["spec"]["template"]["spec"]
        for container in spec["containers"]:
            # as the API gives quantities back
            limits = container["resources"]["limits"]
            limits.update({name: str(quantity) for name, quantity in limits.items()})
        if "/pods?" in self.path:
            meta = {
                "name": "jaxtron-0-abcde",
                "labels": {"job-name": "jaxtron"},
                "ownerReferences": [
                    {"apiVersion": "batch/v1", "kind": "Job", "name": "jaxtron", "uid": "1", "controller": True}
                ],
            }
            answer = {
                "kind": "PodList",
                "apiVersion": "v1",
                "metadata": {},
                "items": [{"metadata": meta, "spec": spec}],
            }
        elif self.path.endswith("/jobs/jaxtron"):
            answer = job | {"metadata": {"name": "jaxtron", "labels": {}}}
        else:
            self.send_error(404)
            return
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def manifest() -> list[dict]:
    """The objects of the file."""
    return list(yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text()))


@pytest.fixture
def api(tmp_path: Path) -> Iterator[int]:
    """The port of a server that answers as the API does, over TLS."""
    make = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {tmp_path}/key.pem -out {tmp_path}/ca.crt -days 2"
    subprocess.run(
        [*make.split(), "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Api)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


POD = """
set -eu
mkdir -p /var/run/secrets
mount -t tmpfs none /var/run/secrets
account=/var/run/secrets/kubernetes.io/serviceaccount
mkdir -p $account
cp "$FOLDER/ca.crt" $account/
printf token > $account/token
printf default > $account/namespace
cp /etc/hosts "$FOLDER/hosts"
echo '127.0.0.1 jaxtron-0 jaxtron-1 jaxtron-0.jaxtron' >> "$FOLDER/hosts"
mount --bind "$FOLDER/hosts" /etc/hosts
for index in 0 1; do
  JOB_COMPLETION_INDEX=$index HOSTNAME=jaxtron-$index "$@" &
  pods="${pods:-} $!"
done
# as a drained machine: one pod is told
trap 'kill -TERM ${pods##* }' TERM
code=0
for pod in $pods; do
  while kill -0 $pod 2> /dev/null; do wait $pod || true; done
done
for pod in $pods; do wait $pod || code=$?; done
exit $code
"""


def has_kubernetes() -> bool:
    return subprocess.run([sys.executable, "-c", "import kubernetes"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_kubernetes(), reason="no package kubernetes: pip install 'jaxtron[kubernetes]'")
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("openssl") is None,
    reason="a pod's files are mounted by root, with unshare and openssl",
)
def test_kubernetes(api: int, tmp_path: Path):
    job = next(one for one in manifest() if one["kind"] == "Job")
    container = job["spec"]["template"]["spec"]["containers"][0]
    command = ["unshare", "-m", "bash", "-c", POD, "pod", *container["command"]]
    settings = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api), "FOLDER": str(tmp_path)}
    log = stopped_and_continued(command, tmp_path, **settings)
    assert "on 2 cpu (data 2)" in log
