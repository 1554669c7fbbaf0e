"""A guest's processes, from what its kernel shows of them.

A guest is not trusted: there are at most `MOST_PROCESSES` of `MOST_BYTES`, and what cannot be read
as a process counts for none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from tabane.errors import EngineError, ProtocolError
from tabane.guest.client import Guest
from tabane.guest.frames import Kind
from tabane.guest.orders import parse_fields
from tabane.k2i.procfs import Stat, decode, parse_stat
from tabane.model import GuestProcess

MOST_PROCESSES = 4096
MOST_BYTES = 4 << 20
PAGE_KIB = 4
TERMINAL_MAJOR = 136

Fields = dict[bytes, bytes]


async def list_processes(guest: Guest) -> list[GuestProcess]:
    """Of all users and containers, without the kernel's own. Raises `EngineError` when the list is
    none."""
    talk = await guest.converse(Kind.LIST, b"")
    told = bytearray()
    try:
        while block := await talk.stdout.read():
            told += block
            if len(told) > MOST_BYTES:
                raise EngineError(f"the guest's processes take more than {MOST_BYTES} bytes")
        if await talk.wait() != 0:
            raise EngineError("the guest could not list its processes")
    finally:
        await talk.aclose()
    try:
        return parse_processes(bytes(told))
    except ProtocolError as error:
        raise EngineError(str(error)) from None


def parse_processes(told: bytes) -> list[GuestProcess]:
    """Of what the agent's LIST says. Raises `ProtocolError` when it breaks off."""
    found: dict[int, GuestProcess] = {}
    uptime_s, ticks = 0.0, 100
    for fields in _records(told):
        if b"U" in fields:
            uptime_s = _number(fields, b"U") / 1000
            ticks = max(1, _number(fields, b"T"))
        with suppress(ValueError, IndexError, TypeError):
            process = _process(fields, parse_stat(fields[b"s"]), uptime_s, ticks)
            if process.pid > 0 and len(found) < MOST_PROCESSES:
                found[process.pid] = process
    return list(found.values())


def _records(told: bytes) -> Iterator[Fields]:
    """One process each; the first also has the guest's uptime and ticks. An empty field ends it."""
    fields: Fields = {}
    for tag, value in parse_fields(told):
        if tag == b".":
            yield {b"s": b"", **fields}
            fields = {}
        else:
            fields[tag] = value


def _process(fields: Fields, stat: Stat, uptime_s: float, ticks: int) -> GuestProcess:
    words = fields.get(b"c", b"").rstrip(b"\0").replace(b"\0", b" ")
    return GuestProcess(
        inside="guest",
        pid=stat.pid,
        ppid=stat.ppid,
        name=stat.comm,
        command=decode(words) or f"[{stat.comm}]",
        uid=_number(fields, b"u"),
        gid=_number(fields, b"g"),
        state=stat.state,
        tty=_terminal(stat.tty_nr),
        threads=stat.num_threads,
        nice=stat.nice,
        cpu_s=(stat.utime + stat.stime) / ticks,
        vsz_kib=stat.vsize // 1024,
        rss_kib=stat.rss * PAGE_KIB,
        elapsed_s=max(0.0, uptime_s - stat.starttime / ticks),
        start_ticks=stat.starttime,
        container=decode(fields.get(b"k", b"")),
    )


def _number(fields: Fields, tag: bytes) -> int:
    return int.from_bytes(fields.get(tag, b"")[:8], "little")


def _terminal(number: int) -> str:
    """As ps shows it; of pseudo-terminals alone, which a guest's are."""
    major, minor = number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00
    return f"pts/{minor}" if major == TERMINAL_MAJOR else "?"
