"""Takes the system calls that the filter sends, has them decided, and performs what was decided.

Each is handled on a thread of its own, for a node may take its time, and others must not wait. A
caller that was killed meanwhile is answered into the void. When this process dies, the kernel
answers all such calls with ENOSYS; none waits for ever, and calls about processes of this machine
never came here.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import select
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tabane.errors import Denied, TabaneError
from tabane.tools.client import Cluster
from tabane.tools.procfs import kernel, rewrite
from tabane.tools.procfs.calls import Answer, Call, Decision, Fetch, Order, Target, decide, refuse
from tabane.tools.procfs.feed import Feed
from tabane.tools.procfs.filter import PIDFD_SEND_SIGNAL, Numbering, build_filter
from tabane.tools.procfs.numbers import Key
from tabane.tools.procfs.server import Server
from tabane.tools.procfs.tree import number_of_directory
from tabane.tools.procfs.view import View

log = logging.getLogger(__name__)

THREADS = 16
_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE = 1, 8, 32
_CONTINUE = 1
_RECEIVE, _SEND, _IS_VALID = 0xC0502100, 0xC0182101, 0x40082102
_NOTICE = struct.Struct("<QIIiIQ6Q")
_RESPONSE = struct.Struct("<QqiI")


class Caller(NamedTuple):
    """Who made a call, by effective ids."""

    pid: int
    uid: int
    gid: int


class Carrier(Protocol):
    """Brings orders to nodes."""

    def carry(self, key: Key, order: Order, caller: Caller) -> dict[str, Any]:
        """The outcome. Raises `TabaneError` when it was refused or did not arrive."""


class ClusterCarrier:
    """By the cluster's control API, as the caller: what that user may not do is refused there."""

    def __init__(self, cluster: Cluster, calls: Numbering) -> None:
        self._cluster = cluster
        self._calls = calls

    def carry(self, key: Key, order: Order, caller: Caller) -> dict[str, Any]:
        dc, _, node = key.node.partition("/")
        life = {"dc": dc, "node": node, "incarnation": key.incarnation, "start_ticks": key.start}
        path = f"/v2/processes/{key.pid}/{order.verb}"
        with acting_as(caller, self._calls):
            outcome: dict[str, Any] = self._cluster.post(path, life | order.body)
        return outcome


@contextmanager
def acting_as(caller: Caller, calls: Numbering) -> Iterator[None]:
    """On this thread alone, be the caller for those who ask the kernel who is connecting. Files are
    still reached with this process's own rights. Raises `Denied` where that is not possible."""
    own = (os.geteuid(), os.getegid())
    if own == (caller.uid, caller.gid):
        yield
        return
    try:
        kernel.system_call(calls.setresgid, -1, caller.gid, -1)
        kernel.system_call(calls.setresuid, -1, caller.uid, -1)
        kernel.system_call(calls.setfsuid, own[0])
    except OSError as error:
        _restore(own, calls)
        raise Denied(f"this shell's server may not act as uid {caller.uid}: {error}") from None
    try:
        yield
    finally:
        _restore(own, calls)


def _restore(own: tuple[int, int], calls: Numbering) -> None:
    kernel.system_call(calls.setresuid, -1, own[0], -1)
    kernel.system_call(calls.setresgid, -1, own[1], -1)


def install(calls: Numbering) -> int:
    """Put this process and all it starts under the filter; returns the listener's descriptor.
    Raises `OSError`: EBUSY when it is under such a filter already."""
    program = build_filter(calls)
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    pointer = ctypes.cast(ctypes.create_string_buffer(head, len(head)), ctypes.c_void_p)
    for flags in (_NEW_LISTENER | _WAIT_KILLABLE, _NEW_LISTENER):
        try:
            return kernel.system_call(calls.seccomp, _SET_MODE_FILTER, flags, pointer)
        except OSError as error:
            if error.errno != errno.EINVAL or flags == _NEW_LISTENER:
                raise
    raise AssertionError("unreachable")


class Supervisor:
    """Serves one listener, from a thread of its own, until nobody is under the filter any more."""

    def __init__(
        self, view: View, feed: Feed, server: Server, carrier: Carrier, calls: Numbering
    ) -> None:
        self._view = view
        self._feed = feed
        self._server = server
        self._carrier = carrier
        self._calls = calls

    def start(self, listener: int) -> None:
        """Takes the descriptor over."""
        threading.Thread(target=self._serve, args=(listener,), name="calls", daemon=True).start()

    def _serve(self, listener: int) -> None:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        with ThreadPoolExecutor(THREADS, "call") as threads:
            while not poll.poll()[0][1] & (select.POLLHUP | select.POLLERR):
                notice = bytearray(_NOTICE.size)
                with suppress(FileNotFoundError, InterruptedError):  # the caller is gone again
                    fcntl.ioctl(listener, _RECEIVE, notice)
                    threads.submit(self._handle, listener, bytes(notice))
        os.close(listener)

    def _handle(self, listener: int, notice: bytes) -> None:
        number, pid, _, name, _, _, *arguments = _NOTICE.unpack(notice)
        if name != PIDFD_SEND_SIGNAL:
            call = Call(self._calls.calls[name][0], tuple(arguments))
        elif shown := find_shown(pid, arguments[0] & 0xFFFFFFFF):
            call = Call("kill", (shown, arguments[1]))
        else:
            return go_on(listener, number)
        try:
            answer = self._answer(listener, number, pid, call)
        except (ProcessLookupError, FileNotFoundError):
            return  # the caller is gone
        except Exception as error:
            log.error("%s failed", call, exc_info=error)
            answer = Answer(error=errno.EIO, reason=str(error))
        respond(listener, number, answer)

    def _answer(self, listener: int, number: int, pid: int, call: Call) -> Answer:
        caller = read_caller(pid)
        is_valid(listener, number)
        shown = call.signed(self._argument(call.name))
        self._feed.wait()
        remote = self._view.find(shown)
        target = None
        if remote is not None:
            status = self._view.render(remote, "status")
            target = Target(shown, self._view.ids(remote), rewrite.parse_cpus(status))
        decision: Decision = decide(call, target)
        while isinstance(decision, Fetch):
            decision = self._fetch(listener, number, pid, decision)
        if isinstance(decision, Order):
            assert remote is not None
            answer = self._carry(shown, remote.key, decision, caller)
        else:
            answer = decision
            if answer.error:
                log.info("%s %d by uid %d: %s", call.name, shown, caller.uid, answer.reason)
        if answer.data:
            write_memory(pid, answer.address, answer.data)
        return answer

    def _argument(self, name: str) -> int:
        return next(index for known, index in self._calls.calls.values() if known == name)

    def _fetch(self, listener: int, number: int, pid: int, fetch: Fetch) -> Decision:
        try:
            data = read_memory(pid, fetch.address, fetch.size)
        except OSError:
            return Answer(error=errno.EFAULT, reason="the caller's memory cannot be read there")
        is_valid(listener, number)
        return fetch.then(data)

    def _carry(self, shown: int, key: Key, order: Order, caller: Caller) -> Answer:
        what = f"{order.verb} {order.body} to {key.node}:{key.pid} ({shown}) for uid {caller.uid}"
        try:
            outcome = self._carrier.carry(key, order, caller)
        except TabaneError as error:
            log.info("%s: %s", what, error.message)
            return refuse(error)
        log.info("%s: done", what)
        if order.changes:
            self._feed.expire()
            self._server.forget(shown)
        return order.finish(outcome)


def respond(listener: int, number: int, answer: Answer) -> None:
    value = 0 if answer.error else answer.value
    _send(listener, _RESPONSE.pack(number, value, -answer.error, 0))


def go_on(listener: int, number: int) -> None:
    """Have the kernel do what was asked of it."""
    _send(listener, _RESPONSE.pack(number, 0, 0, _CONTINUE))


def _send(listener: int, response: bytes) -> None:
    with suppress(FileNotFoundError):  # the caller is gone
        fcntl.ioctl(listener, _SEND, response)


def find_shown(pid: int, fd: int) -> int | None:
    """Of a caller's descriptor: which process of another node it is the directory of."""
    caller = Path(f"/proc/{pid}")
    with suppress(OSError):
        found = (caller / "fd" / str(fd)).stat()
        if found.st_dev == (caller / "root/proc").stat().st_dev:
            return number_of_directory(found.st_ino)
    return None


def read_caller(pid: int) -> Caller:
    """Raises `FileNotFoundError` or `ProcessLookupError` when it is gone."""
    status = Path(f"/proc/{pid}/status").read_bytes()
    return Caller(pid, rewrite.effective(status, b"Uid"), rewrite.effective(status, b"Gid"))


def is_valid(listener: int, number: int) -> None:
    """Whether the caller still waits, so that what was read of it was its own. Raises
    `FileNotFoundError`."""
    fcntl.ioctl(listener, _IS_VALID, struct.pack("<Q", number))


def read_memory(pid: int, address: int, size: int) -> bytes:
    """Of the caller. Raises `OSError`."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
        return os.pread(memory.fileno(), size, address)


def write_memory(pid: int, address: int, data: bytes) -> None:
    """Of the caller. Raises `OSError`."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:  # noqa: PTH123
        os.pwrite(memory.fileno(), data, address)
