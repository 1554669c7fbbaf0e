"""What gateways and an app's home say to each other, as values (see `activation`, `grants`).

Both sides count in differences, over a connection that keeps order and loses nothing while it
lives. After a break the gateway's `Report` says how things stand and begins a new *epoch*: answers
of the home that name an older one are void, however late they arrive.
"""

from __future__ import annotations

import msgspec

from tabane.model import AppName, Generation, InstanceId, NodeName, Value


class Demand(Value, frozen=True, tag="demand"):
    """Gateway to home: so many of my sessions of this app have no slot now.

    `waited_s`: how long the first of them has waited. `answered_seen`: sessions that I saw
    answered (with a slot or a refusal) in this epoch, so that the home can tell which of its
    answers were still on their way when this was said. `known`: the revision of the store that my
    routes are of; a home that is behind it may not have heard of the app yet.
    """

    app: AppName
    waiting: int
    waited_s: float
    epoch: int
    answered_seen: int
    known: int = 0


class Returned(Value, frozen=True, tag="returned"):
    """Gateway to home: slots given back. `unused_s`: how long ago the last session here ended."""

    app: AppName
    instance: InstanceId
    slots: int
    unused_s: float


class StillUsed(Value, frozen=True, tag="still_used"):
    """Gateway to home, answering a `Revoke` with `unused_s`: no, it was used that recently, or
    no slot is free. Agent to home: people use it otherwise, and will for so long yet (negative)."""

    app: AppName
    instance: InstanceId
    unused_s: float


class Broken(Value, frozen=True, tag="broken"):
    """Gateway to home: this instance could not be reached, or (`reached`) broke an answer off,
    which says nothing of the others that it serves; its slots follow as `Returned`."""

    app: AppName
    instance: InstanceId
    reason: str
    reached: bool = False


class Held(Value, frozen=True):
    instance: InstanceId
    slots: int
    unused_s: float


class AppReport(Value, frozen=True):
    demand: Demand
    held: tuple[Held, ...]

    @property
    def app(self) -> AppName:
        return self.demand.app


class Report(Value, frozen=True, tag="report"):
    """Gateway to home: how things stand, in full; a new epoch begins here."""

    apps: tuple[AppReport, ...]


class StartTrace(Value, frozen=True):
    """What a start cost, phase by phase, in microseconds (see `tabane.model.PHASES`). A thaw costs
    nothing before the grant, which does not wait for it."""

    phases_us: dict[str, int]
    total_us: int
    option: str = "cold"
    """As of `tabane.model.WakeRecord`; `note` likewise."""
    note: str = ""


THAW = StartTrace({}, 0, "thaw")
SAVED = StartTrace({}, 0, "thaw", "it stood still, as a checkpoint of it was being made")


class Grant(Value, frozen=True, tag="grant"):
    """Home to gateway: `slots` more sessions may go there. `answered`: all so far, with these."""

    app: AppName
    revision: int
    generation: Generation
    node: NodeName
    address: str
    port: int
    slots: int
    epoch: int
    answered: int
    trace: StartTrace | None = None
    protocol: str = "http"
    """What the instance speaks: see `tabane.model.App`."""
    tcp: tuple[tuple[int, int], ...] = ()
    """Of each public TCP port: itself, and where the instance listens for it."""

    @property
    def instance(self) -> InstanceId:
        return self.generation.instance


class Revoke(Value, frozen=True, tag="revoke"):
    """Home to gateway: give slots of this instance back.

    `unused_s` None: those that are free and each other one when its session ends (a drain). 0:
    others wait, so those that are free, or else the next one that comes free. More: those that
    are free, if none was in use for that long. The answer is `Returned` or `StillUsed`.
    """

    app: AppName
    instance: InstanceId
    unused_s: float | None


class Refuse(Value, frozen=True, tag="refuse"):
    """Home to gateway: the first `sessions` that wait for this app get no slot.

    `kind`: `broken` (what was started for them failed), `paused` (nothing was started for them:
    too many starts failed before), `late` (there was no slot in time), `gone` (no such app any
    more), `elsewhere` (this data center cannot run it). Those of them that have not waited for
    `waited_s` yet are not meant: they can wait longer, and are asked for again.
    """

    app: AppName
    kind: str
    reason: str
    """For `broken` and `paused`, the rest of a sentence that begins with the app's name; for `late`
    what is known of what they waited for, as a sentence's end."""
    retry_after_s: float
    sessions: int
    epoch: int
    answered: int
    waited_s: float = 0.0


ToHome = Demand | Returned | StillUsed | Broken | Report
ToGateway = Grant | Revoke | Refuse

encode = msgspec.msgpack.Encoder().encode
parse_to_home = msgspec.msgpack.Decoder(ToHome).decode
parse_to_gateway = msgspec.msgpack.Decoder(ToGateway).decode
