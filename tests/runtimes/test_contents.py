"""What a checkpoint's directory says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tabane.errors import Corrupt
from tabane.runtimes.contents import RECORD, Contents, read_contents, write_contents


class Told(Contents, frozen=True, kw_only=True):
    word: str


def read(directory: Path) -> Told:
    return read_contents(directory, Told, "something", ("needed",))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "needed").write_bytes(b"1234")
    (tmp_path / "more").write_bytes(b"12")
    write_contents(Told(word="hello"), tmp_path)
    return tmp_path


def test_it_comes_back_with_the_sizes_of_all_files(directory: Path) -> None:
    assert read(directory) == Told(word="hello", sizes={"needed": 4, "more": 2})
    write_contents(Told(word="again"), directory)
    assert read(directory).sizes == {"needed": 4, "more": 2}


@pytest.mark.parametrize(("name", "size"), [("needed", 4), ("more", 2)])
def test_what_is_not_whole_is_refused(directory: Path, name: str, size: int) -> None:
    (directory / name).write_bytes(b"1")
    with pytest.raises(Corrupt, match=f"has 1 bytes of {name}, which has {size} bytes"):
        read(directory)
    (directory / name).unlink()
    with pytest.raises(Corrupt, match=f"has nothing of {name}, which has {size} bytes"):
        read(directory)


def test_what_says_nothing_that_is_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="no whole checkpoint of something"):
        read(tmp_path)
    (tmp_path / RECORD).write_text('{"word": "hello", "format": 2}')
    with pytest.raises(Corrupt, match="a checkpoint of format 2, not 1"):
        read(tmp_path)
    (tmp_path / RECORD).write_text('{"word": "hello"}')
    with pytest.raises(Corrupt, match="has nothing of needed, which has an unknown number"):
        read(tmp_path)
