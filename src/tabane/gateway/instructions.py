"""What an app's home has nodes and gateways do: the instructions of `tabane.gateway.activation`."""

from __future__ import annotations

from tabane.gateway.messages import ToGateway
from tabane.model import App, AppName, InstanceId, NodeName, Value


class Start(Value, frozen=True):
    """`resume`: it was put away on that node, and goes on from there; no other begins instead."""

    app: App
    instance: InstanceId
    node: NodeName
    resume: bool = False


class Stop(Value, frozen=True):
    app: AppName
    instance: InstanceId
    node: NodeName
    reason: str


class Freeze(Value, frozen=True):
    """Nobody holds slots of it, nor will get any before `Thaw`. `number`: of this order, by which
    an answer to it (`InstanceAwake`) is told from one to an earlier one. `reason`: if it is another
    than that it was idle for so long."""

    instance: InstanceId
    node: NodeName
    number: int
    reason: str = ""


class Save(Value, frozen=True):
    """Have a checkpoint made of it, which goes on afterwards and is said to (`InstanceAwake`). As
    of `Freeze`, nobody uses it meanwhile; sessions that come after all wait for the dump's end.
    `ends`: it is put away, saved as it is and ended (`InstanceEnded`), unless it is thawed before
    that or it cannot be (`InstanceAwake`); nobody gets a slot of it before either is said."""

    instance: InstanceId
    node: NodeName
    number: int
    ends: bool = False


class Thaw(Value, frozen=True):
    """Sessions come to it, maybe before it has heard this."""

    instance: InstanceId
    node: NodeName


class Release(Value, frozen=True):
    """No gateway can reach the ended instance any more: its address may be used again."""

    app: AppName
    instance: InstanceId
    node: NodeName


class Tell(Value, frozen=True):
    gateway: str
    message: ToGateway


Instruction = Start | Freeze | Save | Thaw | Stop | Release | Tell
