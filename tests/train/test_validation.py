"""Validation reads the same data, and says the same of it, however the work is cut."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from jaxtron.config import load
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import RunSession
from jaxtron.train.setup import open_run
from jaxtron.train.validation import validate
from tests.support.command_runs import small

MESHES = [
    "--mesh.fsdp 8 --train.microbatches 2",
    "--mesh.tensor 2 --mesh.fsdp 2 --train.microbatches 4",
    "--mesh.context 2 --mesh.tensor 2 --train.microbatches 2",
    "--mesh.pipe 2 --pipeline.schedule 1f1b --train.microbatches 2",
    "--mesh.pipe 2 --pipeline.schedule interleaved --pipeline.chunks 2 --train.microbatches 4",
]


class Read:
    """A source that remembers what was read of it."""

    def __init__(self, source):
        self.sequence_length = source.sequence_length
        self.samples: list[int] = []
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int):
        self.samples.append(index)
        return self._source[index]


def validated(folder: Path, words: str) -> tuple[float, list[int], float]:
    """The loss of the initial state by these settings, the samples that were read, and the sum of their weights."""
    flags = [*small(folder), "--model.num_layers", "4", "--train.global_batch", "16", *words.split()]
    with open_run(load(Configuration, None, flags), "run") as run:
        source, weights, evaluate = Read(run.data.validation), [], RunSession.evaluate

        def watched(session, params, batch):
            sums, counts = evaluate(session, params, batch)
            weights.append(float(counts["tokens"]))
            return sums, counts

        run = dataclasses.replace(run, data=dataclasses.replace(run.data, validation=source))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunSession, "evaluate", watched)
            loss = validate(run, run.state)["validation_loss"]
        assert sum(weights) == sum(float(source[index].weights.sum()) for index in set(source.samples))
        return loss, source.samples, sum(weights)


def test_validation_does_not_depend_on_microbatches(tmp_path: Path):
    # spread over more samples than that
    whole = validated(tmp_path, "--train.validation_batches 2")
    assert len(set(whole[1])) == 32 and math.isfinite(whole[0])
    in_parts = validated(tmp_path, "--train.validation_batches 2 --train.microbatches 2")
    assert in_parts[1] == whole[1] and in_parts[2] == whole[2]
    assert in_parts[0] == pytest.approx(whole[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["2", "none"])
def test_validation_does_not_depend_on_the_mesh(batches: str, tmp_path: Path):
    loss, samples, weight = validated(tmp_path, f"--train.validation_batches {batches}")
    # the last batch of all the data is not full
    assert batches == "2" or len(set(samples)) % 16
    for mesh in MESHES:
        found, read, found_weight = validated(tmp_path, f"--train.validation_batches {batches} {mesh}")
        assert set(read) == set(samples) and found_weight == weight, mesh
        assert np.float32(found) == pytest.approx(loss, rel=1e-5), mesh
