"""Checkpoints that are not whole: one line that names the file, or the same numbers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.weights.hub import hub_settings
from jaxtron.weights.megatron.files import open_checkpoint
from tests.megatron.writer import torch_zip, write_distributed, write_ranks
from tests.weights.megatron.models import (
    ARGS,
    EXPERTS,
    Arrays,
    boxes_of,
    parallelism,
    saved_by_ranks,
    saved_distributed,
    whole_tensors,
)


def read(folder: Path) -> tuple[dict, Arrays]:
    """A checkpoint's settings and tensors."""
    files, _ = open_checkpoint(folder)
    return hub_settings(folder).tree, {name: files.read(name) for name in files.tensors}


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """A file with a byte that is another, some that are gone, more, or cut off."""
    place, size = int(random.integers(len(content))), int(random.integers(1, 40))
    kind = random.integers(6)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[place + size :]
    if kind == 2:
        return content[:place] + random.bytes(size) + content[place:]
    if kind == 3:
        return content[:place] + random.bytes(size) + content[place + size :]
    flipped = content[place] ^ (1 << int(random.integers(8)))
    return content[:place] + bytes([flipped]) + content[place + 1 :]


FORMS: dict[str, Callable[[Path], Path]] = {
    "ranks": lambda folder: saved_by_ranks(folder, ARGS, whole_tensors(ARGS), tensor=2),
    "old ranks": lambda folder: saved_by_ranks(folder, ARGS, whole_tensors(ARGS), stages=2, old=True),
    "distributed": lambda folder: saved_distributed(folder, EXPERTS, whole_tensors(EXPERTS), tensor=2, expert=2),
    "with common.pt": lambda folder: saved_distributed(folder, ARGS, whole_tensors(ARGS), form="numbered", common=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_damage_is_told_in_a_line_or_changes_nothing(form: str, tmp_path: Path):
    """What has no checksum can say something else: settings in pickles of the index, and of files before torch 1.6."""
    folder = FORMS[form](tmp_path / "run")
    expected = read(folder)
    files, random, refused, other = (
        sorted(path for path in folder.rglob("*") if path.is_file()),
        np.random.default_rng(0),
        0,
        0,
    )
    for number in range(240):
        path = files[number % len(files)]
        content = path.read_bytes()
        path.write_bytes(damaged(content, random))
        try:
            settings, found = read(folder)
            is_same = settings == expected[0] and found.keys() == expected[1].keys()
            same = is_same and all(np.array_equal(found[name], expected[1][name]) for name in found)
            other += not same
            assert same or not _has_checksums(path, form), (path, number)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path) in str(error), error
            assert len(str(error)) < 600
        path.write_bytes(content)
    assert refused > 150, (refused, other)


def _has_checksums(path: Path, form: str) -> bool:
    return form != "old ranks" and path.suffix in (".pt", ".distcp")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.rglob(name)).unlink()


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.rglob(name)).write_text(content) and None


RANKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a rank": (
        without("mp_rank_01_001/model_optim_rng.pt"),
        "lacks the file of rank (1, 1, 0) of tensor, pipeline and",
    ),
    "tracker": (text("latest*", "seven"), "must be the number of an iteration or release, not 'seven'"),
    "empty": (text("mp_rank_01_000/*.pt", ""), "mp_rank_01_000/model_optim_rng.pt is empty"),
    "pointer": (
        text("mp_rank_01_000/*.pt", "version https://git-lfs.github.com/spec/v1"),
        "is a pointer of Git LFS and not what it points to",
    ),
    "text": (text("mp_rank_01_000/*.pt", "hello hello hello hello hello"), "is no file of torch"),
    "folder": (
        lambda folder: next(folder.rglob("mp_rank_01_000")).rename(folder / "iter_0000007" / "mp_rank_9") and None,
        "is no rank's folder, such as mp_rank_00",
    ),
    "more": (
        lambda folder: next(folder.rglob("mp_rank_01_000")).rename(folder / "iter_0000007" / "mp_rank_07_000") and None,
        "lacks the file of rank (1, 0, 0)",
    ),
    "no model": (
        lambda folder: next(folder.rglob("mp_rank_01_000/*.pt")).write_bytes(torch_zip({"a": 1})) and None,
        "has no model",
    ),
}


@pytest.mark.parametrize("what", RANKS)
def test_ranks_that_are_not_whole(what: str, tmp_path: Path):
    damage, said = RANKS[what]
    damage(saved_by_ranks(tmp_path, ARGS, whole_tensors(ARGS), tensor=2, stages=2))
    check_refused(tmp_path, said)


DISTRIBUTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file": (without("__1_0.distcp"), "cannot read"),
    "no description": (without("metadata.json"), "metadata.json is not the JSON of a finished checkpoint"),
    "zarr": (
        text("metadata.json", '{"sharded_backend": "zarr"}'),
        "has sharded_backend 'zarr': only torch_dist is read",
    ),
    "cut": (lambda folder: _cut(folder / "__0_0.distcp"), "ends within"),
    "swapped": (lambda folder: _swap(folder), "bring back"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def _swap(folder: Path) -> None:
    first, second = folder / "__0_0.distcp", folder / "__1_0.distcp"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


@pytest.mark.parametrize("what", DISTRIBUTED)
def test_distributed_files_that_are_not_whole(what: str, tmp_path: Path):
    damage, said = DISTRIBUTED[what]
    damage(saved_distributed(tmp_path, ARGS, whole_tensors(ARGS), tensor=2, files=3))
    check_refused(tmp_path, said)


def check_refused(folder: Path, said: str) -> None:
    """One line with these words."""
    with pytest.raises(UserError) as error:
        read(folder)
    assert said in str(error.value) and "\n" not in str(error.value), error.value


def test_boxes_that_overlap_or_leave_something_out(tmp_path: Path):
    arrays = whole_tensors(ARGS)
    name = "output_layer.weight"
    whole = {key: boxes_of(key, array, 2, 1, True) for key, array in arrays.items()}
    (zero, first), (half, second) = whole[name]
    for boxes, said in (
        ([(zero, first), ((half[0] - 1, 0), second)], "overlap"),
        ([(zero, first[:-1]), (half, second)], "leave something out"),
    ):
        folder = write_distributed(tmp_path / said, whole | {name: boxes}, ARGS)
        check_refused(folder, f"has {name} of shape")
        check_refused(folder, f"its parts {said}")


def test_tensors_that_do_not_fit_together(tmp_path: Path):
    arrays = whole_tensors(ARGS)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    lacking = {key: array for key, array in arrays.items() if key != name}
    args = ARGS | parallelism(tensor=2)
    cases = {
        "lacking": (
            {"00": {"model": arrays}, "01": {"model": lacking}},
            args,
            f"not all ranks have their part of {name}",
        ),
        "form": (
            {"00": {"model": arrays}, "01": {"model": arrays | {name: arrays[name][:-1]}}},
            args,
            f"has {name} of another form than",
        ),
        "rows": (
            {"00": {"model": arrays | {"decoder.layers.0.self_attention.linear_qkv.weight": arrays[name]}}},
            ARGS,
            "linear_qkv.weight of shape [24, 8], and args make it 48 rows",
        ),
        "type": ({"00": {"model": arrays | {name: np.zeros((24, 8), np.uint8)}}}, ARGS, "is in U8: only F64, F32"),
        "not finite": (
            {"00": {"model": arrays | {name: arrays[name] * np.nan}}},
            ARGS,
            f"numbers in {name} that are not",
        ),
    }
    for what, (ranks, given, said) in cases.items():
        check_refused(write_ranks(tmp_path / what, ranks, given), said)
