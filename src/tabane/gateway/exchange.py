"""One request and its response: find a slot, send the request there, pass the answer on.

    WAITING     for a slot or a connection, in a task; the client is watched meanwhile
    SENT        the request, or what came of it, went to an app; nothing final came back
    ANSWERING   the final response's head went to the client: nothing can be taken back
    TUNNEL      the protocol was changed: bytes pass both ways, the slot is held
    DONE        the slot is released, the connections serve others or are closed

The warm path (a slot free now, a connection kept) goes from WAITING to SENT within one call, with
no task. Whatever happens, an exchange ends once, in `_complete` (the response is whole), `_reply`
(the gateway answers itself), `_cut` (a truncated answer: the client's connection is aborted, so
that it can tell), `abandon` (the client left) or with its tunnel; each releases the slot.

Sent again to another instance is a request of which no byte was written to an app's connection, or
which is idempotent, has all of its body here and got no byte back. When a kept connection breaks,
that says nothing of the instance, unless that ended: the same slot is tried with a new connection.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from typing import TYPE_CHECKING

from tabane.errors import NotFound, TabaneError, TimedOut, Unreachable
from tabane.gateway.api import H2C, Route, Slot
from tabane.gateway.forwarding import forward_fields
from tabane.gateway.headers import BadMessage
from tabane.gateway.heads import CONTINUE, ResponseHead
from tabane.gateway.http1 import REPLAY_BYTES, Request, Response
from tabane.gateway.replies import Reply, reply_for
from tabane.gateway.tunnel import Tunnel
from tabane.gateway.upstream import Upstream

if TYPE_CHECKING:
    from tabane.gateway.sides import AppSide, ClientSide

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""Beyond the router's own deadline, in case the router itself does not answer."""


class Stage(enum.Enum):
    WAITING = enum.auto()
    SENT = enum.auto()
    ANSWERING = enum.auto()
    TUNNEL = enum.auto()
    DONE = enum.auto()


WAITING, SENT, ANSWERING, TUNNEL, DONE = Stage


class Exchange:
    """Made by a client's side for each of its requests; `begin` sets it going."""

    __slots__ = (
        *("_client", "_gateway", "_owes_continue", "_sent_whole", "_slot", "_task", "_tries"),
        *("_upload_due", "_upstream", "_wrote", "begun", "request", "route", "stage", "status"),
    )

    def __init__(self, client: ClientSide, request: Request) -> None:
        self._client = client
        self._gateway = gateway = client.gateway
        self.request = request
        self.route: Route | None = None
        self.begun = gateway.now
        self.stage = WAITING
        self.status = 0
        """Of the final answer, once there is one."""
        self._slot: Slot | None = None
        self._upstream: AppSide | None = None
        self._task: asyncio.Task[None] | None = None
        self._tries = 1
        self._wrote = self._sent_whole = False
        self._upload_due = 0.0
        self._owes_continue = request.head.expects_continue

    # Find a slot and a connection.

    def begin(self) -> None:
        gateway, head = self._gateway, self.request.head
        try:
            if gateway.forward:
                slot = self._accept()
            else:
                self.route = route = gateway.router.route(head.host, head.path)
                if route is None:
                    raise NotFound(f"no app has the host name {head.host!r}")
                if route.by_caller:
                    token = forward_fields(head).get(b"tabane-token", b"")
                    peer = self._client.provenance.peer
                    self.route = route = gateway.router.route_caller(route, peer, token)
                slot = gateway.router.acquire_nowait(route)
        except TabaneError as error:
            self._reply(reply_for(error))
            return
        self._slot = slot
        upstream = None
        if slot is not None:
            upstream = gateway.pools.take(slot, head.is_idempotent)
        if upstream is not None:
            self._send(upstream)
        else:
            self._wait()

    def _accept(self) -> Slot | None:
        """The slot that another gateway means, or a free one of the app that it means."""
        router = self._gateway.router
        chosen = router.accept_forward(forward_fields(self.request.head))
        if not isinstance(chosen, Route):
            return chosen
        self.route = chosen
        return router.acquire_nowait(chosen)

    def _wait(self, *, fresh: bool = False) -> None:
        """Look for what is missing in a task of its own; `fresh`: take no kept connection."""
        self.stage = WAITING
        self._client.deadline = self._gateway.now + self._start_timeout_s + GRACE_S
        self._task = self._gateway.supervisor.start(
            f"session {self.request.head.host}", self._find(fresh=fresh)
        )
        self._client.balance()

    @property
    def _start_timeout_s(self) -> float:
        return self.route.start_timeout_s if self.route is not None else GRACE_S

    async def _find(self, *, fresh: bool) -> None:
        try:
            upstream = await self._connect(fresh=fresh)
        except TabaneError as error:
            self._task = None
            self._reply(reply_for(error))
        except Exception:
            self._task = None
            self._reply(Reply(500, "fault", "the gateway failed, its log says why"))
            raise
        else:
            self._task = None
            self._send(upstream)

    async def _connect(self, *, fresh: bool) -> AppSide:
        """Get `_slot`, unless it is there, and a connection to it."""
        pools = self._gateway.pools
        while True:
            if self._slot is None:
                assert self.route is not None
                self._slot = await self._gateway.router.acquire(self.route)
            slot = self._slot
            upstream = None if fresh else pools.take(slot, self._is_safe)
            if upstream is not None:
                return upstream
            try:
                return await pools.connect(slot)
            except OSError as error:
                reason = f"{slot.host}:{slot.port} takes no connection ({error or 'timeout'})"
            except BadMessage as error:
                slot.failed(error.message, reached=True)
                self._release()
                raise
            slot.failed(reason)
            self._release()
            if self.route is None or not self._may_try_again():
                raise Unreachable(f"the app cannot be reached: {reason}")
            fresh = False

    def _may_try_again(self) -> bool:
        """Count a further try, unless there were enough or the time is over."""
        gateway = self._gateway
        if self._tries >= gateway.limits.max_tries:
            return False
        if gateway.clock.now() > self.begun + self._start_timeout_s:
            return False
        self._tries += 1
        gateway.counters.retries += 1
        return True

    # The request goes out.

    @property
    def _is_safe(self) -> bool:
        """It may reach apps twice."""
        return self.request.head.is_idempotent and self.request.is_replayable

    @property
    def blocks_reading(self) -> bool:
        """No more of the client's bytes are wanted for now."""
        if self._upstream is not None:
            return self._upstream.is_full
        return self.request.buffered > REPLAY_BYTES

    def _send(self, upstream: AppSide) -> None:
        slot, client, request = self._slot, self._client, self.request
        assert slot is not None
        head = request.head
        self._upstream = upstream
        self.stage = SENT
        self._wrote = True
        expects_continue = self._owes_continue and not request.buffered
        upstream.begin(self, head, client.provenance, slot.headers, expects_continue)
        if client.is_full:
            upstream.read(False)
        if head.has_body:
            self._send_body()
        else:
            self._sent_whole = True
            route, gateway = self.route, self._gateway
            client.deadline = gateway.now + (
                route.response_timeout_s if route is not None else self._response_timeout_s
            )
        if not client.reads:
            client.balance()

    def _send_body(self) -> None:
        """Send on what came of the body, and set how long what must follow may take."""
        request, upstream, limits = self.request, self._upstream, self._gateway.limits
        assert upstream is not None
        pieces = request.take_body()
        if pieces:
            self._owes_continue = False
        if request.complete:
            self._sent_whole = True
            allowed_s = self._response_timeout_s
        elif self._owes_continue:
            allowed_s = limits.continue_after_s
        else:
            allowed_s = self._allow_upload_s(sum(map(len, pieces)))
        if self.stage is SENT:
            self._client.deadline = self._gateway.now + allowed_s
        upstream.send(pieces, request.complete, request.trailers)

    def _allow_upload_s(self, came_bytes: int) -> float:
        """In which more of the body must come. A stream of gRPC's may be silent for long."""
        limits, now, slot = self._gateway.limits, self._gateway.now, self._slot
        if slot is not None and slot.protocol == H2C:
            return limits.stream_idle_timeout_s
        self._upload_due = limits.next_upload_due(self._upload_due, now, came_bytes)
        return min(limits.body_idle_timeout_s, self._upload_due - now)

    @property
    def _response_timeout_s(self) -> float:
        """A slot that another gateway named has none: that gateway watches the time."""
        if self.route is None:
            return self._gateway.limits.stream_idle_timeout_s
        return self.route.response_timeout_s

    def on_request_data(self, error: BadMessage | None) -> None:
        """More of the body came, or its end, or (`error`) what cannot be a body."""
        if self._sent_whole:
            return
        if error is not None and not self.request.complete:
            self._refuse(Reply(error.status, error.code, error.message))
        elif self._upstream is not None:
            self._send_body()

    # The response comes back.

    def on_response(self, reader: Response) -> None:
        if reader.interims:
            self._pass_interims(reader)
        head = reader.head if self.stage is SENT else None
        if head is not None:
            slot = self._slot
            assert slot is not None
            if head.refused and slot.headers and self._go_elsewhere(head.refused):
                return
            if head.status == 101:
                self._switch(reader, head)
                return
            slot.first_byte()
            self.stage = ANSWERING
            self.status = head.status
        if reader.complete:
            self._complete(reader, head)
            return
        client, pieces = self._client, reader.body
        if self.stage is ANSWERING:
            client.deadline = self._gateway.now + self._gateway.limits.stream_idle_timeout_s
        if head is not None or pieces:
            reader.body = []
            client.respond(head, pieces, False)
        if reader.error is not None:
            self._fail(reader.error.message)

    def _pass_interims(self, reader: Response) -> None:
        interims, reader.interims = reader.interims, ()
        for interim in interims:
            if self.request.head.is_http_1_0 or (interim.status == 100 and not self._owes_continue):
                continue
            if interim.status == 100:
                self._owes_continue = False
                self._extend()
            self._client.respond_interim(interim)

    def _go_elsewhere(self, code: bytes) -> bool:
        """Another gateway had no place for the request, and no byte of it reached the app."""
        slot, request = self._slot, self.request
        assert slot is not None
        if self.route is None or not request.is_replayable or not self._may_try_again():
            return False
        slot.failed(f"the gateway at {slot.host}:{slot.port} refused: {code.decode('latin-1')}")
        self._start_over(keep_slot=False)
        return True

    def _start_over(self, *, keep_slot: bool) -> None:
        self._drop_upstream()
        self.request.rewind()
        self._upload_due = 0.0
        self._sent_whole = False
        if not keep_slot:
            self._release()
        self._wait(fresh=keep_slot)

    def on_upstream_flow(self) -> None:
        if self.stage is SENT and not self._sent_whole:
            self._upload_due = 0.0  # the time that the app takes is not the client's
            self._extend()
        self._client.balance()

    def on_upstream_end(self, reader: Response, reason: str) -> None:
        if reader.complete:
            self.on_response(reader)
        else:
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        """The app's side broke: go on elsewhere if that is right, else say so."""
        slot, upstream = self._slot, self._upstream
        assert slot is not None and upstream is not None
        reached = not upstream.is_dead
        same_slot = (upstream.is_used or upstream.was_refused) and reached
        is_safe = self.request.is_replayable if upstream.was_refused else self._is_safe
        if (
            self.stage is SENT
            and is_safe
            and not (upstream.was_reset or upstream.reader.has_begun)
            and (same_slot or self.route is not None)
            and self._may_try_again()
        ):
            if not same_slot:
                slot.failed(reason, reached=reached)
            self._start_over(keep_slot=same_slot)
            return
        if not upstream.was_reset:
            slot.failed(reason, reached=reached)
        self._refuse(Reply(502, "broken", f"the app broke off: {reason}"))

    # Deadlines.

    def on_client_flow(self) -> None:
        """The client takes bytes again, or takes no more for now."""
        client, limits = self._client, self._gateway.limits
        if self._upstream is not None:
            self._upstream.read(not client.is_full)
        if self.stage is ANSWERING:
            allowed_s = (
                limits.body_idle_timeout_s if client.is_full else limits.stream_idle_timeout_s
            )
            client.deadline = self._gateway.now + allowed_s

    def on_deadline(self) -> None:
        """What must happen next did not within its time."""
        if self.stage is WAITING:
            self._reply(reply_for(TimedOut("the app did not start in time")))
        elif self.stage is SENT:
            self._on_silence()
        elif self._client.is_full and self._client.has_moved():
            self._extend()
        else:
            side = "client took" if self._client.is_full else "app sent"
            self._cut(f"the {side} nothing for too long")

    def _extend(self) -> None:
        self._client.deadline = self._gateway.now + self._gateway.limits.body_idle_timeout_s

    def _on_silence(self) -> None:
        upstream = self._upstream
        assert upstream is not None
        if self._owes_continue:
            self._owes_continue = False
            self._client.respond_interim(CONTINUE)
            self._extend()
        elif self.request.complete:
            reason = f"the app did not answer within {self._response_timeout_s:g} s"
            self._reply(Reply(504, "timed_out", reason))
        elif not upstream.is_full:
            self._reply(Reply(408, "timed_out", "the rest of the request's body did not come"))
        elif upstream.has_moved():
            self._extend()
        else:
            self._reply(Reply(504, "timed_out", "the app does not read the request's body"))

    # The five ends.

    def _complete(self, reader: Response, head: ResponseHead | None) -> None:
        client, upstream = self._client, self._upstream
        assert upstream is not None
        client.respond(head, reader.body, True, reader.trailers)
        self._upstream = None
        upstream.end(self._gateway.now if self._sent_whole else None)
        self._end()
        client.on_done()

    def _switch(self, reader: Response, head: ResponseHead) -> None:
        """The app changes the protocol: what follows is a tunnel's."""
        client, upstream, slot = self._client, self._upstream, self._slot
        assert isinstance(upstream, Upstream) and slot is not None
        if not (self.request.head.upgrade and head.upgrade):
            self._fail("the app changed the protocol, which nobody asked for")
            return
        slot.first_byte()
        self.status = head.status
        client.respond(head, [], False)
        self.stage = TUNNEL
        self._upstream = None
        client.open_tunnel(upstream, reader.rest, self._on_tunnel_end)

    def _on_tunnel_end(self, tunnel: Tunnel) -> None:
        self._gateway.counters.received_bytes += tunnel.from_client_bytes
        self._gateway.counters.sent_bytes += tunnel.from_app_bytes
        self._end()
        self._gateway.forget(tunnel)

    def _refuse(self, reply: Reply) -> None:
        if self.stage is ANSWERING:
            self._cut(reply.reason)
        else:
            self._reply(reply)

    def _reply(self, reply: Reply) -> None:
        refused = self._gateway.forward and not self._wrote and reply.retry_after_s is not None
        self.status = reply.status
        self._let_go()
        self._client.reply(reply, self, refused=refused)

    def _cut(self, reason: str) -> None:
        log.info("%s: answer cut short: %s", self.request.head.host, reason)
        self._gateway.counters.aborted += 1
        self._let_go()
        self._client.cut()

    def abandon(self) -> None:
        """The client is gone: stop all that was done for it. Idempotent."""
        if self.stage not in (DONE, TUNNEL):
            self._gateway.counters.aborted += 1
            self._let_go()

    def _let_go(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        self._drop_upstream()
        self._end()

    def _drop_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()

    def _release(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.release()

    def _end(self) -> None:
        self.stage = DONE
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.release()
        gateway = self._gateway
        gateway.counters.active -= 1
        if self.status:
            gateway.counters.responses[self.status // 100] += 1
        if gateway.on_access is not None:
            gateway.tell_access(self, self._client)
