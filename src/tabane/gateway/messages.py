"""What gateways and an app's home say to each other, as values (see `activation`, `grants`).

Both sides count in differences, over a connection that keeps order and loses nothing while it
lives; after a break the gateway's `Report` says how things stand, and counting starts from there.
"""

from __future__ import annotations

import msgspec

from tabane.model import AppName, Generation, InstanceId, NodeName, Value


class Demand(Value, frozen=True, tag="demand"):
    """Gateway to home: so many of my sessions of this app have no slot now.

    `granted_seen`: slots I have been granted in all, so that the home can tell which of its grants
    were still on their way when this was said.
    """

    app: AppName
    waiting: int
    granted_seen: int


class Returned(Value, frozen=True, tag="returned"):
    """Gateway to home: slots given back. `unused_s`: how long ago the last session here ended."""

    app: AppName
    instance: InstanceId
    slots: int
    unused_s: float


class StillUsed(Value, frozen=True, tag="still_used"):
    """Gateway to home, answering a `Revoke` with `unused_s`: no, it was used that recently."""

    app: AppName
    instance: InstanceId
    unused_s: float


class Broken(Value, frozen=True, tag="broken"):
    """Gateway to home: this instance could not be reached; its slots follow as `Returned`."""

    app: AppName
    instance: InstanceId
    reason: str


class Held(Value, frozen=True):
    instance: InstanceId
    slots: int
    unused_s: float


class AppReport(Value, frozen=True):
    app: AppName
    waiting: int
    granted_seen: int
    held: tuple[Held, ...]


class Report(Value, frozen=True, tag="report"):
    """Gateway to home: how things stand, in full; counting starts anew from here."""

    apps: tuple[AppReport, ...]


class StartTrace(Value, frozen=True):
    """What a start cost, phase by phase, in microseconds (see `tabane.model.PHASES`)."""

    phases_us: dict[str, int]
    total_us: int


class Grant(Value, frozen=True, tag="grant"):
    """Home to gateway: `slots` more sessions may go there. `granted`: all of this app so far."""

    app: AppName
    revision: int
    generation: Generation
    node: NodeName
    address: str
    port: int
    slots: int
    granted: int
    trace: StartTrace | None = None

    @property
    def instance(self) -> InstanceId:
        return self.generation.instance


class Revoke(Value, frozen=True, tag="revoke"):
    """Home to gateway: give slots of this instance back.

    With `unused_s`: those not in use, if none was in use for that long (0: whatever is free now),
    else `StillUsed`. Without: free ones now and each other one when its session ends (a drain).
    """

    app: AppName
    instance: InstanceId
    unused_s: float | None


class Refuse(Value, frozen=True, tag="refuse"):
    """Home to gateway: sessions waiting for this app get no slot. `kind`: `broken` (it does not
    start), `gone` (no such app any more), `elsewhere` (this data center cannot run it)."""

    app: AppName
    kind: str
    reason: str
    retry_after_s: float


ToHome = Demand | Returned | StillUsed | Broken | Report
ToGateway = Grant | Revoke | Refuse

encode = msgspec.msgpack.Encoder().encode
parse_to_home = msgspec.msgpack.Decoder(ToHome).decode
parse_to_gateway = msgspec.msgpack.Decoder(ToGateway).decode
