"""The benchmark of indices runs, and finds its compiled loops equal to ours."""

import json
import shutil

import pytest

from benchmarks import data_index


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the loops to compare with are compiled by g++")
def test_the_benchmark_of_indices(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert data_index.main(["--documents", "3000", "--places", "2000", "--repeats", "1", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert [part["mean_length"] for part in result["sample_order"]] == [100, 500, 3000]
    assert [part["datasets"] for part in result["blends"]] == [2, 10, 20, 100]
