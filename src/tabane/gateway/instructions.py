"""What an app's home has nodes and gateways do: the instructions of `tabane.gateway.activation`."""

from __future__ import annotations

from tabane.gateway.messages import ToGateway
from tabane.model import App, AppName, InstanceId, NodeName, Value


class Start(Value, frozen=True):
    app: App
    instance: InstanceId
    node: NodeName


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
    of `Freeze`, nobody uses it meanwhile; sessions that come after all wait for the dump's end."""

    instance: InstanceId
    node: NodeName
    number: int


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
