"""What may happen to an app: the events that `tabane.gateway.activation` decides upon."""

from __future__ import annotations

from tabane.gateway.lowering import LowerAsked
from tabane.gateway.messages import StartTrace
from tabane.model import App, AppName, Instance, InstanceId, NodeName, Value


class AppChanged(Value, frozen=True):
    """The app as stored now, or None when it was removed."""

    key: AppName
    app: App | None


class FloorChanged(Value, frozen=True):
    """This data center's share of the app's `min`."""

    key: AppName
    floor: int


class InstanceReady(Value, frozen=True):
    instance: Instance
    trace: StartTrace | None = None


class InstanceEnded(Value, frozen=True):
    """It is gone, on purpose or not. `retry` False: a new start would end the same way at once.
    `again_s`: its node did not take it on, and is not to be asked for another one before that;
    None: that is not what ended it. `kept_after_s`: it is put away on its node, and may be had go
    on from there after so long."""

    app: AppName
    instance: InstanceId
    node: NodeName
    reason: str
    failed: bool
    retry: bool = True
    again_s: float | None = None
    kept_after_s: float | None = None


class InstanceAwake(Value, frozen=True):
    """It is not frozen, or no more, whatever the order of that `number` said: a person uses it, or
    its engine could not, or (`used` False) it was to be saved, or (`ends`) put away, and that is
    over. `again_s`: it was not, for that `reason`, and may be told to again after so long; None:
    never, or it was. `saved`: its node has a checkpoint of its revision."""

    app: AppName
    instance: InstanceId
    number: int
    used: bool = True
    again_s: float | None = None
    reason: str = ""
    ends: bool = False
    saved: bool = False


class StillStarting(Value, frozen=True):
    """Its start takes long; `doing`: what it is at, as a sentence's end."""

    app: AppName
    instance: InstanceId
    node: NodeName
    doing: str


class PutAway(Value, frozen=True):
    """An instance that was saved as it was, that long ago, and ended: it can go on from there."""

    app: AppName
    """Its cohort."""
    instance: InstanceId
    revision: int
    age_s: float


class SavedThere(Value, frozen=True):
    """What a node has checkpoints of. `copies`: app and revision, of those that others begin
    from."""

    away: tuple[PutAway, ...] = ()
    copies: tuple[tuple[AppName, int], ...] = ()


NOTHING_SAVED = SavedThere()


class NodeReport(Value, frozen=True):
    """All that a node runs of the apps whose home is here, as it answered what it was asked at
    `asked_at` because its agent, or this home, is new or was out of touch. Messages keep order, so
    of what was told it before, nothing is on its way any more: what it does not name is gone."""

    node: NodeName
    instances: tuple[Instance, ...]
    asked_at: float
    saved: SavedThere = NOTHING_SAVED


class GatewayJoined(Value, frozen=True):
    """It is there, and will report. Until it has, nothing counts as idle."""

    gateway: str


class GatewayGone(Value, frozen=True):
    gateway: str


class StopAsked(Value, frozen=True):
    """This instance is to be stopped: a person wants it, and its sessions are drained first; or it
    is `hung`, and its node stops it already."""

    app: AppName
    instance: InstanceId
    reason: str = "stopped by request"
    hung: bool = False


class Tick(Value, frozen=True):
    pass


Event = (
    AppChanged
    | FloorChanged
    | InstanceReady
    | InstanceEnded
    | InstanceAwake
    | StillStarting
    | NodeReport
    | GatewayJoined
    | GatewayGone
    | StopAsked
    | LowerAsked
    | Tick
)
