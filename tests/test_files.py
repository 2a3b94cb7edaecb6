"""Files are whole or not there."""

import hashlib
import os
from pathlib import Path

import pytest

from vmamba.files import replacing, save_figure, sha256, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_text_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_atomically(path, "ä\r\nb\n")
    assert path.read_bytes() == "ä\r\nb\n".encode()
    assert sha256(path) == hashlib.sha256("ä\r\nb\n".encode()).hexdigest()
    assert names(path.parent) == ["a.txt"]


def test_what_was_there_stays_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(f"half {1 / 0}")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_figure_is_whole_too(tmp_path: Path) -> None:
    class Figure:
        def savefig(self, path: Path, **how: object) -> None:
            path.write_text(str(how))
            if how["dpi"] == 0:
                raise OSError(28, "No space left on device")

    save_figure(Figure(), tmp_path / "a.pdf", dpi=90)
    with pytest.raises(OSError, match="No space left"):
        save_figure(Figure(), tmp_path / "a.pdf", dpi=0)
    assert (tmp_path / "a.pdf").read_text() == "{'format': 'pdf', 'dpi': 90}"
    assert names(tmp_path) == ["a.pdf"]


def test_the_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == tmp_path  # a rename is atomic within a file system only
    assert path.read_text() == "new"


def test_the_longest_name_that_a_file_may_have(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("n" * 255), "text")
    with pytest.raises(OSError, match="name too long"):
        write_atomically(tmp_path / ("n" * 256), "text")
    assert names(tmp_path) == ["n" * 255]


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes")
def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with replacing(pipe) as temporary, temporary.open("w") as file:
            file.write("through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "folder", "text")
    assert names(tmp_path) == ["folder"]
