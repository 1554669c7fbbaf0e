"""Links with real namespaces. Each test runs in a thread with a network namespace of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tabane.model import ExitStatus
from tabane.network import links, netlink
from tabane.network.netlink import Rtnetlink, run_in_network_of
from tabane.network.pool import NetworkPool
from tabane.network.rules import prepare_node
from tabane.runtimes.api import Command, Finished, Link
from tabane.runtimes.process import is_same, start_ticks

pytestmark = pytest.mark.real

CLONE_NEWNET = 0x40000000
ID_BASE = 1_000_000
SILENCE_S = 0.4
"""How long one waits for an answer that must not come."""
ANSWER_S = 60.0
UPLINK, OUTSIDE = IPv4Address("192.0.2.2"), IPv4Address("192.0.2.1")
CONTROL = IPv4Network("10.98.7.0/24")
NEIGHBOUR = CONTROL[5]


class PlainSpawner:
    """Runs commands as children of this process."""

    def __init__(self) -> None:
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    async def spawn(self, command: Command) -> int:
        process = await asyncio.create_subprocess_exec(
            *command.argv, env=command.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._processes[command.key] = process
        return process.pid

    async def finished(self, key: str) -> Finished:
        process = self._processes[key]
        output, _ = await process.communicate()
        return Finished(ExitStatus(process.returncode or 0), output.decode())

    async def forget(self, key: str) -> None:
        self._processes.pop(key, None)


def in_new_network(work: Callable[[], object]) -> None:
    """Call `work` in a thread with a network namespace of its own, which ends with it."""
    problems: list[BaseException] = []

    def enter_and_work() -> None:
        try:
            assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0
            work()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=enter_and_work)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]


def with_pool(scenario: Callable[[NetworkPool], Coroutine[Any, Any, None]], size: int = 1) -> None:
    """Run a scenario with a pool in a new node, and see that nothing is left."""
    name = f"test-{uuid.uuid4().hex[:8]}"

    async def run() -> None:
        await prepare_node([CONTROL])
        pool = NetworkPool(PlainSpawner(), name, size=size)
        await pool.recover()
        try:
            await scenario(pool)
        finally:
            await pool.destroy()
        assert links.find_links() == set()
        assert links.find_parked(name) == set()

    in_new_network(lambda: asyncio.run(run()))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the kernel does without telling."""
    async with asyncio.timeout(60):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


def listener(address: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def inside(link: Link, work: Callable[[], Any]) -> Any:
    return run_in_network_of(link.parked_pid, work)


def connects(address: str, port: int, source: str = "") -> bool:
    try:
        socket.create_connection((address, port), SILENCE_S, (source, 0)).close()
    except OSError:
        return False
    return True


def reaches(link: Link, address: str, port: int, *, source: str = "") -> bool:
    """Whether a TCP connection from the instance is made."""
    return bool(inside(link, lambda: connects(address, port, source)))


class Outside(NamedTuple):
    pid: int
    server: socket.socket
    neighbour: socket.socket


@contextlib.contextmanager
def outside() -> Iterator[Outside]:
    """A network behind the node's uplink, with a server, and a neighbour's control port."""
    command = links.park_command("test-outside", 0)
    parked = subprocess.run(command.argv, check=True, capture_output=True)
    pid = int(parked.stdout)
    try:
        with Rtnetlink() as node, run_in_network_of(pid, Rtnetlink) as there:
            macs = bytes.fromhex("027a00000001"), bytes.fromhex("027a00000002")
            node.perform([netlink.new_veth("uplink", macs[0], "eth0", macs[1], pid)])
            uplink, eth0 = node.index("uplink"), there.index("eth0")
            there.perform(
                [
                    netlink.set_up(eth0),
                    netlink.add_address(eth0, OUTSIDE, 24),
                    netlink.add_address(eth0, NEIGHBOUR, 24),
                    netlink.add_route(eth0, IPv4Network("100.64.0.0/18"), via=UPLINK),
                ]
            )
            everywhere = IPv4Network("0.0.0.0/0")
            node.perform(
                [
                    netlink.add_address(uplink, UPLINK, 24),
                    netlink.add_route(uplink, everywhere, via=OUTSIDE),
                ]
            )
        server = run_in_network_of(pid, lambda: listener(str(OUTSIDE), 9000))
        neighbour = run_in_network_of(pid, lambda: listener(str(NEIGHBOUR), 9000))
        with server, neighbour:
            server.settimeout(ANSWER_S)
            yield Outside(pid, server, neighbour)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_claimed_link_is_configured_and_has_the_apps_ids() -> None:
    async def scenario(pool: NetworkPool) -> None:
        link = await pool.claim(ID_BASE, egress=True)
        process = Path(f"/proc/{link.parked_pid}")
        for name in ("uid_map", "gid_map"):
            assert (process / name).read_text().split() == ["0", str(ID_BASE), "65536"]
        assert link.parked_start_ticks == start_ticks(link.parked_pid)
        assert "CapEff:\t0000000000000000" in (process / "status").read_text()
        with inside(link, lambda: listener(link.address, 8000)) as server:
            client = socket.create_connection((link.address, 8000), ANSWER_S)
            with client, server.accept()[0] as accepted:
                assert accepted.getpeername()[0] == link.gateway
        loop = inside(link, lambda: listener("127.0.0.1", 8000))
        loop.close()

    with_pool(scenario)


def test_an_ordinary_user_inside_may_bind_low_ports() -> None:
    program = "import socket; s = socket.socket(); s.bind(('', 80)); print('bound')"
    enter = ["nsenter", "--user", "--net", "--setuid", "1000", "--setgid", "1000"]

    async def scenario(pool: NetworkPool) -> None:
        link = await pool.claim(ID_BASE, egress=False)
        argv = [*enter, "--target", str(link.parked_pid), "python3", "-c", program]
        environment = {"PATH": "/usr/bin:/bin"}
        pipe = asyncio.subprocess.PIPE
        done = await asyncio.create_subprocess_exec(*argv, env=environment, stdout=pipe)
        assert await done.communicate() == (b"bound\n", None)

    with_pool(scenario)


def test_instances_reach_the_gateway_and_nothing_else_of_the_node() -> None:
    async def scenario(pool: NetworkPool) -> None:
        link, other = [await pool.claim(ID_BASE, egress=egress) for egress in (True, False)]
        with contextlib.ExitStack() as stack, outside():
            ports = (53, 80, 81, 8080)
            for port in ports:
                stack.enter_context(listener("0.0.0.0", port))
            for one, another in ((link, other), (other, link)):
                stack.enter_context(inside(another, lambda a=another: listener(a.address, 8000)))
                open_ports = [port for port in ports if reaches(one, one.gateway, port)]
                assert open_ports == [53, 80]
                assert not reaches(one, str(UPLINK), 8080), "the node by another address"
                assert not reaches(one, str(UPLINK), 80)
                assert not reaches(one, another.address, 8000), "another instance"
                assert not reaches(one, str(NEIGHBOUR), 9000), "another node's control port"
            assert socket.create_connection((str(NEIGHBOUR), 9000), ANSWER_S).close() is None

    with_pool(scenario)


def test_datagrams_reach_the_resolver_only() -> None:
    async def scenario(pool: NetworkPool) -> None:
        link = await pool.claim(ID_BASE, egress=False)
        client = inside(link, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        resolver = listener(link.gateway, 53, socket.SOCK_DGRAM)
        closed = listener(link.gateway, 5353, socket.SOCK_DGRAM)
        with client, resolver, closed:
            client.sendto(b"refused", (link.gateway, 5353))
            client.sendto(b"question", (link.gateway, 53))
            resolver.settimeout(ANSWER_S)
            data, source = resolver.recvfrom(100)
            assert (data, source[0]) == (b"question", link.address)
            closed.setblocking(False)
            with pytest.raises(BlockingIOError):
                closed.recv(100)  # was sent before the one that has arrived

    with_pool(scenario)


def test_only_the_half_with_egress_gets_out_and_looks_like_the_node() -> None:
    async def scenario(pool: NetworkPool) -> None:
        free, denied = [await pool.claim(ID_BASE, egress=egress) for egress in (True, False)]
        with outside() as there:
            assert not reaches(denied, str(OUTSIDE), 9000)
            assert reaches(free, str(OUTSIDE), 9000)
            accepted, source = there.server.accept()
            accepted.close()
            assert source[0] == str(UPLINK)

    with_pool(scenario)


def test_a_false_source_address_gets_nowhere() -> None:
    async def scenario(pool: NetworkPool) -> None:
        free, denied = [await pool.claim(ID_BASE, egress=egress) for egress in (True, False)]
        with outside(), inside(denied, Rtnetlink) as spoofer:
            false = IPv4Address(free.address) + 100
            spoofer.perform([netlink.add_address(spoofer.index("eth0"), false, 32)])
            with listener(free.gateway, 80):
                assert reaches(denied, denied.gateway, 80, source=denied.address)
                assert not reaches(denied, denied.gateway, 80, source=str(false))
            assert not reaches(denied, str(OUTSIDE), 9000, source=str(false))

    with_pool(scenario)


def test_the_outside_cannot_come_in() -> None:
    async def scenario(pool: NetworkPool) -> None:
        link = await pool.claim(ID_BASE, egress=True)
        with outside() as there, inside(link, lambda: listener(link.address, 8000)):

            def knock(address: str, port: int) -> bool:
                return run_in_network_of(there.pid, lambda: connects(address, port))

            with listener("0.0.0.0", 80):
                assert knock(str(UPLINK), 80)
                assert not knock(link.address, 8000)
                assert not knock(link.gateway, 80)

    with_pool(scenario)


def test_there_is_no_ipv6_inside() -> None:
    async def scenario(pool: NetworkPool) -> None:
        link = await pool.claim(ID_BASE, egress=True)
        addresses = inside(link, lambda: Path("/proc/thread-self/net/if_inet6").read_text())
        assert addresses == ""

    with_pool(scenario)


def test_claims_beyond_the_reserve_are_served_and_the_reserve_is_filled_again() -> None:
    async def scenario(pool: NetworkPool) -> None:
        await until(lambda: pool.prepared(egress=True) == 2 == pool.prepared(egress=False))
        claims = [pool.claim(ID_BASE, egress=True) for _ in range(6)]
        claimed = await asyncio.gather(*claims)
        assert len({link.address for link in claimed}) == 6
        await until(lambda: pool.prepared(egress=True) == 2)

    with_pool(scenario, size=2)


def test_an_address_in_use_is_not_given_again_and_a_released_one_goes_away() -> None:
    async def scenario(pool: NetworkPool) -> None:
        kept, released = [await pool.claim(ID_BASE, egress=True) for _ in range(2)]
        await pool.release(released)
        await pool.release(released)
        others = [await pool.claim(ID_BASE, egress=True) for _ in range(4)]
        assert kept.address not in {link.address for link in others}
        gone = released.parked_pid, released.parked_start_ticks
        await until(lambda: released.slot not in links.find_links() and not is_same(*gone))
        assert is_same(kept.parked_pid, kept.parked_start_ticks)

    with_pool(scenario, size=0)


def test_a_prepared_link_whose_process_died_is_passed_over() -> None:
    async def scenario(pool: NetworkPool) -> None:
        first = await pool.claim(ID_BASE, egress=True)
        await until(lambda: pool.prepared(egress=True) == 1)
        prepared = next(iter(links.find_links() - {first.slot}))
        pid = pool._kinds[True].ready[0].link.parked_pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not Path(f"/proc/{pid}").exists())
        link = await pool.claim(ID_BASE, egress=True)
        assert link.slot != prepared
        assert is_same(link.parked_pid, link.parked_start_ticks)

    with_pool(scenario)


def test_cancelled_claims_lose_no_link() -> None:
    async def scenario(pool: NetworkPool) -> None:
        claims = [asyncio.ensure_future(pool.claim(ID_BASE, egress=True)) for _ in range(3)]
        await asyncio.sleep(0)
        claims[0].cancel()
        claims[2].cancel()
        link = await claims[1]
        assert is_same(link.parked_pid, link.parked_start_ticks)

    with_pool(scenario, size=0)


def test_recover_keeps_what_is_in_use_and_removes_the_rest() -> None:
    name = f"test-{uuid.uuid4().hex[:8]}"
    kept: list[Link] = []
    lost: list[Link] = []

    async def crash() -> None:
        await prepare_node([CONTROL])
        pool = NetworkPool(PlainSpawner(), name, size=1)
        await pool.recover()
        kept.append(await pool.claim(ID_BASE, egress=True))
        lost.append(await pool.claim(ID_BASE, egress=True))
        await until(lambda: pool.prepared(egress=True) == 1 == pool.prepared(egress=False))
        for kind in pool._kinds.values():
            os.close(kind.ready[0].process)  # as the end of the process would

    async def come_back() -> None:
        pool = NetworkPool(PlainSpawner(), name, size=0)
        await pool.recover(kept)
        try:
            await until(lambda: links.find_links() == {kept[0].slot})
            await until(lambda: len(links.find_parked(name)) == 1)
            with listener(kept[0].gateway, 80):
                assert reaches(kept[0], kept[0].gateway, 80)
            await pool.aclose()
            assert is_same(kept[0].parked_pid, kept[0].parked_start_ticks), "in use: left alone"
        finally:
            again = NetworkPool(PlainSpawner(), name, size=0)
            await again.recover(kept)
            await again.destroy()
        assert links.find_links() == set()
        assert links.find_parked(name) == set()

    in_new_network(lambda: [asyncio.run(crash()), asyncio.run(come_back())])


def test_preparing_the_node_again_changes_nothing() -> None:
    async def scenario(pool: NetworkPool) -> None:
        link = await pool.claim(ID_BASE, egress=False)
        await prepare_node([CONTROL])
        with listener("0.0.0.0", 81), listener("0.0.0.0", 80):
            assert reaches(link, link.gateway, 80)
            assert not reaches(link, link.gateway, 81)

    with_pool(scenario)


@pytest.mark.parametrize(("mode", "name"), [(0o755, links.PARKED), (0o700, "sleep")])
def test_what_parked_processes_are_called(mode: int, name: str, tmp_path: Path) -> None:
    """By a name that tells what they are for, if they can get to what gives it to them."""
    owned = tmp_path / "owned"
    owned.mkdir(mode)
    links.name_sleep(owned)
    if mode == 0o700:
        os.chown(owned, 1, 1)
    pool = f"test-{uuid.uuid4().hex[:8]}"
    command = links.park_command(pool, 0, owned)
    done = subprocess.run(command.argv, env=command.env, check=True, capture_output=True)
    process = Path("/proc", done.stdout.decode().strip())
    try:
        asyncio.run(until(lambda: process.joinpath("comm").read_text() == f"{name}\n"))
        assert process.joinpath("cmdline").read_bytes() == f"{name}\0infinity\0".encode()
    finally:
        links.remove([], links.find_parked(pool))


def test_a_sleep_that_goes_by_its_name_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = tmp_path / "busybox"
    box.touch(0o755)
    (tmp_path / "sleep").symlink_to(box)
    (tmp_path / links.PARKED).symlink_to("/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    links.name_sleep(tmp_path)
    assert not (tmp_path / links.PARKED).is_symlink()
