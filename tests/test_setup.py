"""Setting up on a machine where it cannot work."""

import os
import subprocess
from pathlib import Path

SETUP = Path(__file__).parents[1] / "tools" / "setup"


def test_a_machine_without_a_fitting_python_gets_one_line(tmp_path: Path):
    environment = os.environ | {"PYTHONS": "9.8 9.9"}
    result = subprocess.run([SETUP, tmp_path / "venv"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "" and not (tmp_path / "venv").exists()
    assert result.stderr.startswith("error: no Python of 9.8, 9.9 ") and result.stderr.count("\n") == 1


def test_a_python_that_does_not_run_is_passed_over(tmp_path: Path):
    environment = os.environ | {"PYTHON": "/bin/false"}
    result = subprocess.run([SETUP, tmp_path / "venv"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "not /bin/false" in result.stderr
