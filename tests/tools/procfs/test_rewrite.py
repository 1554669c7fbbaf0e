"""One process's files: numbers that mean something else here are changed, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.k2i.procfs import parse_stat
from tabane.tools.procfs import rewrite
from tabane.tools.procfs.pretend import Proc
from tabane.tools.procfs.rewrite import Ratio, Terms

NUMBER = 4_194_400


def plus(number: int) -> int:
    return number + 5_000_000 if number > 0 else number


def terms(**changes: object) -> Terms:
    return Terms(plus, plus, lambda uid: uid + 1, lambda gid: gid + 2, 0)._replace(**changes)  # type: ignore[arg-type]


def test_ids_of_other_processes_are_mapped() -> None:
    raw = Proc(77, ppid=5, pgrp=70, session=60, tpgid=-1).stat()
    stat = parse_stat(rewrite.rewrite_stat(raw, NUMBER, terms()))
    found = (stat.pid, stat.ppid, stat.pgrp, stat.session, stat.tpgid)
    assert found == (NUMBER, 5_000_005, 5_000_070, 5_000_060, -1)


def test_all_else_of_the_kernels_own_stat_stays() -> None:
    raw = Path("/proc/self/stat").read_bytes()
    was, now = parse_stat(raw), parse_stat(rewrite.rewrite_stat(raw, NUMBER, terms()))
    changed = {name for name, a, b in zip(was._fields, was, now, strict=True) if a != b}
    assert changed <= {"pid", "ppid", "pgrp", "session", "tty_nr", "tpgid"}
    assert len(raw.split()) == len(rewrite.rewrite_stat(raw, NUMBER, terms()).split())


@given(st.binary(max_size=15).filter(lambda name: b"\0" not in name))
def test_a_name_may_hold_anything(name: bytes) -> None:
    raw = Proc(77, name=name).stat()
    written = rewrite.rewrite_stat(raw, NUMBER, terms())
    assert written.startswith(b"%d (%b) S 5000001 " % (NUMBER, name))
    assert rewrite.comm_of(raw) == name + b"\n"
    assert parse_stat(written).starttime == 100


def test_start_times_move_to_the_views_start() -> None:
    raw = Proc(77, start=1000).stat()
    assert parse_stat(rewrite.rewrite_stat(raw, 1, terms(start_shift=-300))).starttime == 700
    before = rewrite.rewrite_stat(raw, 1, terms(start_shift=-3000))
    assert parse_stat(before).starttime == 0, "tools read it without a sign"


def test_another_machines_ticks_and_pages() -> None:
    raw = Proc(77, start=1000, utime=400, rss_pages=3).stat()
    other = terms(ticks=Ratio(100, 200), page_bytes=Ratio(65536, 4096))
    stat = parse_stat(rewrite.rewrite_stat(raw, 1, other))
    assert (stat.starttime, stat.utime, stat.rss) == (500, 200, 48)
    assert rewrite.rewrite_statm(b"2 3 1 0 0 4 0\n", other) == b"32 48 16 0 0 64 0\n"


def test_status_says_the_same_as_stat() -> None:
    proc = Proc(77, ppid=5, pgrp=70, session=60, uid=1000, gid=50)
    lines = rewrite.rewrite_status(proc.status(), NUMBER, proc.stat(), terms()).split(b"\n")
    for line in (
        *(b"Tgid:\t%d" % NUMBER, b"Pid:\t%d" % NUMBER, b"NSpid:\t%d" % NUMBER),
        *(b"PPid:\t5000005", b"TracerPid:\t0", b"NSpgid:\t5000070", b"NSsid:\t5000060"),
        *(b"Uid:\t1001\t1001\t1001\t1001", b"Gid:\t52\t52\t52\t52", b"Groups:\t52 "),
    ):
        assert line in lines
    assert len(lines) == proc.status().count(b"\n") + 1
    assert b"VmRSS:\t    4000 kB" in lines


def test_the_kernels_own_status() -> None:
    raw, stat = Path("/proc/self/status").read_bytes(), Path("/proc/self/stat").read_bytes()
    written = rewrite.rewrite_status(raw, NUMBER, stat, terms())
    was, now = raw.split(b"\n"), written.split(b"\n")
    changed = {a.partition(b":")[0] for a, b in zip(was, now, strict=True) if a != b}
    expected = {b"Tgid", b"Pid", b"PPid", b"Uid", b"Gid", b"NStgid", b"NSpid", b"NSpgid", b"NSsid"}
    assert changed - {b"Groups"} <= expected
    assert {b"Pid", b"Uid"} <= changed
    assert rewrite.effective(raw, b"Uid") == os.geteuid()


@pytest.mark.parametrize("device", [os.makedev(136, 3), os.makedev(136, 300), os.makedev(4, 1)])
def test_a_terminal_of_another_node_is_none_of_ours(device: int) -> None:
    moved = [rewrite.shift_terminal(device, node) & 0xFFFFFFFF for node in (1, 2)]
    assert {os.major(found) for found in moved} == {os.major(device)}
    minors = [os.minor(found) for found in moved]
    assert minors == [os.minor(device) + 4096, os.minor(device) + 8192]
    assert rewrite.shift_terminal(0, 1) == 0


def test_cpus_as_a_mask() -> None:
    assert rewrite.parse_cpus(b"x\nCpus_allowed:\t3\nmore") == b"\x03" + bytes(7)
    assert rewrite.parse_cpus(b"x\nCpus_allowed:\t1,00000000,80000001\n") == bytes(
        [1, 0, 0, 0x80, 0, 0, 0, 0, 1, *(0,) * 7]
    )
