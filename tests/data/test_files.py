"""Which files a path means, and every way a file can be wrong."""

import pytest

from jaxtron.config import UserError
from jaxtron.data.files.reader import STDLIB_BYTES, find_files, read_document


def test_folders_are_read_recursively_in_path_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a.txt", ".hidden", ".git/config", "a/empty.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    found = [file.relative_to(tmp_path.resolve()).as_posix() for file in find_files([str(tmp_path)])]
    assert found == ["a/b/c.txt", "a/z.txt", "a.txt", "b.txt"]


def test_paths_keep_the_order_they_are_given_in(tmp_path):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(name)
    paths = [str(tmp_path / "two.txt"), str(tmp_path / "one.txt")]
    assert [file.name for file in find_files(paths)] == ["two.txt", "one.txt"]


def test_the_standard_library_is_plenty_of_text_and_always_the_same():
    files = find_files(["python:stdlib"])
    assert files == find_files(["python:stdlib"])
    assert {"ast.py", "typing.py"} <= {file.name for file in files}
    assert not {"test", "tests", "site-packages", "idlelib"} & {part for file in files for part in file.parts[-3:-1]}
    assert 3_000_000 < sum(len(read_document(file).encode()) for file in files) <= STDLIB_BYTES


def test_line_ends_are_kept(tmp_path):
    (tmp_path / "text").write_bytes(b"one\r\ntwo\r")
    assert read_document(tmp_path / "text") == "one\r\ntwo\r"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 au lait", "file.txt is not UTF-8 text: byte 0xe9 at offset 3; convert it to UTF-8, or leave it out"),
        (b"\x7fELF\x00", "file.txt is binary: a zero byte at offset 4; convert it to UTF-8, or leave it out"),
    ],
)
def test_what_is_not_utf8_text_is_named_with_its_offset(tmp_path, content, message):
    (tmp_path / "file.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_document(tmp_path / "file.txt")


def test_paths_without_text_are_errors(tmp_path):
    with pytest.raises(UserError, match="no such file or folder .*missing; set --data.path to UTF-8 text"):
        find_files([str(tmp_path / "missing")])
    with pytest.raises(UserError, match="the folder .* has no files; put text there or give another"):
        find_files([str(tmp_path)])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="no text in --data.path .*: every file there is empty or made by Jaxtron"):
        find_files([str(tmp_path)])
