"""The sockets of apps' TCP ports at a real holder: there, handed over, gone."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from tabane.node import listeners as module
from tabane.node.listeners import Listeners, take_listeners
from tabane.node.spawner import HolderSpawner


@pytest.fixture
def taking(holder: Any) -> Path:
    path: Path = holder.directory / "listeners.sock"
    program = (
        "import json, sys; from pathlib import Path; from tabane.node import holder;"
        "c = json.loads(Path(sys.argv[1]).read_text());"
        f"c['listeners'] = {str(path)!r}; holder.become_holder(); holder.Holder(c).run()"
    )
    holder.start(program=program)
    return path


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"127.0.0.1:{sock.getsockname()[1]}"


def dial(address: str) -> socket.socket:
    host, _, port = address.partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


async def test_what_connects_while_nobody_accepts_waits_for_who_does(
    holder: Any, taking: Path
) -> None:
    spawner = HolderSpawner(holder.control)
    await spawner.connect()
    one, other = free_address(), free_address()
    assert await spawner.listen([one, other]) == {}
    with dial(one) as client:
        first = take_listeners(taking, [one])[one]
        first.close()
        with take_listeners(taking, [one])[one] as second:
            accepted, _ = second.accept()
            with accepted:
                assert accepted.getpeername() == client.getsockname()
    spawner.close()


async def test_ports_come_and_go_and_those_that_stay_stay(holder: Any, taking: Path) -> None:
    spawner = HolderSpawner(holder.control)
    await spawner.connect()
    one, other = free_address(), free_address()
    await spawner.listen([one, other])
    with dial(one) as waiting, dial(other) as kept:
        assert await spawner.listen([other]) == {}
        with pytest.raises(ConnectionResetError):
            waiting.recv(1)
        with pytest.raises(ConnectionRefusedError):
            dial(one)
        assert take_listeners(taking, [one]) == {}
        with take_listeners(taking, [other, one])[other] as there:
            there.accept()[0].close()
        assert kept.recv(1) == b""
    spawner.close()


async def test_an_address_that_somebody_has_is_told_and_the_others_are_there(
    holder: Any, taking: Path
) -> None:
    spawner = HolderSpawner(holder.control)
    await spawner.connect()
    free = free_address()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        taken = f"127.0.0.1:{sock.getsockname()[1]}"
        assert await spawner.listen([taken, free]) == {taken: "Address already in use"}
        assert list(await_listeners(taking, [taken, free])) == [free]
    assert await spawner.listen([taken, free]) == {}
    assert list(await_listeners(taking, [taken, free])) == [taken, free]
    spawner.close()


def await_listeners(path: Path, addresses: list[str]) -> list[str]:
    """Which of them are there."""
    found = take_listeners(path, addresses)
    for sock in found.values():
        sock.close()
    return list(found)


def test_a_client_that_asks_for_anything_is_answered() -> None:
    listeners = Listeners()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for said in (b"nothing\n", b"\xff\n", b"x" * module.LONGEST_ADDRESS):
            theirs.send(said)
            assert listeners.hand_over(ours)
            assert theirs.recv(10) == module.NOT_THERE
        theirs.shutdown(socket.SHUT_WR)
        assert not listeners.hand_over(ours)
