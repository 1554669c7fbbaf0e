"""Records that outlive a restart, whatever became of their file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tabane.model import Value
from tabane.node import journal as module
from tabane.node.journal import Journal


class Note(Value, frozen=True):
    number: int
    text: str = ""


@contextmanager
def journal(path: Path, max_bytes: int = 1 << 20) -> Iterator[Journal[Note]]:
    journal = Journal(path, Note, max_bytes=max_bytes)
    yield journal
    journal.close()


def numbers(journal: Journal[Note]) -> list[int]:
    return [note.number for note in journal.recent()]


def test_records_outlive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "events.log"
    with journal(path) as first:
        assert first.recent() == ()
        first.add(Note(1, "a\nb"))
        first.add(Note(2))
    with journal(path) as second:
        assert second.recent() == (Note(1, "a\nb"), Note(2))
        second.add(Note(3))
    assert path.read_text() == '{"number":1,"text":"a\\nb"}\n{"number":2}\n{"number":3}\n'
    with journal(path) as third:
        assert numbers(third) == [1, 2, 3]


@pytest.mark.parametrize("cut", [b'{"number":2', b'{"number":2}', b"{", b"\xff", b"\0\0\0\0"])
def test_a_line_that_was_cut_spoils_no_other(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "events.log"
    path.write_bytes(b'{"number":1}\n' + cut)
    with journal(path) as first:
        first.add(Note(3))
    with journal(path) as second:
        assert [number for number in numbers(second) if number != 2] == [1, 3]
        assert numbers(second) == numbers(first)


def test_lines_of_another_version_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.log"
    path.write_text('{"number":1,"more":[]}\n{"number":"x"}\n[]\n\n{"name":"y"}\n{"number":2}\n')
    with journal(path) as found:
        assert numbers(found) == [1, 2]


def test_it_is_rotated_and_reads_both_files(tmp_path: Path) -> None:
    path = tmp_path / "events.log"
    with journal(path, max_bytes=100) as first:
        for number in range(1000, 1022):
            first.add(Note(number))
        assert numbers(first) == list(range(1000, 1022))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["events.log", "events.log.1"]
    assert path.stat().st_size + (tmp_path / "events.log.1").stat().st_size < 250
    with journal(path, max_bytes=100) as second:
        kept = numbers(second)
        assert kept == list(range(kept[0], 1022))
        assert len(kept) >= 7


def test_memory_keeps_the_newest_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 3)
    with journal(tmp_path / "events.log") as first:
        for number in range(10):
            first.add(Note(number))
        assert numbers(first) == [7, 8, 9]
    with journal(tmp_path / "events.log") as second:
        assert numbers(second) == [7, 8, 9]


def test_followers_get_what_comes_until_they_leave(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []
    with journal(tmp_path / "events.log") as found:
        found.add(Note(1))
        leave = found.follow(lambda note: heard.append(("a", note.number)))
        found.follow(lambda note: heard.append(("b", note.number)))
        found.add(Note(2))
        leave()
        leave()
        found.add(Note(3))
    assert sorted(heard) == [("a", 2), ("b", 2), ("b", 3)]


def test_a_follower_may_leave_while_it_hears(tmp_path: Path) -> None:
    heard: list[int] = []
    with journal(tmp_path / "events.log") as found:

        def hear_once(note: Note) -> None:
            heard.append(note.number)
            leave()

        leave = found.follow(hear_once)
        found.add(Note(1))
        found.add(Note(2))
    assert heard == [1]


def test_a_record_is_on_file_before_a_follower_hears_of_it(tmp_path: Path) -> None:
    path = tmp_path / "events.log"
    seen: list[bytes] = []
    with journal(path) as found:
        found.follow(lambda _: seen.append(path.read_bytes()))
        found.add(Note(1))
    assert seen == [b'{"number":1}\n']
