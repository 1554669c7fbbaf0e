"""Who is logged in, as w(1) shows it: from utmp, or where there is none from systemd's sessions.

`idle_s` is how long nobody typed at the terminal, by the machine's own clock. What they do is seen
in the process table: the processes of their terminal, and which of them is in its foreground.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tabane.k2i.host import Place, Placed
from tabane.k2i.names import Names
from tabane.k2i.procfs import decode
from tabane.k2i.table import Process

UTMP = Path("/run/utmp")
SESSIONS = Path("/run/systemd/sessions")
DEVICES = Path("/dev")
USER_PROCESS = 7

_UTMP = struct.Struct("=hxxi32s4s32s256shhiii4i20x")
"""utmp(5), alike on all of Linux's machines of today: times have 32 bits."""


class Session(NamedTuple):
    """A login. `at`: seconds since the epoch, by the machine's own clock."""

    user: str
    tty: str
    host: str
    pid: int
    at: float


class Login(Placed, frozen=True, kw_only=True):
    """Times that are null could not be found: there is no such terminal here."""

    user: str
    tty: str
    host: str
    pid: int
    """Of the process that logged them in."""
    login_at: float
    login_age_s: float
    idle_s: float | None
    jcpu_s: float
    """CPU time of the processes at that terminal."""
    pcpu_s: float
    """Of the one in its foreground."""
    what: str
    """That one's command line."""


def parse_utmp(data: bytes) -> list[Session]:
    """The logins in it. A last record that is cut off is left out."""
    whole = data[: len(data) - len(data) % _UTMP.size]
    found = []
    for kind, pid, line, _, user, host, _, _, _, at, at_us, *_ in _UTMP.iter_unpack(whole):
        if kind == USER_PROCESS and user.strip(b"\0"):
            found.append(Session(_text(user), _text(line), _text(host), pid, at + at_us / 1e6))
    return found


def _text(field: bytes) -> str:
    return decode(field.split(b"\0", 1)[0])


def parse_session(text: str, names: Names) -> Session | None:
    """A file of systemd's: None when it is not somebody's at a terminal."""
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if values.get("CLASS") not in ("user", "user-early") or not values.get("TTY"):
        return None
    at = int(values.get("REALTIME") or 0) / 1e6
    user = values.get("USER") or names.user(int(values.get("UID") or -1))
    leader = int(values.get("LEADER") or 0)
    return Session(user, values["TTY"], values.get("REMOTE_HOST", ""), leader, at)


def read_sessions(utmp: Path = UTMP, sessions: Path = SESSIONS) -> list[Session]:
    """Nobody, where neither is kept."""
    try:
        return parse_utmp(utmp.read_bytes())
    except FileNotFoundError:
        pass
    names = Names()
    found = []
    for path in sorted(sessions.glob("*")) if sessions.is_dir() else ():
        try:
            session = parse_session(decode(path.read_bytes()), names)
        except (FileNotFoundError, ValueError):
            continue
        if session is not None:
            found.append(session)
    return found


def describe_logins(
    sessions: Iterable[Session],
    processes: Sequence[Process],
    place: Place,
    now: float,
    devices: Path = DEVICES,
) -> list[Login]:
    """`now`: seconds since the epoch, by the machine's own clock, as its terminals' times are."""
    found = []
    for session in sessions:
        mine = [process for process in processes if process.tty == session.tty]
        front = [process for process in mine if process.pgrp == process.tpgid]
        newest = max(front, key=lambda process: (process.start_ticks, process.pid), default=None)
        found.append(
            Login(
                **place._asdict(),
                user=session.user,
                tty=session.tty,
                host=session.host,
                pid=session.pid,
                login_at=session.at,
                login_age_s=round(max(0.0, now - session.at), 3),
                idle_s=_idle_s(devices / session.tty, now),
                jcpu_s=round(sum(process.cpu_s for process in mine), 2),
                pcpu_s=newest.cpu_s if newest else 0.0,
                what=newest.command if newest else "-",
            )
        )
    return found


def _idle_s(device: Path, now: float) -> float | None:
    try:
        return round(max(0.0, now - device.stat().st_atime), 3)
    except (OSError, ValueError):
        return None
