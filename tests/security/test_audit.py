"""The audit log on a real disk, and on one that is full."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

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


def refused(at: float, uid: int = 5001, **fields: str) -> Line:
    return Line(at, "peer", uid, 7, "signal 9", "1", **{"outcome": "refused", **fields})


def test_refusals_of_a_user_push_out_nothing_that_was_done(path: Path) -> None:
    """A log that has room for some hundred lines, and a user who has all night."""
    log = AuditLog(path, max_bytes=20_000, files=2)
    log.add(line(1))
    for number in range(100_000):
        log.add(refused(number / 1000, reason="no"))
    log.add(refused(100.0, uid=5002))
    log.close()
    lines = read_lines(path)
    assert not log._numbered(1).exists()
    assert lines[0].pid == 1
    mine = [each for each in lines if each.uid == 5001]
    assert len(mine) == audit.MOST_IDLE + 2
    assert mine[-2].reason == "no; more that changes nothing is only counted for 600 s"
    left_out = 100_000 - audit.MOST_IDLE - 1
    assert mine[-1].reason == f"{left_out} more that changed nothing, since 0; the last: no"
    assert [each.at for each in lines if each.uid == 5002] == [100.0]


@pytest.mark.parametrize("line", [refused(0.0, uid=0), refused(0.0, outcome="done")])
def test_what_root_does_and_what_is_done_is_always_written(
    log: AuditLog, path: Path, line: Line
) -> None:
    for _ in range(3 * audit.MOST_IDLE):
        log.add(line)
    assert len(read_lines(path)) == 3 * audit.MOST_IDLE


@pytest.mark.parametrize(
    "fields", [{"outcome": "would"}, {"outcome": "done", "action": "signal 0"}]
)
def test_what_only_asks_counts_like_a_refusal(
    log: AuditLog, path: Path, fields: dict[str, str]
) -> None:
    for _ in range(3 * audit.MOST_IDLE):
        log.add(replace(refused(0.0), **fields))
    assert len(read_lines(path)) == audit.MOST_IDLE + 1


@pytest.mark.parametrize("later", [audit.WINDOW_S, -5.0])
def test_the_next_window_begins_with_what_was_left_out(later: float) -> None:
    """Also after the machine's clock was set back."""
    shares = audit.Shares()
    written = [it for _ in range(audit.MOST_IDLE + 5) for it in shares.admit(refused(50.0))]
    assert len(written) == audit.MOST_IDLE + 1
    done = replace(line(3), at=50.0 + later)
    said, itself = shares.admit(done)
    assert said.reason.startswith("4 more that changed nothing, since 50")
    assert itself == done
    assert shares.admit(refused(50.0 + later)) == [refused(50.0 + later)]
    assert shares.end() == []
