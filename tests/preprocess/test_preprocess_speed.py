"""The command's speed beside its tokenizer's own, and the benchmark that records it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from jaxtron.preprocess.encode import one_thread
from tests.support.token_runs import run, texts, write_bpe, write_lines

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_nine_tenths_of_the_time_is_the_tokenizer_s(tmp_path):
    """Processor time, the least of three turns: others on the machine do not count."""
    given = texts(2000, most_words=600)
    tokenizer = Tokenizer.from_file(str(bpe := write_bpe(tmp_path / "tokenizer.json", given[:100], size=2000)))
    write_lines(tmp_path / "in.jsonl", given)
    flags = ("--input", tmp_path / "in.jsonl", "--tokenizer", bpe, "--output", tmp_path / "out", "--overwrite")
    bare, command = [], []
    for _ in range(3):
        start = time.process_time()
        with one_thread():
            for first in range(0, len(given), 300):
                encodings = tokenizer.encode_batch_fast(given[first : first + 300], add_special_tokens=False)
                assert all([encoding.ids for encoding in encodings])
        middle = time.process_time()
        assert run(*flags).code == 0
        bare.append(middle - start)
        command.append(time.process_time() - middle)
    # below the 0.9 that large runs reach: this one also reads the tokenizer's file, and has 2 MB to make up for it
    assert min(bare) / min(command) > 0.8


def test_the_benchmark_s_record(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(texts(200)))
    flags = ["--megabytes", "0", "--turns", "1", "--vocabulary", "300", "--output", str(tmp_path / "results")]
    command = [sys.executable, "-m", "benchmarks.preprocess", str(tmp_path / "text.txt"), *flags, "--workers"]
    done = subprocess.run([*command, "1"], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    result = json.loads(done.stdout)
    (file,) = (tmp_path / "results").iterdir()
    assert file.name == f"{result['date']}-cpu-preprocess.json" and json.loads(file.read_text()) == result
    assert (result["workers"], result["documents"]) == (1, 200)
    ratio = result["seconds"]["bare_encode_batch"][0] / result["seconds"]["command"][0]
    assert result["command_of_encode_batch"] == pytest.approx(ratio, abs=0.01)
    assert result["processor"]["seconds"]["command"][0] > 0
