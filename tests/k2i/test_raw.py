"""A node's /proc as it is, against the kernel's own."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from tabane.k2i.procfs import parse_stat
from tabane.k2i.raw import RawNode, RawProcess, RawReader, redact
from tabane.security.identity import Principal

ROOT = Principal("peer", 0, 0)
STRANGER = Principal("peer", 4_000_000, 4_000_000)


def own(node: RawNode) -> RawProcess:
    return next(process for process in node.processes if process.pid == os.getpid())


def test_own_files_as_the_kernel_writes_them() -> None:
    node = RawReader("tokyo/tokyo-1", "first").read(Principal("peer", os.geteuid()))
    mine = own(node)
    assert (node.dc, node.node, node.incarnation) == ("tokyo", "tokyo-1", "first")
    assert mine.cmdline == Path("/proc/self/cmdline").read_bytes()
    assert mine.cgroup == Path("/proc/self/cgroup").read_bytes()
    assert parse_stat(mine.stat).starttime == parse_stat(Path("/proc/self/stat").read_bytes())[21]
    assert node.users[0] == "root"
    assert node.host["meminfo"].startswith(b"MemTotal:")


def test_others_see_no_arguments_and_no_addresses() -> None:
    mine = own(RawReader().read(STRANGER))
    stat = parse_stat(mine.stat)
    assert mine.cmdline == b""
    assert (stat.startcode, stat.startstack, stat.kstkesp, stat.wchan) == (0, 0, 0, 0)
    whole = parse_stat(own(RawReader().read(ROOT)).stat)
    assert (stat.pid, stat.starttime, stat.vsize) == (whole.pid, whole.starttime, whole.vsize)
    assert whole.startstack


def test_a_name_that_looks_like_more_fields() -> None:
    stat = b"7 (a) R 1 (\n\xff) S " + b" ".join(b"%d" % n for n in range(1, 50)) + b"\n"
    hidden = redact(RawProcess(7, stat, b"", b"", b"secret\0", b"", b""))
    assert hidden.stat.startswith(b"7 (a) R 1 (\n\xff) S 1 2 3 ")
    assert parse_stat(hidden.stat).startstack == 0


def test_bytes_that_are_no_text_travel() -> None:
    node = RawReader().read(ROOT)
    assert msgspec.json.decode(msgspec.json.encode(node), type=RawNode) == node
