import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.k2i.procfs import (
    CHUNK_BYTES,
    GONE,
    Procfs,
    parse_cgroup,
    parse_hides,
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


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    for pid in (1, 2, 3):
        (tmp_path / str(pid)).mkdir()
        for name in ("stat", "status"):
            (tmp_path / str(pid) / name).write_bytes(stat_line(b"a", pid=pid))
    procfs = Procfs(tmp_path, keep=3)
    before = open_descriptors()
    pids = procfs.pids()
    assert len(procfs.read_each(pids, "status")) == 3
    rounds = []
    for _ in range(4):  # what was used in the round before stays; then some is closed in each
        procfs.read_each(procfs.pids(), "stat")
        rounds.append(opened_again(procfs, pids, "stat"))
        assert open_descriptors() == before + 3
    procfs.close()
    assert rounds == [{1, 2, 3}, {2, 3}, {3}, set()]
    assert open_descriptors() == before


def opened_again(procfs: Procfs, pids: list[int], name: str) -> set[int]:
    """Those of which the file was not kept."""
    procfs.opened.clear()
    procfs.read_each(pids, name)
    return set(procfs.opened)


def test_more_than_can_be_kept_is_no_reason_to_close_what_is_used(tmp_path: Path) -> None:
    for pid in range(1, 11):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_bytes(stat_line(b"a", pid=pid))
    procfs = Procfs(tmp_path, keep=4)
    for _ in range(5):
        procfs.read_each(procfs.pids(), "stat")
    assert opened_again(procfs, procfs.pids(), "stat") == {5, 6, 7, 8, 9, 10}
    procfs.close()


def test_each_is_read_like_one_alone(tmp_path: Path) -> None:
    for pid in (1, 2, 3):
        (tmp_path / str(pid)).mkdir()
    (tmp_path / "1" / "cmdline").write_bytes(b"")
    (tmp_path / "3" / "cmdline").write_bytes(b"x" * (CHUNK_BYTES + 1))
    procfs = Procfs(tmp_path)
    for _ in range(2):
        assert procfs.read_each([1, 2, 3], "cmdline") == [b"", None, b"x" * (CHUNK_BYTES + 1)]
    procfs.close()


def test_what_is_read_of_a_few_makes_room_for_what_is_read_of_all(tmp_path: Path) -> None:
    for pid in (1, 2, 3):
        (tmp_path / str(pid)).mkdir()
        for name in ("stat", "status"):
            (tmp_path / str(pid) / name).write_bytes(stat_line(b"a", pid=pid))
    procfs = Procfs(tmp_path, keep=4)
    procfs.read_each(procfs.pids(), "stat")
    for _ in range(4):
        pids = procfs.pids()
        procfs.read_each(pids, "status")
        procfs.read_each([1], "stat")
    assert opened_again(procfs, pids, "status") == set()
    assert opened_again(procfs, [1], "stat") == set()
    procfs.close()


LIMITED = """
import os, resource, sys
from pathlib import Path
from tabane.k2i.procfs import Procfs

resource.setrlimit(resource.RLIMIT_NOFILE, (40, 100))
procfs = Procfs(Path(sys.argv[1]))
pids = procfs.pids()
for _ in range(3):
    assert None not in procfs.read_each(pids, "stat")
print(len(os.listdir("/proc/self/fd")) - 4, *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("processes", "kept", "soft"), [(15, 15, 40), (90, 50, 100)])
def test_half_of_what_may_be_open_is_left_to_others(
    tmp_path: Path, processes: int, kept: int, soft: int
) -> None:
    for pid in range(1, processes + 1):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_bytes(stat_line(b"a", pid=pid))
    argv = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == ([str(kept), str(soft), "100"], "")


@pytest.mark.parametrize(
    ("options", "hides"),
    [
        ("rw", False),
        ("rw,hidepid=0", False),
        ("rw,gid=5,hidepid=invisible", True),
        ("rw,hidepid=2", True),
        ("rw,hidepid=off", False),
    ],
)
def test_whether_processes_are_hidden(options: str, hides: bool) -> None:
    mounts = f"20 1 0:5 / /proc rw shared:1 - proc proc {options}\n21 1 0:6 / /x rw - tmpfs t rw\n"
    assert parse_hides(mounts.encode(), b"/proc") == hides
    assert not parse_hides(mounts.encode(), b"/x")
    assert not parse_hides(mounts.encode() + b"9 1 0:5 / /proc rw - proc proc rw\n", b"/proc")
