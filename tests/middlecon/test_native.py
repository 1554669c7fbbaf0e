"""The module in C: its parts by themselves, what it leaves behind, and when it runs.

That the hub does the same with it is in test_rounds.py.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tabane.middlecon.frames import Kind
from tabane.middlecon.ports import Port, fan_out
from tabane.middlecon.tallies import Tally
from tabane.middlecon.wire import Flusher

MODULE = "tabane.middlecon._native"
ROUNDS = str(Path(__file__).with_name("test_rounds.py"))
SAYS = 10_000


def test_many_says_leave_nothing_behind(yard) -> None:
    speaker, members = yard.join("s", 0), yard.members(2)
    wire = yard.wire("m0")
    watched = [
        wire,
        wire.port,
        wire.port.wake,
        wire.transport,
        wire.on_ack,
        wire.port.name,
        b"",
        (),
    ]
    watched += [yard.hub._relay, yard.hub._relay.pending, yard.hub._flusher, Tally, None, True, 0]

    def round_trips(count: int) -> None:
        for _ in range(count):
            wire._quiet = 1
            speaker.tell(Kind.SAY, to=yard.room, id=9, value=60_000)
            yard.turn()
            for member in members:
                member.tell(Kind.ACK, id=int.from_bytes(member.sock.recv(999)[12:16]))
            yard.turn()
            speaker.sock.recv(999)

    for member in (speaker, *members):
        member.frames()
    round_trips(100)
    gc.collect()
    counts, blocks = [sys.getrefcount(one) for one in watched], sys.getallocatedblocks()
    round_trips(SAYS)
    gc.collect()
    assert abs(sys.getallocatedblocks() - blocks) < SAYS / 20
    for one, before in zip(watched, counts, strict=True):
        assert abs(sys.getrefcount(one) - before) < SAYS / 20, one


# The parts by themselves


@pytest.fixture
def send_all(loops: Any) -> Any:
    if loops is not None:
        loops.prepare()
    return fan_out if loops is None else loops.fan_out


def test_fan_out_wakes_who_had_nothing_and_spares_the_slow(send_all: Any) -> None:
    woken: list[str] = []
    ports = [Port(name, lambda name=name: woken.append(name)) for name in "abcd"]
    ports[1].out.append(b"before")
    ports[2].backlog, ports[3].backlog = 10, 11
    assert send_all(set(ports), b"frame", 10) == [ports[3]]
    assert [port.out for port in ports] == [[b"frame"], [b"before", b"frame"], [b"frame"], []]
    assert sorted(woken) == ["a", "c"]
    assert send_all((), b"frame", 10) == []


async def test_fan_out_plans_one_flush(send_all: Any, yard) -> None:
    flusher = Flusher()
    wires = [yard.hub._make_wire() for _ in range(3)]
    for wire in wires:
        wire._flusher = flusher
    assert send_all([wire.port for wire in wires], b"frame", 0) == []
    assert flusher.waiting == wires
    assert flusher.planned
    await asyncio.sleep(0)
    assert not flusher.planned
    assert not flusher.waiting


def test_fan_out_passes_on_what_goes_wrong(send_all: Any) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        send_all([Port("a", fail)], b"frame", 0)
    with pytest.raises((AttributeError, TypeError)):
        send_all([object()], b"frame", 0)
    with pytest.raises(TypeError):
        send_all(None, b"frame", 0)


# Which of the two runs


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env)


SHOW = "from tabane.middlecon import native; print(native.loops is not None)"


def test_the_environment_leaves_the_module_out() -> None:
    done = run("-c", SHOW, TABANE_MIDDLECON_PURE="1")
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_module_is_used_where_it_is() -> None:
    done = run("-c", SHOW, TABANE_MIDDLECON_PURE="")
    assert (done.stdout, done.stderr) == (f"{MODULE in sys.modules}\n", "")


def test_nothing_is_missed_where_it_is_not() -> None:
    missing = "import sys; sys.modules['tabane.middlecon._native'] = None; "
    done = run("-c", missing + SHOW)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_nothing_is_wrong_for_python_in_development_mode() -> None:
    """Its allocator notices writes out of bounds and uses of what was freed."""
    if "PYTHONDEVMODE" in os.environ:
        return
    argv = ("-X", "dev", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, ROUNDS)
    done = run(*argv, PYTHONDEVMODE="1")
    assert done.returncode == 0, done.stdout + done.stderr
