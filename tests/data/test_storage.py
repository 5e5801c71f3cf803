"""Remote files, here those of fsspec's memory file system: what is fetched, kept, and refused."""

import pickle

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jaxtron.config import UserError
from jaxtron.data.files.storage import cache_root, is_remote, local_copy, open_bytes
from jaxtron.data.megatron.indexed import IndexedReader, IndexedWriter


@pytest.fixture
def remote(tmp_path):
    """A pair of files at memory://bucket/a, and the same at a local prefix."""
    local = str(tmp_path / "a")
    rng = np.random.default_rng(0)
    with IndexedWriter(local, np.uint16) as writer:
        for size in (5, 0, 300, 1):
            writer.add_item(rng.integers(0, 1000, size))
            writer.end_document()
    system = fsspec.filesystem("memory")
    for name in ("bin", "idx"):
        system.put(f"{local}.{name}", f"/bucket/a.{name}")
    yield "memory://bucket/a", local
    system.rm("/bucket", recursive=True)


def test_remote_files_read_like_local_ones(remote, tmp_path):
    prefix, local = remote
    reader, expected = IndexedReader(prefix, str(tmp_path / "cache")), IndexedReader(local)
    for index in range(4):
        np.testing.assert_array_equal(reader.get(index), expected.get(index))
    parts = [(2, 10, 5), (1, 0, None), (0, 2, None), (2, 300, 0)]
    for found, right in zip(reader.get_parts(parts), expected.get_parts(parts), strict=True):
        np.testing.assert_array_equal(found, right)
    again = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(again.get(2), expected.get(2))


def test_only_the_bytes_asked_for_are_fetched(remote, tmp_path, monkeypatch):
    fetched = []
    cat_file = MemoryFileSystem.cat_file

    def counting(self, path, start=None, end=None, **options):
        fetched.append((path, start, end))
        return cat_file(self, path, start, end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counting)
    reader = IndexedReader(remote[0], str(tmp_path / "cache"))
    reader.get_parts([(2, 10, 5), (1, 0, None), (3, 0, None)])
    assert fetched == [("/bucket/a.bin", 30, 40), ("/bucket/a.bin", 610, 612)]


def test_the_index_is_copied_once_and_anew_when_it_changes(remote, tmp_path, monkeypatch):
    opened = []
    open_ = MemoryFileSystem.open
    monkeypatch.setattr(MemoryFileSystem, "open", lambda *given, **named: opened.append(1) or open_(*given, **named))
    for _ in range(2):
        copy = local_copy("memory://bucket/a.idx", tmp_path / "cache")
    assert len(opened) == 1 and len(list((tmp_path / "cache/remote").iterdir())) == 1
    fsspec.filesystem("memory").pipe_file("/bucket/a.idx", b"other")
    assert local_copy("memory://bucket/a.idx", tmp_path / "cache") != copy
    with pytest.raises(UserError, match=r"memory://bucket/a\.idx is damaged at byte 5"):
        IndexedReader(remote[0], str(tmp_path / "cache"))


def test_remote_files_are_merged_into_local_ones(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("jaxtron.data.megatron.indexed.COPIED", 7)
    with IndexedWriter(str(tmp_path / "b"), np.uint16) as writer:
        writer.add_index(remote[0])
    for name in ("bin", "idx"):
        assert (tmp_path / f"b.{name}").read_bytes() == (tmp_path / f"a.{name}").read_bytes()


def test_a_file_that_shrinks_while_it_is_read_is_an_error(remote, tmp_path):
    reader = IndexedReader(remote[0], str(tmp_path / "cache"))
    fsspec.filesystem("memory").pipe_file("/bucket/a.bin", bytes(100))
    with pytest.raises(UserError, match=r"memory://bucket/a\.bin gave 90 of 600 bytes from byte 10 on"):
        reader.get(2)
    fsspec.filesystem("memory").rm("/bucket/a.bin")
    with pytest.raises(UserError, match=r"cannot read memory://bucket/a\.bin"):
        reader.get(2)


def test_what_cannot_be_read_is_named(remote, tmp_path):
    for path in ("memory://bucket/b.bin", str(tmp_path / "b.bin")):
        with pytest.raises(UserError, match=rf"cannot read {path}: "):
            open_bytes(path)
    with pytest.raises(UserError, match=r"memory://bucket/b\.idx"):
        IndexedReader("memory://bucket/b", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="nothing://a is of no known kind"):
        open_bytes("nothing://a")


def test_a_missing_package_is_named(monkeypatch):
    def missing(path):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r's3://b/a needs .*Install s3fs.*pip install "jaxtron\[s3\]"'):
        open_bytes("s3://b/a")
    with pytest.raises(UserError, match=r'pip install "jaxtron\[gcs\]"'):
        open_bytes("gs://b/a")


def test_an_index_that_cannot_be_kept_is_an_error(remote, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot copy memory://bucket/a.idx .*set the cache directory"):
        IndexedReader(remote[0], str(tmp_path / "file"))


def test_paths_and_the_cache(monkeypatch, tmp_path):
    assert is_remote("gs://b/a") and not is_remote("/data/a") and not is_remote("a")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / "jaxtron" and str(cache_root("/x")) == "/x"
