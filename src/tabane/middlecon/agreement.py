"""Agreements as a client sees them: it proposes a value, or prepares for one and hears the outcome.

What the hub does stands in `tabane.middlecon.agree`. The PREPAREs and OUTCOMEs of one proposer are
handled one after the other, so an outcome never overtakes the preparation it is for. Between the
two this member is in doubt; if it hears nothing, it is told so by an outcome that is not known.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec

from tabane.errors import Closed, Refused
from tabane.middlecon.agree import (
    HUB_BYTES,
    OUTCOME_S,
    RUN_BYTES,
    Agreed,
    mark_of_hub,
    mark_of_run,
    parse_outcome,
    parse_prepare,
)
from tabane.middlecon.connection import TIMEOUT_S, Connection
from tabane.middlecon.frames import Frame, Kind
from tabane.middlecon.inbox import Inbox, Message
from tabane.middlecon.receipts import Reason
from tabane.middlecon.wire import Wire
from tabane.model import Value
from tabane.supervise import Supervisor, log_failure

GRACE_S = 5.0
"""How much longer than a proposal's deadline a member waits for the outcome. The coordinator may
wait half a second for each link to hear all sums, and the outcome travels over the same links."""
SETTLE_S = 8 * OUTCOME_S
"""How much longer than its deadline a proposer's hub may need to tell it everything: two graces of
half a second for each of several links, and the time members have for the outcome."""
REMEMBERED = 1_000
"""Outcomes whose repetition is recognised; as many as a hub keeps."""
EARLY = 100
"""Outcomes that wait for the first handler: one that is back is told before it can have one."""


class Agreement(msgspec.Struct, frozen=True):
    """What became of a proposal.

    `committed`: all members prepared, at one epoch of the room, and then were told to commit.
    `prepared`, `refused`, `unknown`, `asleep` are who could prepare, who certainly could not and
    why, who is behind a link that died meanwhile, and who is frozen. `untold` do not know the
    outcome yet; they are told when they are back. `changed`: somebody joined or left meanwhile.
    """

    committed: bool
    prepared: tuple[str, ...] = ()
    refused: dict[str, Reason] = {}
    unknown: tuple[str, ...] = ()
    asleep: tuple[str, ...] = ()
    untold: tuple[str, ...] = ()
    changed: bool = False


class Proposal(Value, frozen=True):
    """What `on_prepare` gets. `timeout_s`: how long the proposer waits."""

    id: str
    proposer: str
    value: bytes
    timeout_s: float


class Outcome(Value, frozen=True):
    """What `on_outcome` gets. `committed` is None if the outcome is not known: the coordinator's
    hub is gone, or could not be heard in time. If it comes to be known after all, that follows."""

    id: str
    proposer: str
    value: bytes
    committed: bool | None


OnPrepare = Callable[[Proposal], Awaitable[object] | object]
OnOutcome = Callable[[Outcome], Awaitable[object] | object]
OnPrepareT = TypeVar("OnPrepareT", bound=OnPrepare)
OnOutcomeT = TypeVar("OnOutcomeT", bound=OnOutcome)


class _Step(Message):
    """A PREPARE or OUTCOME, as it waits for its turn."""

    __slots__ = ("frame",)

    def __init__(self, wire: Wire, frame: Frame, room: str) -> None:
        super().__init__(wire, frame, room)
        self.frame = frame


class Ballot:
    """A member's part in the agreements of one room."""

    def __init__(self, member: str, room: str, tasks: Supervisor) -> None:
        self.on_prepare: OnPrepare | None = None
        self._on_outcome: OnOutcome | None = None
        self._name = f"{member} in {room}"
        self._tasks = tasks
        self._inbox = Inbox(f"{self._name}, agreeing,", tasks)
        self._inbox.handle_with(self._handle, concurrent=False)
        self._doubts: dict[bytes, tuple[Proposal, asyncio.Task[None]]] = {}
        """What it prepared for, until it is told the outcome."""
        self._told: dict[bytes, None] = {}
        self._early: list[Outcome] = []

    def deliver(self, wire: Wire, frame: Frame, room: str) -> None:
        self._inbox.deliver(_Step(wire, frame, room))

    def handle_outcomes_with(self, handler: OnOutcome) -> None:
        """From now on `handler` gets the outcomes, first those that came already."""
        self._on_outcome = handler
        early, self._early = self._early, []
        if early:
            self._tasks.start(f"outcomes of {self._name}", self._tell_all(early))

    def on_hub_gone(self, hub: str, instance: str = "") -> None:
        """A hub is gone, or is now the run `instance`: what an older run knew is lost."""
        mark, run = mark_of_hub(hub), mark_of_run(instance)
        for id in list(self._doubts):
            is_run = id[HUB_BYTES : HUB_BYTES + RUN_BYTES] == run
            if id[:HUB_BYTES] == mark and not (instance and is_run):
                self._give_up(id)

    def _handle(self, message: Message) -> Any:
        assert isinstance(message, _Step)
        if message.frame.kind == Kind.PREPARE:
            return self._prepare(message.frame)
        return self._hear(message.frame)

    def _prepare(self, frame: Frame) -> Awaitable[None] | None:
        id, value = parse_prepare(frame)
        if self.on_prepare is None:
            raise Refused(f"{self._name} takes no part in agreements")
        if id in self._told:
            raise Refused("it was decided already")
        proposal = Proposal(id.hex(), frame.name, value, frame.value / 1000)
        deadline = asyncio.get_running_loop().time() + proposal.timeout_s
        result = self.on_prepare(proposal)
        if isinstance(result, Awaitable):
            return self._finish(id, proposal, result, deadline)
        self._doubt(id, proposal, deadline)
        return None

    async def _finish(
        self, id: bytes, proposal: Proposal, work: Awaitable[object], deadline: float
    ) -> None:
        await work
        self._doubt(id, proposal, deadline)

    def _doubt(self, id: bytes, proposal: Proposal, deadline: float) -> None:
        waiting = self._tasks.start(f"outcome for {self._name}", self._wait(id, deadline))
        self._doubts[id] = proposal, waiting

    async def _wait(self, id: bytes, deadline: float) -> None:
        await asyncio.sleep(deadline + GRACE_S - asyncio.get_running_loop().time())
        self._give_up(id)

    def _give_up(self, id: bytes) -> None:
        """The outcome is not known, and may never be."""
        proposal, waiting = self._doubts.pop(id)
        if waiting is not asyncio.current_task():
            waiting.cancel()
        outcome = Outcome(proposal.id, proposal.proposer, proposal.value, None)
        self._tasks.start(f"no outcome for {self._name}", self._tell_all([outcome]))

    def _hear(self, frame: Frame) -> Awaitable[None] | None:
        verdict = parse_outcome(frame)
        if verdict.id in self._told:
            return None
        self._told[verdict.id] = None
        if len(self._told) > REMEMBERED:
            del self._told[next(iter(self._told))]
        if doubt := self._doubts.pop(verdict.id, None):
            doubt[1].cancel()
        return self._tell(
            Outcome(verdict.id.hex(), verdict.proposer, verdict.value, verdict.committed)
        )

    def _tell(self, outcome: Outcome) -> Awaitable[None] | None:
        """Call the handler. That it raises does not change that it was told."""
        if self._on_outcome is None:
            self._early = [*self._early, outcome][-EARLY:]
            return None
        try:
            result = self._on_outcome(outcome)
        except Exception as error:
            log_failure(f"on_outcome of {self._name}", error)
            return None
        return self._await(result) if isinstance(result, Awaitable) else None

    async def _await(self, work: Awaitable[object]) -> None:
        try:
            await work
        except Exception as error:
            log_failure(f"on_outcome of {self._name}", error)

    async def _tell_all(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if (work := self._tell(outcome)) is not None:
                await work


class Agreeing(ABC):
    """The part of a room that is about agreements."""

    name: str
    ballot: Ballot
    _connection: Connection

    async def agree(self, value: bytes, *, timeout_s: float = TIMEOUT_S) -> Agreement:
        """Have all members of the room take `value`, or none.

        Each is asked to prepare. If all can within `timeout_s`, and nobody joined or left
        meanwhile, all are told to commit, else to abort; we are in no case asked or told ourselves.
        Returns when everyone knows the outcome, or is named in `untold` and will be told when it
        is back: in the worst case some seconds after `timeout_s`. Raises `Closed` when our session
        is or gets lost, or we stop waiting by `TimedOut`: then we do not know the outcome. What was
        not decided when our session ended is aborted. Raises `Refused` for a value over the hub's
        limit, and in the lobby. Cancelling it stops the waiting, not the agreement.
        """
        agreed: Agreed = await self._connection.request(
            Kind.AGREE,
            timeout_s + SETTLE_S,
            to=self._joined(),
            value=max(round(timeout_s * 1000), 1),
            data=value,
        )
        return Agreement(
            agreed.committed,
            tuple(agreed.prepared),
            agreed.refused,
            tuple(agreed.unknown),
            tuple(agreed.asleep),
            tuple(agreed.untold),
            agreed.changed,
        )

    def on_prepare(self, handler: OnPrepareT) -> OnPrepareT:
        """Decorate `handler(proposal)`: that it returns says that we can do it, and will if told
        to; that it raises, that we cannot. Without one we refuse. Plain or async; what one proposer
        proposes is handled in order. Whoever prepared must be able to commit as well as to abort
        until `on_outcome` tells which, also after a crash of its own, if it means to keep its word.
        """
        self.ballot.on_prepare = handler
        return handler

    def on_outcome(self, handler: OnOutcomeT) -> OnOutcomeT:
        """Decorate `handler(outcome)`, which is told what became of proposals, each once by each
        run of this program. It may be told of some it did not prepare for: it joined just then, or
        has prepared in an earlier run. `outcome.committed` is None if nobody could tell."""
        self.ballot.handle_outcomes_with(handler)
        return handler

    @abstractmethod
    def _joined(self) -> int:
        """The room's number in the present session. Raises `Closed` when it is not joined."""


def deliver_step(
    rooms: Mapping[str, Agreeing], numbered: Mapping[int, Agreeing], wire: Wire, frame: Frame
) -> None:
    """A PREPARE or OUTCOME came, for a room, or (to 0) for us alone, which then names its room."""
    if frame.to or frame.kind == Kind.PREPARE:
        room = numbered.get(frame.to)
    else:
        room = rooms.get(parse_outcome(frame).room)
    if room is None:
        Message(wire, frame, None).refuse(Closed("it is not in that room"), raised=False)
    else:
        room.ballot.deliver(wire, frame, room.name)
