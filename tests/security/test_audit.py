"""The audit log on a real disk, and on one that is full."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tabane.security import audit
from tabane.security.audit import AuditLog, Line, read_lines


def line(number: int, target: str = "tokyo/tokyo-1:7") -> Line:
    return Line(1.5, "peer", 0, number, "signal 15", target)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


@pytest.fixture
def log(path: Path) -> Iterator[AuditLog]:
    log = AuditLog(path)
    yield log
    log.close()


def test_a_line_is_there_at_once(log: AuditLog, path: Path) -> None:
    log.add(line(1))
    log.add(line(2))
    assert [each.pid for each in read_lines(path)] == [1, 2]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes().splitlines()[0] == (
        b'{"at":1.5,"kind":"peer","uid":0,"pid":1,"action":"signal 15","target":"tokyo/tokyo-1:7"}'
    )


def test_names_cannot_forge_lines(log: AuditLog, path: Path) -> None:
    log.add(line(1, 'x\n{"at":0}'))
    assert len(path.read_bytes().splitlines()) == 1
    assert read_lines(path)[0].target == 'x\n{"at":0}'


def test_it_goes_on_after_a_restart(path: Path) -> None:
    for number in (1, 2):
        log = AuditLog(path)
        log.add(line(number))
        log.close()
    assert [each.pid for each in read_lines(path)] == [1, 2]


def test_a_line_that_was_cut_spoils_no_other(path: Path) -> None:
    path.write_bytes(b'{"at":1.5,"kind":"pe')
    log = AuditLog(path)
    log.add(line(1))
    log.add(line(2))
    log.close()
    assert [each.pid for each in read_lines(path)] == [1, 2]


def test_a_full_disk_is_said_and_spoils_no_later_line(
    log: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(fd: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: len(data) - 10])

    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(audit.os, "write", write)
        with pytest.raises(OSError, match="No space left"):
            log.add(line(1))
    log.add(line(2))
    log.add(line(3))
    assert [each.pid for each in read_lines(path)] == [2, 3]


def test_full_files_are_kept_up_to_a_number(path: Path) -> None:
    size = len(path.name) + 120
    log = AuditLog(path, max_bytes=2 * size, files=3)
    for number in range(1, 12):
        log.add(line(number))
    log.close()
    names = ["audit.log.2", "audit.log.1", "audit.log"]
    assert sorted(each.name for each in path.parent.iterdir()) == sorted(names)
    kept = [each.pid for name in names for each in read_lines(path.with_name(name))]
    assert kept == list(range(kept[0], 12))
    assert all(path.with_name(name).stat().st_size <= 2 * size for name in names)


def test_it_is_on_disk_when_sync_returns(
    log: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the log takes lines meanwhile."""
    synced: list[int] = []

    def fsync(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        log.add(line(2))

    log.add(line(1))
    with monkeypatch.context() as patch:
        patch.setattr(audit.os, "fsync", fsync)
        assert synced == []
        log.sync()
    assert synced == [path.stat().st_ino]
    assert [each.pid for each in read_lines(path)] == [1, 2]
