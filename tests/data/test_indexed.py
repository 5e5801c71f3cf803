"""Megatron's .bin and .idx: its bytes, every kind of content, and damaged files."""

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from jaxtron.config import UserError
from jaxtron.data.megatron.indexed import CODES, DTYPES, IndexedReader, IndexedWriter, token_dtype

# Megatron's own writer wrote these
TEXT_INDEX = (
    "4d4d49444944580000" "0100000000000000" "08" "0200000000000000" "0300000000000000" "03000000" "02000000"
    "0000000000000000" "0600000000000000" "0000000000000000" "0100000000000000" "0200000000000000"
)  # fmt: skip
TEXT_SHA256 = "416ba3f8d9601192c5b0c9424ce7e61d6ac2d9d464dba8e5ee55deb8247de3aa"
MULTIMODAL_SHA256 = "e4d6f9cf66a887828122c0b056d398b6d9dd337fd3c019ce6c5cb21bdb47e430"


def write(prefix, documents, dtype=np.uint16, modes=None):
    """Documents are lists of sequences; modes, if any, are of all sequences."""
    modes_left = iter(modes or [])
    with IndexedWriter(str(prefix), dtype, multimodal=modes is not None) as writer:
        for document in documents:
            for sequence in document:
                writer.add_item(sequence, **({} if modes is None else {"mode": next(modes_left)}))
            writer.end_document()
    return str(prefix)


def content(prefix):
    """Everything a reader tells, as plain values."""
    reader = IndexedReader(str(prefix))
    sequences = [reader.get(index).tolist() for index in range(len(reader))]
    modes = None if reader.modes is None else reader.modes.tolist()
    return reader.dtype, sequences, reader.documents.tolist(), modes


def random_documents(rng, dtype, num_documents=20):
    info = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else None
    low, high = (info.min, info.max) if info else (-1000, 1000)
    return [
        [rng.integers(low, high, size, endpoint=True).astype(dtype) for size in rng.integers(0, 9, rng.integers(0, 4))]
        for _ in range(num_documents)
    ]


def test_text_files_are_megatrons_to_the_byte(tmp_path):
    write(tmp_path / "a", [[[1, 2, 3]], [[4, 5]]])
    assert (tmp_path / "a.idx").read_bytes().hex() == TEXT_INDEX
    assert hashlib.sha256((tmp_path / "a.idx").read_bytes()).hexdigest() == TEXT_SHA256
    assert (tmp_path / "a.bin").read_bytes().hex() == "01000200030004000500"


def test_multimodal_files_are_megatrons_to_the_byte(tmp_path):
    write(tmp_path / "a", [[[1, 2, 3], [4, 5]], [[6, 7]]], np.int32, modes=[0, 1, 0])
    index = (tmp_path / "a.idx").read_bytes()
    assert len(index) == 97 and hashlib.sha256(index).hexdigest() == MULTIMODAL_SHA256
    assert content(tmp_path / "a")[3] == [0, 1, 0]


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("code", DTYPES)
def test_what_is_written_is_read(tmp_path, code, multimodal):
    rng = np.random.default_rng(code)
    documents = random_documents(rng, DTYPES[code])
    sequences = [sequence for document in documents for sequence in document]
    modes = rng.integers(0, 2, len(sequences)).tolist() if multimodal else None
    write(tmp_path / "a", documents, DTYPES[code], modes)
    bounds = np.cumsum([0, *(len(document) for document in documents)])
    expected = DTYPES[code], [sequence.tolist() for sequence in sequences], bounds.tolist(), modes
    assert content(tmp_path / "a") == expected
    assert (tmp_path / "a.bin").read_bytes() == b"".join(sequence.tobytes() for sequence in sequences)
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("documents", [[], [[]], [[[]]], [[], [[], []], []]])
def test_nothing_is_something(tmp_path, documents):
    write(tmp_path / "a", documents)
    sequences = [sequence for document in documents for sequence in document]
    bounds = np.cumsum([0, *(len(document) for document in documents)]).tolist()
    assert content(tmp_path / "a") == (np.dtype("u2"), sequences, bounds, None)


def test_a_part_of_a_sequence(tmp_path):
    reader = IndexedReader(write(tmp_path / "a", [[[1, 2, 3]], [[4, 5]]]))
    assert len(reader) == 2
    assert reader.get(1, offset=1).tolist() == [5]
    assert reader.get(0, 1, 1).tolist() == [2]
    assert reader.get(0, 3).tolist() == reader.get(0, 1, 0).tolist() == []
    with pytest.raises(ValueError, match="read-only"):
        reader.get(0)[0] = 7
    for asked in [(2,), (-1,), (0, 4), (0, 1, 3), (0, -1), (0, 0, -1)]:
        with pytest.raises(IndexError, match=str(tmp_path)):
            reader.get(*asked)


def test_ids_are_kept_or_refused(tmp_path):
    with IndexedWriter(str(tmp_path / "a"), np.uint16) as writer:
        writer.add_item(np.array([1, 65535], np.int64))
        for ids in ([1, 65536], [-1], np.array([0.5])):
            with pytest.raises(UserError, match=r"a\.bin: the id \S+ of sequence 1 does not fit uint16"):
                writer.add_item(ids)
        writer.end_document()
    assert content(tmp_path / "a")[1] == [[1, 65535]]


def test_token_dtype_is_megatrons():
    sizes = [1, 65499, 65500, 10**6, None]
    assert [token_dtype(size).name for size in sizes] == ["uint16", "uint16", "int32", "int32", "int32"]


def test_files_are_merged(tmp_path):
    rng = np.random.default_rng(0)
    parts = [random_documents(rng, np.int32, size) for size in (5, 0, 7, 1)]
    for number, part in enumerate(parts):
        write(tmp_path / str(number), part, np.int32)
    with IndexedWriter(str(tmp_path / "merged"), np.int32) as writer:
        writer.add_item([1, 2])
        writer.end_document()
        for number in range(len(parts)):
            writer.add_index(str(tmp_path / str(number)))
    write(tmp_path / "whole", [[[1, 2]], *(document for part in parts for document in part)], np.int32)
    for name in ("bin", "idx"):
        assert (tmp_path / f"merged.{name}").read_bytes() == (tmp_path / f"whole.{name}").read_bytes()


def test_multimodal_files_are_merged(tmp_path):
    write(tmp_path / "a", [[[1], [2]]], np.int32, modes=[0, 1])
    write(tmp_path / "none", [], np.int32, modes=[])
    with IndexedWriter(str(tmp_path / "merged"), np.int32, multimodal=True) as writer:
        for name in ("a", "none", "a"):
            writer.add_index(str(tmp_path / name))
    assert content(tmp_path / "merged") == (np.dtype("i4"), [[1], [2], [1], [2]], [0, 2, 4], [0, 1, 0, 1])


@pytest.mark.parametrize(("dtype", "modes", "what"), [(np.int32, None, "dtype int32"), (np.uint16, [0], "multimodal")])
def test_unlike_files_are_not_merged(tmp_path, dtype, modes, what):
    write(tmp_path / "a", [[[1]]], dtype, modes)
    with pytest.raises(UserError, match=what), IndexedWriter(str(tmp_path / "b"), np.uint16) as writer:
        writer.add_index(str(tmp_path / "a"))
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


def test_an_unfinished_writer_leaves_the_old_files(tmp_path):
    write(tmp_path / "a", [[[1]]])
    with pytest.raises(KeyError), IndexedWriter(str(tmp_path / "a"), np.uint16) as writer:
        writer.add_item([2])
        raise KeyError
    with pytest.raises(ValueError, match="1 sequences"), IndexedWriter(str(tmp_path / "a"), np.uint16) as writer:
        writer.add_item([2])
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"] and content(tmp_path / "a")[1] == [[1]]
    write(tmp_path / "a", [[[3]]])
    assert content(tmp_path / "a")[1] == [[3]]


def test_bad_uses_of_the_writer(tmp_path):
    with pytest.raises(UserError, match="cannot hold complex128"):
        IndexedWriter(str(tmp_path / "a"), np.complex128)
    with pytest.raises(UserError, match="cannot write .*missing/a"), IndexedWriter(str(tmp_path / "missing/a"), "u2"):
        pass
    with pytest.raises(UserError, match="mode 1"), IndexedWriter(str(tmp_path / "a"), np.uint16) as writer:
        writer.add_item([1], mode=1)


def patched(index, offset, layout, value):
    return index[:offset] + struct.pack(layout, value) + index[offset + struct.calcsize(layout) :]


# vector 1: lengths at 34, pointers at 42, document bounds at 58, the end at 82
DAMAGES = {
    "empty": (lambda index: b"", "damaged at byte 0"),
    "half a header": (lambda index: index[:20], "damaged at byte 20"),
    "cut in the bounds": (lambda index: index[:81], "damaged at byte 81.*need 82 bytes"),
    "too long": (lambda index: index + b"\0", "damaged at byte 82"),
    "magic": (lambda index: patched(index, 0, "<B", 0), "no Megatron index"),
    "version": (lambda index: patched(index, 9, "<Q", 2), "damaged at byte 9: the version is 2"),
    "dtype 0": (lambda index: patched(index, 17, "<B", 0), "damaged at byte 17"),
    "dtype 9": (lambda index: patched(index, 17, "<B", 9), "damaged at byte 17"),
    "wider dtype": (lambda index: patched(index, 17, "<B", 4), "damaged at byte 50"),
    "sequences": (lambda index: patched(index, 18, "<Q", 2**63), "sequences"),
    "no bounds": (lambda index: patched(index, 26, "<Q", 0), "damaged at byte 26"),
    "negative length": (lambda index: patched(index, 38, "<i", -1), "byte 38: the length of sequence 1 is -1"),
    "longer": (lambda index: patched(index, 34, "<i", 4), "byte 50: sequence 1 begins at byte 6"),
    "longest": (lambda index: patched(index, 38, "<i", 2**31 - 1), r"a\.bin ends too early"),
    "misaligned": (lambda index: patched(index, 50, "<q", 5), "byte 50: sequence 1 begins at byte 5"),
    "negative pointer": (lambda index: patched(index, 42, "<q", -2), "byte 42: sequence 0 begins at byte -2"),
    "pointer out of range": (lambda index: patched(index, 50, "<q", 2**62), "byte 50"),
    "first bound": (lambda index: patched(index, 58, "<q", 1), "byte 58: the first document"),
    "falling bounds": (lambda index: patched(index, 66, "<q", 3), "byte 74: document bound 2 is 2, less than 3"),
    "negative bound": (lambda index: patched(index, 66, "<q", -1), "byte 66: document bound 1 is -1"),
    "last bound": (lambda index: patched(index, 74, "<q", 3), "byte 74: the last document ends at sequence 3"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_refused_by_file_and_byte(tmp_path, damage):
    prefix = write(tmp_path / "a", [[[1, 2, 3]], [[4, 5]]])
    change, message = DAMAGES[damage]
    path = Path(f"{prefix}.idx")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        IndexedReader(prefix)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_must_be_as_many_as_the_index_says(tmp_path):
    prefix = write(tmp_path / "a", [[[1, 2, 3]], [[4, 5]]])
    path = Path(f"{prefix}.bin")
    whole = path.read_bytes()
    for changed, message in [(whole[:-1], "too early: it has 9"), (b"", "has 0"), (whole + b"\0\0", "too long")]:
        path.write_bytes(changed)
        with pytest.raises(UserError, match=message):
            IndexedReader(prefix)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.bin: No such file"):
        IndexedReader(prefix)
    with pytest.raises(UserError, match=r"cannot read .*a\.bin\.idx: No such file"):
        IndexedReader(f"{prefix}.bin")


def test_fuzzed_files_are_refused_or_read_as_they_were(tmp_path):
    """Only what the files say once may differ: tokens, document bounds, modes, signedness of the type."""
    rng = np.random.default_rng(0)
    outcomes = {"refused": 0, "read": 0}
    for code in (1, 4, 8):
        documents = random_documents(rng, DTYPES[code], 6)
        num_sequences = sum(map(len, documents))
        for modes in (None, [0] * num_sequences):
            prefix = write(tmp_path / "a", documents, DTYPES[code], modes)
            files = {name: Path(f"{prefix}.{name}").read_bytes() for name in ("idx", "bin")}
            bounds = len(files["idx"]) - 8 * (len(documents) + 1) - (num_sequences if modes else 0)
            for _ in range(100):
                for name, data in files.items():
                    Path(f"{prefix}.{name}").write_bytes(data)
                name = "idx" if rng.random() < 0.85 else "bin"
                changed = damage_at_random(rng, files[name])
                Path(f"{prefix}.{name}").write_bytes(changed)
                try:
                    reader = IndexedReader(prefix)
                except UserError as error:
                    outcomes["refused"] += 1
                    assert f"a.{name}" in str(error) or "a.bin" in str(error)
                    continue
                outcomes["read"] += 1
                read = b"".join(reader.get(index).tobytes() for index in range(len(reader)))
                assert read == (changed if name == "bin" else files["bin"])
                assert reader.documents[0] == 0 and reader.documents[-1] == len(reader) == num_sequences
                assert (np.diff(reader.documents) >= 0).all()
                if name == "idx":
                    assert changed[:17] == files["idx"][:17] and changed[18:bounds] == files["idx"][18:bounds]
                    assert reader.dtype.itemsize == DTYPES[code].itemsize
    assert outcomes["refused"] > 350 and outcomes["read"] > 50


def damage_at_random(rng, data):
    """Cut short, lengthened, or one to four bytes changed."""
    kind = rng.random()
    if kind < 0.15:
        return data[: rng.integers(len(data))]
    if kind < 0.25:
        return data + rng.bytes(rng.integers(1, 30))
    changed = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 5)):
        changed[place] = rng.integers(256) if kind < 0.6 else changed[place] ^ (1 << rng.integers(8))
    return bytes(changed)


def test_every_type_has_one_code():
    assert len(CODES) == len(DTYPES) == 8


@pytest.mark.slow
def test_a_gigabyte_of_random_documents(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 2**31 - 1, 2**28, dtype=np.int32)
    # a few long documents and very many short ones, some of them empty
    cuts = np.concatenate([rng.integers(0, len(tokens), 2000), rng.integers(0, 5_000_000, 400_000)])
    starts = np.concatenate([[0], np.sort(cuts)])
    ends = np.concatenate([starts[1:], [len(tokens)]])
    with IndexedWriter(str(tmp_path / "a"), np.int32) as writer:
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            writer.add_item(tokens[start:end])
            writer.end_document()
    reader = IndexedReader(str(tmp_path / "a"))
    assert (tmp_path / "a.bin").stat().st_size == 2**30
    np.testing.assert_array_equal(reader.lengths, ends - starts)
    np.testing.assert_array_equal(reader.documents, np.arange(len(starts) + 1))
    for index in rng.permutation(len(reader)).tolist():
        np.testing.assert_array_equal(reader.get(index), tokens[starts[index] : ends[index]])
