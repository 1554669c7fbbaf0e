"""The fake driver: a machine for failures, and a whole cluster's instances in one process.

Nothing is started. What an instance does is its app's `Script`:

    Script(fail_start=2)            the first two starts fail with EngineError, the third works
    Script(start_takes=0.3)         a start takes 0.3 s
    Script(die_after=5, dies=...)   it ends 5 s after its start, with that status (default: exit 1)
    Script(ignores_stop=True)       the stop signal does nothing: it ends by KILL
    Script(stop_takes=0.2)          it ends 0.2 s after the stop signal
    Script(prepare_takes=0.3)       what is made before takes 0.3 s
    Script(fail_prepare=True)       it is refused in `prepare` (Unsupported)
    Script(listens_after=0.1)       its HTTP server listens 0.1 s after the start (None: never)
    Script(answers=b"...")          what that server says; `{id}` is the instance's,
                                    `{origin}` that of which it is a copy, `{told}` how
                                    often POST came, `{answered}` how often sessions did:
                                    what goes on from a checkpoint remembers these
    Script(prints=b"...")           what it writes to its log
    Script(works=False)             `probe` says no
    Script(guests=(GuestProcess(...), ...))  what runs within it (unless told: one, `init`)
    Script(look_takes=0.3)          telling these takes 0.3 s
    Script(saves=True)              it can be checkpointed, and restored
    Script(never_saves=True)        an instance like it never can (Unsupported)
    Script(fail_save=2)             the first two checkpoints fail with EngineError
    Script(save_takes=0.3)          one takes 0.3 s, in which it stands still
    Script(fail_restore=2)          the first two restores fail with EngineError
    Script(restore_takes=0.3)       one takes 0.3 s
    Script(deaf_copies=2)           the first two copies never listen
    Script(posts="500 No")          how POST is answered
    Script(fail_look=2)             the first two times they are asked for fail with EngineError

Scripts go by app (`driver.scripts[app.key]`), those of sidecars too (`App.beside`); others get the
driver's own. The server listens on the link's address (127.0.0.1 without a link) and the app's
port, when the app has one. Instances live in `world`: a second driver with the same world is the
first after a restart of the agent. Delays are the event loop's, so a virtual clock's loop makes
them free.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from tabane.errors import EngineError, NotFound, Unsupported
from tabane.model import AppName, Class, ExitStatus, GuestProcess, InstanceId, Resources, Value
from tabane.runtimes.api import (
    DEFAULTS,
    Capabilities,
    Conversation,
    Enforcement,
    Execution,
    Handle,
    InstanceSpec,
    Probe,
    Spawner,
    Stats,
    Transfer,
)
from tabane.runtimes.fake_talk import FakeCopy, begin
from tabane.supervise import Supervisor

FIRST_PID = 4_194_305
"""Above the kernel's largest pid: a signal that strays hits nothing."""
STATE = "state"
"""File of a checkpoint."""
NO_CHECKPOINTS = "the fake driver cannot checkpoint"


class Script(Value, frozen=True):
    """See the module's text. Durations are seconds."""

    fail_prepare: bool = False
    prepare_takes: float = 0.0
    fail_start: int = 0
    start_takes: float = 0.0
    die_after: float | None = None
    dies: ExitStatus = ExitStatus(1)
    ignores_stop: bool = False
    stop_takes: float = 0.0
    listens_after: float | None = 0.0
    answers: bytes = b"hello from {id}\n"
    prints: bytes = b""
    works: bool = True
    guests: tuple[GuestProcess, ...] = (GuestProcess("sandbox", 1, "init"),)
    look_takes: float = 0.0
    fail_look: int = 0
    saves: bool = False
    never_saves: bool = False
    fail_save: int = 0
    save_takes: float = 0.0
    fail_restore: int = 0
    restore_takes: float = 0.0
    deaf_copies: int = 0
    posts: str = "200 OK"


@dataclass
class Life:
    """What the fake knows of one instance."""

    spec: InstanceSpec
    script: Script
    pid: int = 0
    looks: int = 0
    origin: str = ""
    """Of what it is a copy; its own id if of nothing."""
    told: int = 0
    answered: int = 0
    ended: asyncio.Future[ExitStatus] = field(default_factory=asyncio.Future)
    frozen: bool = False
    listener: socket.socket | None = None
    accepted: set[socket.socket] = field(default_factory=set)
    connections: set[asyncio.Transport] = field(default_factory=set)
    waiting: list[Callable[[], None]] = field(default_factory=list)
    """Answers that are due when it is thawed."""
    archives: dict[str, bytes] = field(default_factory=dict)
    tasks: Supervisor = field(default_factory=lambda: Supervisor("fake"))

    def listen(self) -> None:
        """Until its end. Not with an `asyncio.Server`: Python 3.11's forgets a connection that it
        accepted just before it was closed."""
        assert self.spec.app.port is not None
        if self.ended.done():
            return
        address = self.spec.link.address if self.spec.link else "127.0.0.1"
        self.listener = socket.create_server((address, self.spec.app.port))
        self.listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self.listener, self._accept, self.listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # who was there has gone
        self.accepted.add(connection)
        self.tasks.start("connection", self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        _, answer = await loop.connect_accepted_socket(lambda: HttpAnswer(self), connection)
        await answer.over.wait()
        self.accepted.discard(connection)

    def is_session(self, request: bytes) -> bool:
        """And no look whether it is ready."""
        return any(host.encode() in request for host in self.spec.app.hosts)

    def when_running(self, answer: Callable[[], None]) -> None:
        if self.frozen:
            self.waiting.append(answer)
        else:
            answer()

    def thaw(self) -> None:
        self.frozen = False
        answers, self.waiting = self.waiting, []
        for answer in answers:
            answer()

    def end(self, status: ExitStatus) -> None:
        """It has ended: its sockets close, as a process's do. Idempotent."""
        if self.ended.done():
            return
        self.ended.set_result(status)
        if self.listener is not None:
            asyncio.get_running_loop().remove_reader(self.listener)
            self.listener.close()
        for connection in list(self.connections):
            connection.abort()

    async def aclose(self) -> None:
        """Nothing of it remains. Idempotent."""
        self.end(ExitStatus(signal=signal.SIGKILL))
        await self.tasks.aclose()
        while self.accepted:
            self.accepted.pop().close()


@dataclass
class World:
    """What outlives a driver object: the instances, and how often each app's starts failed."""

    lives: dict[InstanceId, Life] = field(default_factory=dict)
    failures: Counter[AppName] = field(default_factory=Counter)
    saves: Counter[AppName] = field(default_factory=Counter)
    """How often each was tried to be checkpointed, and (`restores`) restored."""
    restores: Counter[AppName] = field(default_factory=Counter)
    pids: itertools.count[int] = field(default_factory=lambda: itertools.count(FIRST_PID))


class FakeDriver:
    """See the module's text."""

    name = "fake"
    isolation = Class.CONTAINER
    capabilities = Capabilities(
        freeze=True,
        guest_processes=True,
        exec=True,
        terminal=True,
        copy=True,
        stats=True,
        limit=True,
        images=("linux", "host"),
        network=True,
        services=True,
        pods=True,
        works_emulated=True,
    )

    def __init__(self, script: Script | None = None, world: World | None = None) -> None:
        self.script = script or Script()
        self.scripts: dict[AppName, Script] = {}
        self.world = world or World()
        if self.script.saves:
            replaced = msgspec.structs.replace(self.capabilities, checkpoint=True, restore=True)
            self.capabilities = replaced

    async def probe(self) -> Probe:
        return Probe(self.script.works, "a fake for tests" if self.script.works else "told to fail")

    def enforcements(self) -> tuple[Enforcement, ...]:
        why = "nothing runs, so there is nothing to confine"
        return tuple(Enforcement(default, False, why) for default in DEFAULTS)

    async def prepare(self, spec: InstanceSpec) -> Handle:
        script = self.scripts.get(spec.app.key, self.script)
        if script.fail_prepare:
            raise Unsupported(f"{spec.app.key}: the fake driver was told to refuse it")
        await asyncio.sleep(script.prepare_takes)
        self.world.lives[spec.id] = Life(spec, script)
        return Handle(self.name, 1, spec.id, {"pid": 0})

    async def start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        life = self._life(handle)
        await asyncio.sleep(life.script.start_takes)
        failures = self.world.failures
        if failures[spec.app.key] < life.script.fail_start:
            failures[spec.app.key] += 1
            words = f"told to fail start {failures[spec.app.key]} of {life.script.fail_start}"
            raise EngineError(f"fake could not start {handle.id}: {words}", status=1, output=words)
        life.origin = spec.id
        if spec.app.port is not None and life.script.listens_after == 0:
            life.listen()
        elif spec.app.port is not None and life.script.listens_after:
            life.tasks.start("listen", self._listen_later(life, life.script.listens_after))
        return await self._begin(life)

    async def _begin(self, life: Life) -> Handle:
        spec = life.spec
        life.pid = next(self.world.pids)
        if life.script.prints:
            await asyncio.to_thread(_append, spec.log, life.script.prints)
        if life.script.die_after is not None:
            life.tasks.start("die", self._die(life, life.script.die_after, life.script.dies))
        return Handle(self.name, 1, spec.id, {"pid": life.pid})

    async def _die(self, life: Life, delay_s: float, status: ExitStatus) -> None:
        await asyncio.sleep(delay_s)
        life.end(status)

    async def _listen_later(self, life: Life, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        life.listen()

    async def wait(self, handle: Handle) -> ExitStatus:
        return await asyncio.shield(self._life(handle).ended)

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        life = self.world.lives.get(handle.id)
        if life is None or not life.pid:
            return
        life.thaw()
        script = life.script
        takes_s = timeout_s if script.ignores_stop else min(script.stop_takes, timeout_s)
        killed = script.ignores_stop or script.stop_takes > timeout_s
        number = signal.SIGKILL if killed else signal.SIGTERM
        await asyncio.wait([life.ended], timeout=takes_s)
        life.end(ExitStatus(signal=number))

    async def freeze(self, handle: Handle) -> None:
        self._running(handle).frozen = True

    async def thaw(self, handle: Handle) -> None:
        if (life := self.world.lives.get(handle.id)) is not None:
            life.thaw()

    async def checkpoint(self, handle: Handle, directory: Path, *, leave_running: bool) -> None:
        life, saves = self._running(handle), self.world.saves
        if not self.capabilities.checkpoint:
            raise Unsupported(NO_CHECKPOINTS)
        app = life.spec.app.key
        saves[app] += 1
        was_frozen, life.frozen = life.frozen, True
        try:
            await asyncio.sleep(life.script.save_takes)
        finally:
            if not was_frozen:
                life.thaw()
        if life.script.never_saves:
            raise Unsupported(f"the fake driver was told that {handle.id} cannot be saved")
        if saves[app] <= life.script.fail_save:
            raise EngineError(f"fake could not save {handle.id}: told to fail", status=1)
        (directory / STATE).write_text(f"{life.origin} {life.answered}")
        if not leave_running:
            life.end(ExitStatus(signal=signal.SIGKILL))

    async def restore(self, spec: InstanceSpec, handle: Handle, directory: Path) -> Handle:
        life, restores = self._life(handle), self.world.restores
        if not self.capabilities.restore:
            raise Unsupported(NO_CHECKPOINTS)
        restores[spec.app.key] += 1
        count = restores[spec.app.key]
        try:
            await asyncio.sleep(life.script.restore_takes)
        except asyncio.CancelledError:
            life.end(ExitStatus(signal=signal.SIGKILL))
            raise
        if count <= life.script.fail_restore:
            raise EngineError(f"fake could not restore {handle.id}: told to fail", status=1)
        life.origin, answered = (directory / STATE).read_text().split()
        life.answered = int(answered)
        if spec.app.port is not None and count > life.script.deaf_copies:
            life.listen()
        return await self._begin(life)

    async def exec(self, handle: Handle, execution: Execution) -> Conversation:
        """It has `echo`, `cat`, and a shell for those; at a terminal that tells its size after a
        line."""
        self._running(handle)
        return begin(execution)

    async def copy(self, handle: Handle, transfer: Transfer) -> Conversation:
        """Each archive is kept as it came, by the path it was copied to."""
        return FakeCopy(self._running(handle).archives, transfer)

    async def stats(self, handle: Handle) -> Stats:
        self._running(handle)
        return Stats(cpu_us=1000, memory_bytes=1 << 20, pids=1)

    async def wait_listening(self, handle: Handle, port: int) -> None:
        raise Unsupported("its sockets are the node's kernel's: the link's socket table has them")

    async def limit(self, handle: Handle, resources: Resources) -> None:
        self._running(handle)

    async def processes(self, handle: Handle) -> list[int]:
        life = self.world.lives.get(handle.id)
        return [life.pid] if life is not None and life.pid and not life.ended.done() else []

    async def guest_processes(self, handle: Handle) -> Sequence[GuestProcess]:
        life = self._running(handle)
        life.looks += 1
        await asyncio.sleep(life.script.look_takes)
        if life.looks <= life.script.fail_look:
            words = f"told to fail look {life.looks} of {life.script.fail_look}"
            raise EngineError(f"fake cannot tell what runs in {handle.id}: {words}")
        return life.script.guests

    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None:
        life = self.world.lives.get(handle.id)
        if life is None or not life.pid or life.ended.done():
            return None
        return msgspec.structs.replace(handle, data={"pid": life.pid})

    async def destroy(self, handle: Handle) -> None:
        life = self.world.lives.pop(handle.id, None)
        if life is not None:
            await life.aclose()

    async def discard(self, spec: InstanceSpec) -> None:
        await self.destroy(Handle(self.name, 1, spec.id, {"pid": 0}))

    async def open_pod(self, spec: InstanceSpec) -> None:
        """Its containers share nothing but their end."""

    async def close_pod(self, directory: Path, cgroup: str) -> None: ...

    def _life(self, handle: Handle) -> Life:
        if handle.id not in self.world.lives:
            raise NotFound(f"instance {handle.id} is not one of the fake driver's")
        return self.world.lives[handle.id]

    def _running(self, handle: Handle) -> Life:
        life = self._life(handle)
        if not life.pid or life.ended.done():
            raise NotFound(f"instance {handle.id} does not run")
        return life


class HttpAnswer(asyncio.Protocol):
    """Answers every request of a connection alike, once its head is complete."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._head = b""
        self.over = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._life.connections.add(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._life.connections.discard(self._transport)
        self.over.set()

    def data_received(self, data: bytes) -> None:
        *requests, self._head = (self._head + data).split(b"\r\n\r\n")
        life = self._life
        life.told += sum(request.startswith(b"POST ") for request in requests)
        life.answered += sum(life.is_session(request) for request in requests)
        body = life.script.answers.replace(b"{id}", life.spec.id.encode())
        body = body.replace(b"{origin}", life.origin.encode()).replace(b"{told}", b"%d" % life.told)
        body = body.replace(b"{answered}", b"%d" % life.answered)
        for request in requests:
            status = life.script.posts if request.startswith(b"POST ") else "200 OK"
            head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            self._life.when_running(partial(self._transport.write, head + body))


def make(spawner: Spawner, directory: Path) -> FakeDriver:
    """For the registry; needs neither of them."""
    return FakeDriver()


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
