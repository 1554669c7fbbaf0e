"""Open files and sockets that other programs make as odd as the kernel lets them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.k2i.test_inside_processes import table_of

from tabane.k2i.files import OpenFile, read_files
from tabane.k2i.sockets import parse_unix
from tabane.security.identity import Principal

ROOT = Principal("peer", 0)
PROC = Path("/proc")
BREAKS = "a\nb \n00000000: 1\x0b\x1c\u2028c"
AT_THE_END = """
import ctypes, os, sys
memory = os.open("/proc/self/mem", os.O_RDONLY)
ctypes.CDLL(None).lseek(memory, ctypes.c_long(-4096), os.SEEK_SET)
print("ready", flush=True)
sys.stdin.read()
"""
"""At the last page of an address space, where the kernel maps its own for system calls."""


def files_of(pid: int) -> list[OpenFile]:
    return read_files(PROC, table_of(pid), ROOT, mapped=False)


@pytest.fixture
def broken_name() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0{BREAKS}".encode())
        yield sock


def test_a_socket_whose_name_has_line_breaks(broken_name: socket.socket) -> None:
    found = {file.fd: file for file in files_of(os.getpid())}
    shown = found[str(broken_name.fileno())]
    assert (shown.type, shown.path) == ("unix", f"@{BREAKS}")


def test_an_offset_of_what_has_none_below_zero() -> None:
    command = [sys.executable, "-c", AT_THE_END]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == b"ready\n"
        offsets = [file.offset for file in files_of(child.pid) if file.path.endswith("/mem")]
        child.stdin.close()
    assert offsets == [2**64 - 4096]


def test_what_follows_a_line_break_is_of_the_name_before_it() -> None:
    heading = "Num       RefCount Protocol Flags    Type St Inode Path\n"
    rows = (
        "0000000000000000: 00000002 00000000 00010000 0001 01 11 @one\ntwo\n"
        "0000000000000000: 00000003 00000000 00000000 0002 03    12\n"
        "0000000000000000: 00000003 00000000 00000000 0001 03 13 /run/x \n"
    )
    found = dict(parse_unix(heading + rows))
    assert {inode: one.path for inode, one in found.items()} == {
        11: "@one\ntwo",
        12: "",
        13: "/run/x ",
    }
    assert list(parse_unix(heading)) == []
