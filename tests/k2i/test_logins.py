"""Who is logged in: utmp as login(1) writes it, systemd's sessions, and what w makes of them."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from tabane.k2i import ProcessTable
from tabane.k2i.host import Place
from tabane.k2i.logins import Session, describe_logins, parse_session, parse_utmp, read_sessions
from tabane.k2i.names import Names

PLACE = Place("tokyo", "tokyo-1", "life")


def entry(
    kind: int, user: bytes, tty: bytes = b"pts/1", host: bytes = b"far", at: int = 5
) -> bytes:
    fields: list[Any] = [kind, 77, tty, b"ts/1", user, host, 0, 0, 0, at, 500_000]
    return struct.pack("=hxxi32s4s32s256shhiii16s20x", *fields, b"\0" * 16)


def test_utmp() -> None:
    data = entry(7, b"ann") + entry(8, b"bob") + entry(7, b"") + entry(7, b"x" * 32)[:-1]
    assert len(entry(7, b"ann")) == 384
    assert parse_utmp(data) == [Session("ann", "pts/1", "far", 77, 5.5)]
    assert parse_utmp(entry(7, b"\x1b[2J\xff")) == [
        Session("\x1b[2J\\xff", "pts/1", "far", 77, 5.5)
    ]


def test_sessions_of_systemd() -> None:
    text = "UID=0\nUSER=ann\nCLASS=user\nTTY=pts/2\nREMOTE_HOST=far\nLEADER=9\nREALTIME=5500000\n"
    names = Names()
    assert parse_session(text, names) == Session("ann", "pts/2", "far", 9, 5.5)
    assert parse_session(text.replace("CLASS=user", "CLASS=manager"), names) is None
    assert parse_session(text.replace("TTY=pts/2\n", ""), names) is None


def test_the_one_that_is_kept_is_read(tmp_path: Path) -> None:
    utmp, sessions = tmp_path / "utmp", tmp_path / "sessions"
    assert read_sessions(utmp, sessions) == []
    sessions.mkdir()
    (sessions / "1").write_text("CLASS=user\nUSER=bob\nTTY=tty1\nREALTIME=1000000\n")
    (sessions / "2").write_text("CLASS=user\nUSER=bob\nTTY=tty1\nREALTIME=x\n")
    (sessions / "1.ref").write_text("")
    assert [session.user for session in read_sessions(utmp, sessions)] == ["bob"]
    utmp.write_bytes(entry(7, b"ann"))
    assert [session.user for session in read_sessions(utmp, sessions)] == ["ann"]


def test_what_they_do(tmp_path: Path) -> None:
    from msgspec.structs import replace

    table = ProcessTable()
    me = next(row for row in table.processes() if row.pid == os.getpid())
    table.close()
    shell = replace(me, pid=10, tty="pts/1", pgrp=10, tpgid=12, cpu_s=1.0, command="-bash")
    editor = replace(shell, pid=12, pgrp=12, cpu_s=2.5, command="vi notes")
    other = replace(editor, pid=13, tty="pts/2", command="secret")
    (tmp_path / "pts").mkdir()
    (tmp_path / "pts/1").touch()
    os.utime(tmp_path / "pts/1", (900.0, 0.0))
    sessions = [Session("ann", "pts/1", "", 10, 400.0), Session("bob", "pts/9", "far", 11, 2000.0)]
    first, second = describe_logins(sessions, [shell, editor, other], PLACE, 1000.0, tmp_path)
    assert (first.idle_s, first.login_age_s, first.what) == (100.0, 600.0, "vi notes")
    assert (first.jcpu_s, first.pcpu_s) == (3.5, 2.5)
    assert (second.idle_s, second.login_age_s, second.what, second.jcpu_s) == (None, 0.0, "-", 0.0)
