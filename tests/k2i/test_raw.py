"""A node's /proc as it is, against the kernel's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from tabane.k2i.procfs import parse_stat
from tabane.k2i.raw import FILES, hide_addresses, read_raw
from tabane.k2i.table import ProcessTable
from tabane.security.identity import Principal

OWNER = Principal("peer", os.geteuid(), os.getegid())
STRANGER = Principal("peer", 4_000_000, 4_000_000)


def read_own(who: Principal) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The whole answer, and this process's files in it."""
    table = ProcessTable()
    try:
        mine = [process for process in table.processes() if process.pid == os.getpid()]
    finally:
        table.close()
    answer = msgspec.msgpack.decode(read_raw(Path("/proc"), mine, FILES, who), strict=False)
    return answer, dict(zip(answer["files"], answer["processes"][0][-1], strict=True))


def test_own_files_as_the_kernel_writes_them() -> None:
    answer, files = read_own(OWNER)
    assert files["cmdline"] == Path("/proc/self/cmdline").read_bytes()
    assert files["cgroup"] == Path("/proc/self/cgroup").read_bytes()
    assert answer["processes"][0][1] == parse_stat(files["stat"]).starttime
    assert answer["users"][0] == answer["groups"][0] == "root"
    assert answer["host"]["meminfo"].startswith(b"MemTotal:")
    assert answer["page_bytes"] == os.sysconf("SC_PAGE_SIZE")


def test_others_see_no_arguments_and_no_addresses() -> None:
    hidden = parse_stat(read_own(STRANGER)[1]["stat"])
    whole = parse_stat(read_own(OWNER)[1]["stat"])
    assert read_own(STRANGER)[1]["cmdline"] == f"[{whole.comm}]\0".encode()
    assert (hidden.startcode, hidden.startstack, hidden.kstkesp, hidden.wchan) == (0, 0, 0, 0)
    assert (hidden.pid, hidden.starttime, hidden.vsize) == (whole.pid, whole.starttime, whole.vsize)
    assert whole.startstack


def test_a_name_that_looks_like_more_fields() -> None:
    stat = b"7 (a) R 1 (\n\xff) S " + b" ".join(b"%d" % n for n in range(1, 50)) + b"\n"
    hidden = hide_addresses(stat)
    assert hidden.startswith(b"7 (a) R 1 (\n\xff) S 1 2 3 ")
    assert parse_stat(hidden).startstack == 0
