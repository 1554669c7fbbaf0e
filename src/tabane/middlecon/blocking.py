"""The blocking client, for programs with threads or without any asyncio.

    with connect("tcp://127.0.0.1:8080", name="web-1") as me:
        room = me.join("deploys")

        @room.on_message
        def heard(message):
            return b"ok"

        receipt = room.say(b"v42 is out", timeout_s=1.0)

It has the methods of the asyncio client with the same arguments, results and errors, and any thread
may call any of them. The asyncio client itself runs in a thread of its own; handlers and callbacks
are plain functions and run in a pool of threads, so they may wait, also for this client. One
sender's messages are handled in order, and so are the calls of one callback.

`members`, `state` and `hubs` are snapshots: dictionaries as it was at one moment, which are the
caller's own. What is called on the closed client raises `Closed`, and so does what a forked child
calls on its parent's client: the child must connect anew.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from tabane.errors import Closed, UsageError
from tabane.middlecon import client as asyncio_client
from tabane.middlecon.addresses import parse_url
from tabane.middlecon.client import Callback
from tabane.middlecon.connection import TIMEOUT_S
from tabane.middlecon.frames import check_given_name
from tabane.middlecon.inbox import Message
from tabane.middlecon.receipts import Receipt, Replies
from tabane.middlecon.threads import Lane, LoopThread, Workers
from tabane.middlecon.views import MemberInfo

if TYPE_CHECKING:
    from tabane.middlecon.agreement import Agreement, Outcome, Proposal

T = TypeVar("T")
Taken = TypeVar("Taken")
Handler = Callable[[Message], bytes | None]

WORKERS = 16
"""Handlers that run at a time, besides those that wait for an answer from this client."""
CLOSE_WAIT_S = 5.0
"""How long `close` waits for handlers that still run."""


def connect(
    url: str,
    *,
    name: str | None = None,
    token: str | None = None,
    timeout_s: float = 5.0,
    workers: int = WORKERS,
) -> Client:
    """A session with the hub at `tcp://HOST:PORT` or `unix:///PATH`, as the member `name`.

    Names are unique in the cluster; without one a random name is taken. Tries for `timeout_s`, as
    the hub may be just starting. At most `workers` handlers run at a time. Raises `Unreachable`,
    `TimedOut`, `Conflict` (the name is taken), `Unauthenticated`, `Denied`, `UsageError`. When
    interrupted it leaves nothing behind.
    """
    parse_url(url)
    if name is not None:
        check_given_name(name)
    if workers < 1:
        raise UsageError(f"{workers} workers can handle nothing: have one at least")
    client = Client(name or "a member", workers)
    try:
        client._open(url, name, token, timeout_s)
    except BaseException:
        client.close()
        raise
    return client


class Client:
    """A member of the cluster: made by `connect`. Leaving its `with` block closes it."""

    def __init__(self, label: str, workers: int) -> None:
        self._client: asyncio_client.Client | None = None
        self._rooms: dict[str, Room] = {}
        self._workers = Workers(f"handler of {label}", workers)
        self._thread = LoopThread(label, self._on_stop, self._descriptors)
        self._joining: dict[str, asyncio.Lock] = {}
        self.state = OwnState(self)

    def _open(self, url: str, name: str | None, token: str | None, timeout_s: float) -> None:
        async def open() -> None:
            self._client = await asyncio_client.connect(
                url, name=name, token=token, timeout_s=timeout_s
            )
            self._thread.name = self.name

        self._thread.start()
        self._call(open)

    async def _on_stop(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def _descriptors(self) -> list[int]:
        number = -1 if self._client is None else self._client.fileno()
        return [] if number < 0 else [number]

    @property
    def name(self) -> str:
        """As the others know this member."""
        return self._inner.name

    @property
    def connected(self) -> bool:
        return self._inner.connected

    @property
    def trouble(self) -> str:
        """Why the last session was lost, or the last attempt to have one again failed."""
        return self._inner.trouble

    @property
    def hub(self) -> str:
        """The name of the hub."""
        return self._inner.hub

    @property
    def hubs(self) -> dict[str, bool]:
        """The hub's peers, and whether their links are open. Stale while not `connected`."""
        return self._look(lambda: dict(self._inner.hubs))

    # Messages to one member

    def call(self, member: str, data: bytes, *, timeout_s: float = TIMEOUT_S) -> bytes:
        """What the member's handler returns.

        Raises `NotFound` (no such member), `Refused` (its handler raised; `reason` is the code of
        its error), `Busy` (too much waits for it), `Unreachable` (the link to its hub is down),
        `TimedOut`, `Closed` (its session, ours, or a link between them ended). After the last two
        the handler may have run. Interrupting it stops the waiting, not the handler.
        """
        return self._call(lambda: self._inner.call(member, data, timeout_s=timeout_s))

    def send(self, member: str, data: bytes, *, timeout_s: float = TIMEOUT_S) -> None:
        """Return when the member's handler has returned. Raises as `call` does."""
        self._call(lambda: self._inner.send(member, data, timeout_s=timeout_s))

    def send_nowait(self, member: str, data: bytes, *, urgent: bool = False) -> None:
        """Send, in order with the other messages to this member; nobody says whether it arrived.

        Urgent ones overtake the others. Waits for this process only. Raises `Closed` while there is
        no session.
        """
        self._run(lambda: self._inner.send_nowait(member, data, urgent=urgent))

    def hub_stats(self) -> dict[str, Any]:
        """What there is at our hub and what waits: counts by name. Raises `Closed`, `TimedOut`."""
        return self._call(self._inner.hub_stats)

    @overload
    def on_message(self, handler: Handler) -> Handler: ...
    @overload
    def on_message(self, *, concurrent: bool = False) -> Callable[[Handler], Handler]: ...
    def on_message(self, handler: Handler | None = None, *, concurrent: bool = False) -> Any:
        """Decorate the handler of what is sent to this member: `handler(message) -> bytes | None`.

        It runs in a thread of the pool. Messages of one sender are handled one after the other;
        with `concurrent=True` they begin in the order they were sent and may overlap. Raises
        `UsageError` for a coroutine function.
        """
        return self._decorate(self._inner, handler, concurrent)

    # Rooms, hubs and the session

    def join(
        self,
        name: str,
        *,
        member: bool = True,
        watch: bool = True,
        when_slow: asyncio_client.WhenSlow = asyncio_client.WhenSlow.WAIT,
        timeout_s: float = TIMEOUT_S,
        on_message: Handler | None = None,
    ) -> Room:
        """Enter a room. Returns when its members and their state are known.

        `member=False`: to speak or watch only; nobody is told, and nothing said there comes here.
        `watch=False`: do not follow its members and state. `on_message` is a handler that is there
        from the first message on; one that is registered later refuses what came before. Joining
        again returns the same room, and changes what we are there. `when_slow`: what is done when
        too much waits for us. Raises `Busy` (a limit of the hub), `Closed`, `TimedOut`.
        """
        handler = None if on_message is None else self._threaded(on_message)

        async def enter() -> Room:
            async with self._joining.setdefault(name, asyncio.Lock()):
                join = partial(
                    self._inner.join, name, watch=watch, when_slow=when_slow, timeout_s=timeout_s
                )
                if handler is not None:
                    known = self._rooms.get(name)
                    (known._room if known else await join(member=False)).on_message(handler)
                inner = await join(member=member)
                return self._rooms.setdefault(name, Room(self, inner))

        return self._call(enter)

    def _leave(self, room: Room) -> None:
        if self._rooms.get(room.name) is room:
            del self._rooms[room.name]
        room._room.leave()

    def on_connected(self, callback: Callback) -> Callback:
        """Call `callback()` whenever there is a session again, with rooms joined, state known."""
        return self._follow(self._inner.on_connected, callback)

    def on_disconnected(self, callback: Callback) -> Callback:
        """Call `callback()` whenever the session was lost, other than by `close`."""
        return self._follow(self._inner.on_disconnected, callback)

    def on_hub(self, callback: Callback) -> Callback:
        """Call `callback(hub, open)` when our hub's link to another opened, or is down."""
        return self._follow(self._inner.on_hub, callback)

    def close(self) -> None:
        """Say goodbye and close. Idempotent; any thread may, a handler too.

        What waits for an answer raises `Closed`. Handlers that have not begun are dropped; those
        that run are waited for, 5 s at most, but their answers go nowhere. In a forked child it
        does nothing.
        """
        self._thread.stop()
        if not self._thread.is_inherited:
            self._workers.close(CLOSE_WAIT_S)

    def abort(self) -> None:
        """Drop the connection at once, as a crash would. The client dials again, until `close`."""
        self._run(self._inner.abort)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Between the threads

    @property
    def _inner(self) -> asyncio_client.Client:
        if self._client is None:
            raise Closed("this client was never connected")
        return self._client

    def _call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with self._workers.waiting():
            return self._thread.call(make)

    def _run(self, work: Callable[[], T]) -> T:
        return self._thread.run(work)

    def _look(self, work: Callable[[], T]) -> T:
        """What `work` sees at one moment. On a closed client: what was seen last."""
        try:
            return self._thread.run(work)
        except Closed:
            if self._thread.is_inherited or not self._thread.ended:
                raise
        return work()

    def _threaded(self, handler: Callable[[Taken], T]) -> Callable[[Taken], asyncio.Future[T]]:
        """The handler as the asyncio client wants it."""
        _refuse_coroutine_function(handler)

        def handle(taken: Taken) -> asyncio.Future[T]:
            done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            self._workers.submit(lambda: self._handle(handler, taken, done))
            return done

        return handle

    def _handle(self, handler: Callable[[Taken], T], taken: Taken, done: asyncio.Future[T]) -> None:
        """In a worker. A future takes no `StopIteration`, and an exit ends no loop of ours."""
        if done.cancelled():
            return
        try:
            answer = handler(taken)
        except Exception as error:
            failure = RuntimeError(repr(error)) if isinstance(error, StopIteration) else error
        except BaseException as error:
            failure = RuntimeError(f"the handler raised {error!r}")
        else:
            self._thread.post(lambda: None if done.done() else done.set_result(answer))
            return
        self._thread.post(lambda: None if done.done() else done.set_exception(failure))

    def _decorate(
        self,
        target: asyncio_client.Client | asyncio_client.Room,
        handler: Handler | None,
        concurrent: bool,
    ) -> Any:
        """Both forms of the decorator: `@on_message` and `@on_message(concurrent=True)`."""

        def register(handler: Handler) -> Handler:
            threaded = self._threaded(handler)
            self._run(lambda: target.on_message(concurrent=concurrent)(threaded))
            return handler

        return register if handler is None else register(handler)

    def _follow(self, register: Callable[[Callback], Callback], callback: Callback) -> Callback:
        _refuse_coroutine_function(callback)
        lane = Lane(self._workers)

        def fire(*arguments: object) -> None:
            lane.submit(partial(callback, *arguments))

        self._run(lambda: register(fire))
        return callback


class Room:
    """A room as one of those in it sees it: made by `Client.join`."""

    def __init__(self, client: Client, room: asyncio_client.Room) -> None:
        self.name = room.name
        self._client = client
        self._room = room

    @property
    def members(self) -> dict[str, MemberInfo]:
        """Its members by name, with ourselves if we are one. The last view without a session."""
        return self._client._look(lambda: dict(self._room.members))

    @property
    def state(self) -> dict[str, dict[str, bytes]]:
        """What its members publish: `state[member][key]`. The last view without a session."""
        return self._client._look(lambda: {name: dict(s) for name, s in self._room.state.items()})

    def say(self, data: bytes, *, timeout_s: float = TIMEOUT_S, urgent: bool = False) -> Receipt:
        """Tell all members; the receipt names the fate of each.

        Returns as soon as all have acknowledged or failed, and at the latest half a second after
        `timeout_s`. Waits first while members are too slow. `urgent` does not, and goes before
        all that waits for them. Raises `Closed` when our own session is or gets lost: then nobody
        knows; `TimedOut` when nothing was sent in time.
        """
        return self._client._call(lambda: self._room.say(data, timeout_s=timeout_s, urgent=urgent))

    def ask(self, data: bytes, *, timeout_s: float = TIMEOUT_S, urgent: bool = False) -> Replies:
        """As `say`, and what the members' handlers return. Who fails has no answer."""
        return self._client._call(lambda: self._room.ask(data, timeout_s=timeout_s, urgent=urgent))

    def cast(self, data: bytes, *, urgent: bool = False) -> None:
        """Tell all members; nobody says whether it arrived. Waits while members are too slow.

        Raises `Closed` without a session.
        """
        self._client._call(lambda: self._room.cast(data, urgent=urgent))

    @overload
    def on_message(self, handler: Handler) -> Handler: ...
    @overload
    def on_message(self, *, concurrent: bool = False) -> Callable[[Handler], Handler]: ...
    def on_message(self, handler: Handler | None = None, *, concurrent: bool = False) -> Any:
        """Decorate the handler of what is said here; as `Client.on_message`.

        That it returned acknowledges; what it returned is the reply, for those who ask. Without a
        handler whatever is said here is refused by us.
        """
        return self._client._decorate(self._room, handler, concurrent)

    def on_presence(self, callback: Callback) -> Callback:
        """Call `callback(presence)` when a member joined, left, is unknown, or known again."""
        return self._client._follow(self._room.on_presence, callback)

    def on_state(self, callback: Callback) -> Callback:
        """Call `callback(change)` when a member of this room put or deleted a value."""
        return self._client._follow(self._room.on_state, callback)

    def agree(self, value: bytes, *, timeout_s: float = TIMEOUT_S) -> Agreement:
        """Have all members of the room take `value`, or none; what became of it.

        As `agree` of the asyncio client, with the same errors. Interrupting it stops the waiting,
        not the agreement.
        """
        return self._client._call(lambda: self._room.agree(value, timeout_s=timeout_s))

    def on_prepare(self, handler: Callable[[Proposal], T]) -> Callable[[Proposal], T]:
        """Decorate `handler(proposal)`: that it returns says that we can do it, and will if told
        to; that it raises, that we cannot. Without one we refuse."""
        threaded = self._client._threaded(handler)
        self._client._run(lambda: self._room.on_prepare(threaded))
        return handler

    def on_outcome(self, handler: Callable[[Outcome], T]) -> Callable[[Outcome], T]:
        """Decorate `handler(outcome)`, which is told what became of proposals: `committed` is None
        if nobody could tell."""
        threaded = self._client._threaded(handler)
        self._client._run(lambda: self._room.on_outcome(threaded))
        return handler

    def leave(self) -> None:
        """Leave the room. Idempotent; the hub is told at once, or knows when the session ended."""
        self._client._run(lambda: self._client._leave(self))


class OwnState(Mapping[str, bytes]):
    """The small values a member publishes under its name, to those it shares a room with."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def put(self, key: str, value: bytes) -> None:
        """Publish a value; returns when the hub has it. During an outage: with the next session.

        Raises `Busy` when it is over the hub's limits; it is then not kept.
        """
        self._client._call(lambda: self._client._inner.state.put(key, value))

    def delete(self, key: str) -> None:
        """Take a value back. Without such a key, does nothing."""
        self._client._call(lambda: self._client._inner.state.delete(key))

    def snapshot(self) -> dict[str, bytes]:
        """All values as they are now."""
        return self._client._look(lambda: dict(self._client._inner.state))

    def __getitem__(self, key: str) -> bytes:
        return self.snapshot()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.snapshot())

    def __len__(self) -> int:
        return len(self.snapshot())


def _refuse_coroutine_function(function: Callable[..., Any]) -> None:
    if inspect.iscoroutinefunction(function):
        raise UsageError(
            f"{function.__name__} is a coroutine function: a blocking client takes plain functions"
        )
