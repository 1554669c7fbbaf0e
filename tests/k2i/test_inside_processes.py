"""Threads, trees, open files and raw files of real processes."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from tests.k2i.conftest import Start

from tabane.errors import Unauthenticated, UsageError
from tabane.k2i import K2i, Process, ProcessTable, Question
from tabane.k2i.files import read_files
from tabane.k2i.raw import FILES, read_raw
from tabane.k2i.sockets import parse_endpoint, parse_inet, parse_unix
from tabane.k2i.threads import read_threads
from tabane.k2i.tree import grow
from tabane.security.identity import Principal

PROC = Path("/proc")
ROOT = Principal("token")
UPTIME_S = 1e9


def table_of(*pids: int) -> list[Process]:
    table = ProcessTable("tokyo/tokyo-1", "life")
    try:
        return [row for row in table.processes() if row.pid in pids]
    finally:
        table.close()


def test_threads_have_their_own_names(start: Start) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        (me,) = table_of(os.getpid())
        found = read_threads(PROC, [me], UPTIME_S)
    finally:
        done.set()
        thread.join()
    assert {os.getpid(), thread.native_id} <= {row.tid for row in found}
    assert {row.pid for row in found} == {os.getpid()}
    assert found[0].elapsed_s > 0
    assert (found[0].node, found[0].user) == (me.node, me.user)
    assert found[0].stat[1:] == me.stat[1:]


def test_a_pid_that_was_given_to_another_has_no_threads_files_or_bytes(start: Start) -> None:
    child = start()
    (row,) = table_of(child.pid)
    other = replace(row, start_ticks=row.start_ticks - 1)
    assert read_threads(PROC, [row], UPTIME_S) != []
    assert read_threads(PROC, [other], UPTIME_S) == []
    assert read_files(PROC, [other], ROOT, mapped=False) == []
    assert msgspec.msgpack.decode(read_raw(PROC, [other], FILES, ROOT))["processes"] == []


def test_one_that_is_gone_is_left_out(start: Start) -> None:
    child = start()
    rows = table_of(child.pid)
    child.kill()
    child.wait()
    assert read_threads(PROC, rows, UPTIME_S) == []
    assert read_files(PROC, rows, ROOT, mapped=True) == []
    assert msgspec.msgpack.decode(read_raw(PROC, rows, FILES, ROOT))["processes"] == []


def process(pid: int, ppid: int, start_ticks: int, **fields: Any) -> Process:
    (me,) = table_of(os.getpid())
    return replace(me, pid=pid, ppid=ppid, start_ticks=start_ticks, **fields)


def test_a_tree_has_parents_before_their_children() -> None:
    rows = [
        process(9, 5, 30),
        process(1, 0, 0),
        process(5, 1, 10),
        process(7, 1, 20),
        process(8, 5, 20),
        process(3, 99, 5),
    ]
    found = [(row.pid, row.depth, row.children) for row in grow(rows)]
    assert found == [(1, 0, 2), (5, 1, 2), (8, 2, 0), (9, 2, 0), (7, 1, 0), (3, 0, 0)]


def test_a_parents_pid_given_to_a_younger_process_makes_no_ring() -> None:
    rows = [process(5, 7, 10), process(7, 5, 20), process(1, 1, 0)]
    assert [(row.pid, row.depth) for row in grow(rows)] == [(1, 0), (5, 0), (7, 1)]


def test_a_chain_longer_than_pythons_stack() -> None:
    first = process(1, 0, 1)
    rows = [replace(first, pid=n, ppid=n - 1, start_ticks=n) for n in range(1, 5001)]
    assert [row.depth for row in grow(rows)] == list(range(5000))


def test_pids_of_different_machines_do_not_mix() -> None:
    rows = [process(1, 0, 0), process(2, 1, 5)]
    rows += [replace(row, inside="guest", instance="abc") for row in rows]
    rows += [replace(rows[3], instance="def")]
    found = [(row.inside, row.instance, row.pid, row.depth) for row in grow(rows)]
    assert found == [
        ("", rows[0].instance, 1, 0),
        ("", rows[0].instance, 2, 1),
        ("guest", "abc", 1, 0),
        ("guest", "abc", 2, 1),
        ("guest", "def", 2, 0),
    ]


def test_open_files_and_sockets_with_their_peers(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    path = tmp_path / "a b.sock"
    with (
        listener,
        socket.create_connection(("127.0.0.1", port)) as client,
        (tmp_path / "file").open("rb") as file,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(str(path))
        unix.listen()
        file.read(2)
        (tmp_path / "file").unlink()
        everything = read_files(PROC, table_of(os.getpid()), ROOT, mapped=True)
        found = {row.fd: row for row in everything}
        mine = client.getsockname()[1]
        rows = [found[str(thing.fileno())] for thing in (listener, client, file, unix)]
    listens, connected, opened, bound = rows
    assert (listens.type, listens.protocol, listens.state) == ("IPv4", "TCP", "LISTEN")
    assert (listens.local_address, listens.local_port, listens.peer_port) == ("127.0.0.1", port, 0)
    assert (connected.state, connected.local_port) == ("ESTABLISHED", mine)
    assert (connected.peer_address, connected.peer_port) == ("127.0.0.1", port)
    assert (opened.type, opened.mode, opened.size) == ("REG", "r", 4)
    assert opened.path == f"{tmp_path}/file (deleted)"
    assert opened.offset == 4  # buffered
    assert (bound.type, bound.path, bound.state) == ("unix", str(path), "LISTEN")
    assert found["cwd"].path == os.getcwd()  # noqa: PTH109
    assert found["txt"].type == "REG"
    assert any(row.fd == "mem" and "libc" in row.path for row in everything)


def test_addresses_as_the_kernel_writes_them() -> None:
    assert parse_endpoint("0100007F:1F90") == ("127.0.0.1", 8080)
    assert parse_endpoint("00000000:0000") == ("", 0)
    assert parse_endpoint("00000000:0016") == ("*", 22)
    assert parse_endpoint("B80D01200000000067452301EFCDAB89:0050") == (
        "2001:db8::123:4567:89ab:cdef",
        80,
    )


def test_socket_tables() -> None:
    heading = "heading\n"
    line = (
        "   0: 0100007F:1FFF 0100007F:833C 01 00000000:00000000 00:00000000 0     0        0 77 1"
    )
    ((inode, found),) = parse_inet(heading + line, "IPv4", "TCP")
    assert (inode, found.state, found.peer.port) == (77, "ESTABLISHED", 0x833C)
    lines = (
        "00000000: 00000002 00000000 00010000 0001 01 11 /run/a b\n"
        "00000000: 00000003 00000000 00000000 0002 03 12\n"
    )
    bound, other = parse_unix(heading + lines)
    assert (bound[0], bound[1].path, bound[1].state) == (11, "/run/a b", "LISTEN")
    assert (other[1].protocol, other[1].state, other[1].path) == ("DGRAM", "CONNECTED", "")


def test_the_bytes_of_a_processs_files(start: Start) -> None:
    child = start("", "one", "two words")
    (row,) = table_of(child.pid)
    answer = msgspec.msgpack.decode(read_raw(PROC, [row], FILES, ROOT))
    ((pid, ticks, uid, gid, *place, contents),) = answer["processes"]
    assert (pid, ticks, uid, gid) == (child.pid, row.start_ticks, os.geteuid(), os.getegid())
    assert place == ["", "", ""]
    files = dict(zip(answer["files"], contents, strict=True))
    for name in ("cmdline", "comm", "cgroup", "oom_score_adj", "loginuid"):
        assert files[name] == Path(f"/proc/{child.pid}/{name}").read_bytes()
    assert files["stat"].startswith(f"{child.pid} (python".encode())
    assert {"stat", "meminfo", "loadavg", "uptime", "vmstat"} <= answer["host"].keys()


@pytest.mark.parametrize("who", [Principal("peer", 12345), Principal("anybody")])
def test_others_see_no_arguments_in_the_bytes(start: Start, who: Principal) -> None:
    child = start("", "secret")
    (row,) = table_of(child.pid)
    data = read_raw(PROC, [row], ("cmdline", "io", "stat"), who)
    ((*_, (cmdline, io, stat)),) = msgspec.msgpack.decode(data)["processes"]
    assert cmdline == f"[{row.name}]\0".encode()
    assert io is None
    assert stat
    assert b"secret" not in data


def test_no_file_is_read_twice() -> None:
    with pytest.raises(UsageError, match="files: a file is named twice"):
        Question("raw", {"files": ",".join(["stat"] * 10_000)}).check()


async def test_who_may_see_which_files() -> None:
    k2i = K2i(ProcessTable())
    mine = Question("files", {"pid": str(os.getpid())})
    try:
        assert b'"fd":"cwd"' in await k2i.answer(mine, Principal("peer", os.geteuid()))
        assert b'"files":[]' in await k2i.answer(mine, Principal("peer", 12345))
        with pytest.raises(Unauthenticated):
            await k2i.answer(mine, Principal("anybody"))
    finally:
        k2i.close()
        k2i.table.close()


async def test_others_see_no_arguments(start: Start) -> None:
    child = start("", "secret")
    k2i = K2i(ProcessTable())
    ask = Question("processes", {"pid": str(child.pid)})
    try:
        assert b"secret" in await k2i.answer(ask, ROOT)
        for kind in ("processes", "tree"):
            data = await k2i.answer(Question(kind, ask.params), Principal("peer", 12345))
            assert b"secret" not in data
            assert b'"command":"[python' in data
    finally:
        k2i.close()
        k2i.table.close()
