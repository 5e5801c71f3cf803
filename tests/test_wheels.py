"""A machine without a registry: wheels are carried there, and installed beside the JAX that it has. No network here."""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import machine, record

TOOLS = Path(__file__).parents[1] / "tools"
PYTHON = "{}.{}".format(*sys.version_info)
# builds an installation of the project, as setuptools does
BACKEND = """
import pathlib, zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "jaxtron-1.0-py3-none-any.whl"
    info = {"METADATA": METADATA, "WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"}
    with zipfile.ZipFile(pathlib.Path(folder) / name, "w") as file:
        for part, text in {**info, "RECORD": ""}.items():
            file.writestr(f"jaxtron-1.0.dist-info/{part}", text)
    return name
METADATA = "Metadata-Version: 2.1\\nName: jaxtron\\nVersion: 1.0\\nRequires-Dist: jax\\nRequires-Dist: needed>=2\\n"
"""


def wheel(folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any", code: str = "") -> None:
    """A wheel with one module."""
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    files = {f"{info}/METADATA": "\n".join(metadata) + "\n", f"{module}.py": code}
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
    with zipfile.ZipFile(folder / f"{module}-{version}-{tag}.whl", "w") as file:
        for path, text in (files | {f"{info}/RECORD": ""}).items():
            file.writestr(path, text)


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """What a registry has: JAX and a package that needs the newest, in a newer and in an older version."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for version in ("0.11.2", "0.12.0"):
        wheel(folder, "jax", version, f"jaxlib=={version}", "numpy")
        wheel(folder, "jaxlib", version, "numpy")
    wheel(folder, "numpy", "2.5")
    wheel(folder, "flax", "0.12.8", "jax>=0.11", "message-pack>=1.2")
    wheel(folder, "flax", "0.13.0", "jax>=0.12", "message-pack>=1.2", "colour; extra == 'all'")
    wheel(folder, "message-pack", "1.3")
    for name in ("pytest", "pytest-xdist", "beartype", "backend"):
        wheel(folder, name, "9.0", code=BACKEND if name == "backend" else "")
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The tools, in a project that needs little."""
    folder = tmp_path / "project"
    shutil.copytree(TOOLS, folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["backend"]\nbuild-backend = "backend"\n'
        '[project]\nname = "jaxtron"\nversion = "1.0"\ndependencies = [\n  "jax>=0.10",\n  "flax>=0.12",\n]\n'
    )
    return folder


def carry(project: Path, registry: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`tools/wheels`, whose registry is a folder."""
    given = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(registry), "PIP_CONFIG_FILE": os.devnull, "WHEELS": ""}
    command = [sys.executable, project / "tools" / "wheels", *words]
    return subprocess.run(command, env=os.environ | given, capture_output=True, text=True)


def names(folder: Path) -> list[str]:
    return sorted(file.name.split("-py3")[0] for file in folder.glob("*.whl"))


def test_all_but_jax_is_carried(project: Path, registry: Path):
    done = carry(project, registry)
    assert done.returncode == 0, done.stderr
    folder = project / "wheels"
    tests = ["beartype-9.0", "flax-0.13.0", "message_pack-1.3", "pytest-9.0", "pytest_xdist-9.0"]
    assert names(folder) == ["backend-9.0", *tests]
    assert (folder / "python").read_text() == f"{PYTHON}\n"
    assert f"6 wheels for Python {PYTHON}" in done.stdout
    # a folder that is somebody's own is not replaced
    (project / "mine").mkdir()
    refused = carry(project, registry, "--folder", str(project / "mine"))
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1) and "not made by tools/wheels" in refused.stderr


def test_what_that_machine_has_is_not_carried(project: Path, registry: Path):
    there = project / "there.txt"
    # its JAX stays, so that the older flax is taken; the message-pack is too old, the builder always travels
    there.write_text(
        "jax==0.11.2+cuda\njaxlib==0.11.2\nnumpy==2.0\npytest==9.1\nbeartype @ file:///x\n"
        "message_pack==1.1\nbackend==9.0\n"
    )
    done = carry(project, registry, "--there", str(there), "--list")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "to carry: backend==9.0 beartype==9.0 flax==0.12.8 message-pack==1.3 pytest-xdist==9.0\n"
    assert not (project / "wheels").exists()
    # in columns, as pip lists without that option
    there.write_text("Package Version\n------- -------\njax     0.11.2\n")
    assert "names no package" in carry(project, registry, "--there", str(there)).stderr


def test_wheels_are_for_the_other_machine(project: Path, registry: Path):
    (registry / "message_pack-1.3-py3-none-any.whl").unlink()
    wheel(registry, "message-pack", "1.3", tag=f"cp{PYTHON.replace('.', '')}-abi3-manylinux_2_34_x86_64")
    assert carry(project, registry, "--list", "--glibc", "2.34").returncode == 0
    older = carry(project, registry, "--list", "--glibc", "2.28")
    assert older.returncode == 1 and "depends on message-pack>=1.2" in older.stderr
    assert older.stderr.endswith("error: pip could not find the wheels; its words are above\n")
    assert "versions such as 3.12" in carry(project, registry, "--python", "three").stderr


def test_the_commit_travels_beside_the_wheels(project: Path, registry: Path):
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", "-C", project, *who, *words], capture_output=True, text=True, check=True).stdout

    assert record.commit(project) is None
    (project / "jaxtron").mkdir()
    (project / "jaxtron" / "code.py").write_text("a = 1\n")
    git("init", "--quiet")
    git("add", "pyproject.toml", "jaxtron", "tools")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "--short=12", "HEAD").strip()
    assert record.commit(project) == commit
    assert carry(project, registry).returncode == 0
    # git's folder stays behind
    shutil.rmtree(project / ".git")
    assert record.commit(project) == commit
    (project / "jaxtron" / "code.py").write_text("a = 2\n")
    assert record.commit(project) == f"{commit}-changed"


def test_a_folder_inside_another_repository_is_not_of_its_commit(tmp_path: Path):
    subprocess.run(["git", "-C", tmp_path, "init", "--quiet"], check=True)
    (tmp_path / "inside").mkdir()
    assert record.commit(tmp_path / "inside") is None


def setup(project: Path, wheels: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`tools/setup` with wheels and this Python, which has JAX; a registry would be asked in vain."""
    given = {"WHEELS": str(wheels), "PYTHON": sys.executable, "PIP_CONFIG_FILE": os.devnull}
    given |= {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_CONSTRAINT": "/nowhere"}
    command = [project / "tools" / "setup", project / "venv", "", *words]
    return subprocess.run(command, env=os.environ | given, capture_output=True, text=True)


def test_the_wheels_are_installed_beside_the_machines_jax(project: Path, registry: Path):
    (registry / "python").write_text(f"{PYTHON}\n")
    # these are the machine's own matter: newer ones in the folder are left alone
    wheel(registry, "needed", "1.0")
    failed = setup(project, registry)
    assert failed.returncode == 1 and f"neither on this machine nor in {registry}, needed>=2" in failed.stderr
    wheel(registry, "needed", "2.0", code="two = 2")
    done = setup(project, registry, "needed")
    assert done.returncode == 0, done.stderr
    code = "import importlib.metadata as m, jaxlib, needed; print(m.version('jax'), jaxlib.__file__, needed.__file__)"
    python = project / "venv" / "bin" / "python"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found[0] == importlib.metadata.version("jax") and Path(found[1]).is_relative_to(Path(sys.prefix).resolve())
    assert Path(found[2]).is_relative_to(project / "venv")
    again = setup(project, registry, "needed")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_without_wheels_or_without_jax_one_line(project: Path, tmp_path: Path):
    missing = setup(project, tmp_path / "no")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1) and "make wheels" in missing.stderr
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "python").write_text("9.8\n")
    other = setup(project, tmp_path / "other")
    assert (other.returncode, other.stderr.count("\n")) == (1, 1) and "no Python 9.8 with JAX" in other.stderr


def cuda(folder: Path, release: str | None) -> Path:
    """A CUDA folder whose ptxas says this release; without one, it has no libdevice."""
    (folder / "bin").mkdir(parents=True)
    ptxas = folder / "bin" / "ptxas"
    ptxas.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V1'\n")
    ptxas.chmod(0o755)
    if release:
        (folder / machine.LIBDEVICE).parent.mkdir(parents=True)
        (folder / machine.LIBDEVICE).write_text("")
    return folder


def test_the_cuda_that_jaxs_kernels_can_use_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "USUAL", (tmp_path / "usual",))
    monkeypatch.setattr(machine, "_others", lambda: iter([tmp_path / "newer"]))
    part, older, newer = (
        cuda(tmp_path / name, release) for name, release in (("part", None), ("usual", "12.9"), ("newer", "13.1"))
    )
    path = {"PATH": f"{part}/bin:/bin"}
    assert machine.cuda_folder(path) == newer
    # a user's choice stands, if it is one
    assert machine.cuda_folder({**path, "CUDA_ROOT": str(older)}) == older
    assert machine.cuda_folder({**path, "CUDA_ROOT": str(part)}) == newer
    assert machine.cuda_variables({**path, "XLA_FLAGS": "--a=1"}) == {
        "CUDA_ROOT": str(newer),
        "PATH": f"{newer}/bin:{part}/bin:/bin",
        "XLA_FLAGS": f"--a=1 --xla_gpu_cuda_data_dir={newer}",
    }
    # XLA looks there by itself
    assert "XLA_FLAGS" not in machine.cuda_variables({**path, "CUDA_ROOT": str(older)})
    (doubt, nvlink) = machine.doubtful({**path, "CUDA_ROOT": str(older)})
    assert "ptxas is CUDA 12.9's" in doubt and "nvlink" in nvlink
    shutil.rmtree(newer)
    shutil.rmtree(older)
    assert machine.cuda_folder(path) is None and machine.cuda_variables(path) == {}
    assert "export CUDA_ROOT=" in machine.doubtful(path)[0]


def test_what_keeps_jax_from_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "has_driver", lambda: False)
    monkeypatch.setattr(machine, "expects_gpu", lambda environment: False)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    driver, plugin = machine.lacking({})
    assert "/dev/nvidiactl" in driver and "jax[cuda13]" in plugin
    monkeypatch.setattr(machine, "has_driver", lambda: True)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: True)
    assert machine.lacking({"JAX_PLATFORMS": "cpu"}) == ["JAX_PLATFORMS=cpu keeps JAX from its GPUs: unset it"]


def test_a_version_is_that_of_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of two installations, as beside a machine's own packages, the first on the path."""
    for folder, version in (("first", "0.99.1"), ("second", "0.98.0")):
        info = tmp_path / folder / f"optax-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: optax\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second"), *sys.path])
    assert record.versions()["optax"] == "0.99.1"
    assert record.versions()["jax"] == importlib.metadata.version("jax")


def test_the_digest_is_of_the_files_that_run(project: Path, registry: Path):
    assert carry(project, registry).returncode == 0
    text = (project / "pyproject.toml").read_bytes()
    line = f"pyproject.toml {hashlib.sha256(text).hexdigest()}\n"
    assert (project / "wheels" / "commit").read_text().split() == ["unknown", hashlib.sha256(line.encode()).hexdigest()]
