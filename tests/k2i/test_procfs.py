import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.k2i.procfs import (
    CHUNK_BYTES,
    GONE,
    Procfs,
    parse_cgroup,
    parse_stat,
    parse_status,
    parse_words,
)

NUMBERS = " ".join(str(n) for n in range(4, 53)).encode()


def stat_line(name: bytes, *, pid: int = 7, starttime: int = 22) -> bytes:
    numbers = NUMBERS.replace(b" 22 ", b" %d " % starttime)
    return b"%d (%b) S %b\n" % (pid, name, numbers)


@given(st.binary(min_size=0, max_size=15))
def test_any_name_is_read(name: bytes) -> None:
    stat = parse_stat(stat_line(name))
    assert stat.comm == name.decode("utf-8", "backslashreplace")
    assert (stat.pid, stat.state, stat.ppid, stat.starttime, stat.policy) == (7, "S", 4, 22, 41)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"a) R 1 (b", "a) R 1 (b"),
        (b"two\nlines", "two\nlines"),
        (b"\xff\xfe", "\\xff\\xfe"),
        ("束ね".encode(), "束ね"),
        (b"", ""),
    ],
)
def test_odd_names(raw: bytes, name: str) -> None:
    assert parse_stat(stat_line(raw)).comm == name


def test_status_is_not_fooled_by_a_name() -> None:
    data = b"Name:\tx\\nUid:\t0\nTgid:\t5\nUid:\t1\t2\t3\t4\nGroups:\t \nVmRSS:\t     12 kB\n"
    assert parse_status(data) == {
        b"Tgid": b"5",
        b"Uid": b"1\t2\t3\t4",
        b"Groups": b"",
        b"VmRSS": b"12 kB",
    }


def test_empty_words_are_dropped() -> None:
    assert parse_words(b"a\0\0b c\0\xff\0\0\0") == ["a", "b c", "\\xff"]
    assert parse_words(b"") == []


def test_cgroup_lines() -> None:
    assert parse_cgroup(b"4:pids:/user.slice\n0::/\n") == ["4:pids:/user.slice", "0::/"]


def test_a_kept_file_is_read_anew(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    file = tmp_path / "7" / "stat"
    procfs = Procfs(tmp_path)
    for name in (b"one", b"two"):
        file.write_bytes(stat_line(name))
        assert procfs.stat(7).comm == name.decode()
    long = b"x" * (3 * CHUNK_BYTES + 5)
    file.write_bytes(long)
    assert procfs.read_again(7, "stat") == procfs.read(7, "stat") == long
    procfs.close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_are_bounded_and_closed(tmp_path: Path) -> None:
    for pid in range(1, 6):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_bytes(stat_line(b"a", pid=pid))
    before = open_descriptors()
    procfs = Procfs(tmp_path, keep=3)
    for _ in range(2):
        assert [procfs.stat(pid).pid for pid in procfs.pids()] == [1, 2, 3, 4, 5]
        assert open_descriptors() == before + 3
    (tmp_path / "1" / "stat").unlink()
    (tmp_path / "1").rmdir()
    assert procfs.pids() == [2, 3, 4, 5]
    assert open_descriptors() == before + 2
    procfs.close()
    procfs.close()
    assert open_descriptors() == before


def test_a_reused_pid_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_bytes(stat_line(b"old", starttime=100))
    procfs = Procfs(tmp_path)
    before = procfs.stat(7)
    assert procfs.stat_again(before) == before
    (tmp_path / "7" / "stat").write_bytes(stat_line(b"new", starttime=200))
    with pytest.raises(ProcessLookupError, match="another has its pid"):
        procfs.stat_again(before)
    procfs.close()


@pytest.mark.parametrize("keep", [0, 100])
def test_a_process_that_ended_is_gone(keep: int) -> None:
    procfs = Procfs(keep=keep)
    with subprocess.Popen(["sleep", "100"]) as child:
        stat = procfs.stat(child.pid)
        assert stat.ppid == os.getpid()
        child.kill()
        child.wait()
        for read in (procfs.stat, lambda pid: procfs.read(pid, "cmdline")):
            with pytest.raises(GONE):
                read(child.pid)
        with pytest.raises(GONE):
            procfs.stat_again(stat)
    assert child.pid not in procfs.pids()
    procfs.close()


def test_the_machine() -> None:
    procfs = Procfs()
    assert procfs.uptime_s() > 0
    assert procfs.memory_kib() * 1024 == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
