"""`python -m benchmarks.data_index [--documents N] [--output FOLDER]`: Megatron's indices, beside compiled loops.

The loops are C++ of our own that follow Megatron's rules element by element; results are compared before times. The
document and shuffle indices are NumPy's old shuffle in both, timed apart. Ours are by Numba where it is installed and
there is enough to do, and by NumPy alone beside it; what Numba's first call costs is told apart.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from jaxtron.config import UserError
from jaxtron.data.megatron import compiled as loops_of_numba
from jaxtron.data.megatron.blend import build_blend, normalize
from jaxtron.data.megatron.gpt_index import _sample_index, build_gpt_index

SEQUENCE_LENGTH = 2048
MEAN_LENGTHS = (100, 500, 3000)
BLENDS = (2, 10, 20, 100)
# milliseconds of Numba's import and of the first call of each loop in a process
FIRST_CALLS = """
import json, time
import numpy as np
from jaxtron.data.megatron import compiled as loops
found, start = {}, time.perf_counter()
def lap(name):
    global start
    found[name] = round(1e3 * (time.perf_counter() - start), 1)
    start = time.perf_counter()
loops.numba()
lap("import")
for loop in (loops.blend_few, loops.blend_many):
    loops.run(loop, np.ones(1), np.ones(1), np.zeros(1, np.int16), np.zeros(1, np.int64))
    lap(loop.__name__)
for name in ("cut_documents", "cut_long", "cut_longer"):
    loops.run(getattr(loops, name), np.ones(1, np.int64) << 40, 4, 1, np.zeros(2, np.int64))
    lap(name)
print(json.dumps(found))
"""
LOOPS = r"""
#include <algorithm>
#include <cstdint>
extern "C" void sample_index(const int32_t* sizes, const int32_t* documents, int64_t num_documents, int32_t length,
                             int32_t extra, int64_t num_samples, int32_t* rows) {
  int64_t position = 0;
  int32_t offset = 0;
  rows[0] = rows[1] = 0;
  for (int64_t sample = 1; sample <= num_samples; ++sample) {
    int32_t need = length + extra;
    for (;;) {
      const int32_t available = sizes[documents[position]] - offset;
      if (available >= need) { offset += need - extra; break; }
      if (position == num_documents - 1) { offset = sizes[documents[position]] - extra; break; }
      need -= available;
      ++position;
      offset = 0;
    }
    rows[2 * sample] = static_cast<int32_t>(position);
    rows[2 * sample + 1] = offset;
  }
}
extern "C" void blend(const double* weights, int32_t num_datasets, int64_t places, int64_t* counts, int16_t* datasets,
                      int64_t* samples) {
  for (int64_t place = 0; place < places; ++place) {
    const double time = std::max(static_cast<double>(place), 1.0);
    int32_t best = 0;
    double most = weights[0] * time - static_cast<double>(counts[0]);
    for (int32_t dataset = 1; dataset < num_datasets; ++dataset) {
      const double lag = weights[dataset] * time - static_cast<double>(counts[dataset]);
      if (lag > most) { most = lag; best = dataset; }
    }
    datasets[place] = static_cast<int16_t>(best);
    samples[place] = counts[best]++;
  }
}
"""


def main(argv: list[str]) -> int:
    """Measures, prints the JSON and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=40_000_000)
    parser.add_argument("--places", type=int, default=10_000_000, help="places of each blend")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="a .json file, or the folder for one")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        loops = compile_loops(Path(folder))
        result = {
            "benchmark": "data_index",
            **record.circumstances("cpu", "cpu", 1),
            "numpy": np.__version__,
            "numba": getattr(loops_of_numba.numba(), "__version__", None),
            "first_call_milliseconds": first_calls(Path(folder)) if loops_of_numba.numba() else None,
            "documents": options.documents,
            "sequence_length": SEQUENCE_LENGTH,
            "sample_order": [measure_order(loops, mean, options) for mean in MEAN_LENGTHS],
            "blend_places": options.places,
            "blends": [measure_blend(loops, count, options) for count in BLENDS],
        }
    print(json.dumps(result, indent=1))
    if options.output:
        record.write(record.destination(options.output, "data-index", "cpu"), result)
    return 0


def compile_loops(folder: Path) -> ctypes.CDLL:
    """The loops as a library; UserError without g++."""
    (folder / "loops.cpp").write_text(LOOPS)
    command = ["g++", "-O3", "-shared", "-fPIC", "-o", str(folder / "loops.so"), str(folder / "loops.cpp")]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"the loops to compare with need g++: {error}; install it") from error
    return ctypes.CDLL(str(folder / "loops.so"))


def first_calls(folder: Path) -> dict[str, dict[str, float]]:
    """What Numba costs a process at first: where loops are compiled, and where they are loaded from what was kept."""
    found, environment = {}, os.environ | {"NUMBA_CACHE_DIR": str(folder)}
    for way in ("compiled", "kept"):
        command = [sys.executable, "-c", FIRST_CALLS]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[way] = json.loads(done.stdout)
    return found


def by_numpy(part: Callable[[], Any]) -> Callable[[], Any]:
    """The same without Numba."""

    def run() -> Any:
        numba, loops_of_numba.numba = loops_of_numba.numba, lambda: None
        try:
            return part()
        finally:
            loops_of_numba.numba = numba

    return run


def measure_order(loops: ctypes.CDLL, mean_length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each part, and most bytes held while all is made."""
    random = np.random.default_rng(0)
    lengths = np.minimum(random.exponential(mean_length, options.documents), 1 << 20).astype(np.int32)
    settings = {"sequence_length": SEQUENCE_LENGTH, "samples": None, "seed": 1234}
    index = build_gpt_index(lengths, range(len(lengths)), **settings)
    documents, num_samples = index.documents, len(index)
    packed = lengths[documents].astype(np.int64) << 32

    def compiled() -> np.ndarray:
        rows = np.empty((num_samples + 1, 2), np.int32)
        sizes = ctypes.c_int64(len(documents)), SEQUENCE_LENGTH, 1, ctypes.c_int64(num_samples)
        loops.sample_index(_pointer(lengths), _pointer(documents), *sizes, _pointer(rows))
        return rows

    def ours() -> np.ndarray:
        return _sample_index(packed, sequence_length=SEQUENCE_LENGTH, extra=1, num_samples=num_samples)

    def shuffled(length: int, dtype: type) -> None:
        np.random.RandomState(1234).shuffle(np.arange(length, dtype=dtype))

    def whole() -> None:
        build_gpt_index(lengths, range(len(lengths)), **settings)

    np.testing.assert_array_equal(ours(), index.samples)
    np.testing.assert_array_equal(by_numpy(ours)(), index.samples)
    np.testing.assert_array_equal(compiled(), index.samples)
    parts = {
        "sample_index": ours,
        "sample_index_numpy": by_numpy(ours),
        "sample_index_compiled": compiled,
        "document_shuffle_int32": lambda: shuffled(len(documents), np.int32),
        "sample_shuffle_uint32": lambda: shuffled(num_samples, np.uint32),
        "whole": whole,
    }
    times = in_turns(parts, options.repeats)
    megatron = sum(times[name] for name in ("document_shuffle_int32", "sample_index_compiled", "sample_shuffle_uint32"))
    tracemalloc.start()
    whole()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    output = index.documents.nbytes + index.samples.nbytes + index.shuffle.nbytes
    return {
        "mean_length": mean_length,
        "samples": num_samples,
        "milliseconds": times,
        "compiled_over_ours": round(times["sample_index_compiled"] / times["sample_index"], 2),
        "compiled_over_numpy": round(times["sample_index_compiled"] / times["sample_index_numpy"], 2),
        "whole_compiled_over_ours": round(megatron / times["whole"], 2),
        "output_bytes": output,
        "peak_bytes_over_output": round(peak / output, 2),
    }


def measure_blend(loops: ctypes.CDLL, num_datasets: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a blend by random weights."""
    weights = np.random.default_rng(num_datasets).dirichlet(np.ones(num_datasets)).tolist()
    shares = normalize(weights)

    def compiled() -> tuple[np.ndarray, np.ndarray]:
        counts, datasets = np.zeros(num_datasets, np.int64), np.empty(options.places, np.int16)
        samples = np.empty(options.places, np.int64)
        pointers = [_pointer(array) for array in (counts, datasets, samples)]
        loops.blend(_pointer(shares), num_datasets, ctypes.c_int64(options.places), *pointers)
        return datasets, samples

    def ours() -> tuple[np.ndarray, np.ndarray]:
        built = build_blend(weights, options.places)
        return built.datasets, built.samples

    for way in (ours, by_numpy(ours)):
        for found, right in zip(way(), compiled(), strict=True):
            np.testing.assert_array_equal(found, right)
    times = in_turns({"ours": ours, "numpy": by_numpy(ours), "compiled": compiled}, options.repeats)
    over = {f"compiled_over_{name}": round(times["compiled"] / times[name], 2) for name in ("ours", "numpy")}
    return {"datasets": num_datasets, "milliseconds": times, **over}


def in_turns(parts: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of processor time of each, in turns; all is one thread, so other programs count less."""
    seconds = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            start = time.process_time()
            part()
            seconds[name].append(time.process_time() - start)
    return {name: round(1e3 * float(np.median(found)), 4) for name, found in seconds.items()}


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
