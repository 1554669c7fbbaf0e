"""What a node's processes say to each other over middlecon, beside the gateways' grants.

Every message is a tagged value; requests and their answers stand in pairs.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tabane import errors
from tabane.gateway.activation import (
    InstanceAwake,
    InstanceEnded,
    LowerAsked,
    StillStarting,
    StopAsked,
)
from tabane.gateway.events import NOTHING_SAVED, SavedThere
from tabane.gateway.limits import HttpCounters, TcpCounters
from tabane.gateway.messages import ToGateway, ToHome
from tabane.gateway.uses import InUse
from tabane.model import (
    App,
    AppName,
    Generation,
    Instance,
    InstanceId,
    NodeName,
    Reactive,
    Trust,
    Value,
    WakeRecord,
)
from tabane.node.config import KeptNode
from tabane.node.k2i_messages import K2iMessage
from tabane.store.api import Change, Entry

NODES = "nodes"
"""The room of all agents."""


class StartInstance(Value, frozen=True, tag="start"):
    """Home to agent: run one. Answered at once; how it went comes as `Started` or `Ended`.
    `resume`: it is put away there, and goes on; nothing else begins in its place."""

    app: App
    instance: InstanceId
    resume: bool = False


class FreezeInstance(Value, frozen=True, tag="freeze"):
    """Home to agent: nobody holds slots of it. `number`: of this order, for `Awake`. `save`: it is
    not to be frozen, but saved, as its agent wants; `ends`: and ended, to go on from there.
    `reason`: of a freeze that is not for idleness alone."""

    instance: InstanceId
    number: int
    save: bool = False
    reason: str = ""
    ends: bool = False


class ThawInstance(Value, frozen=True, tag="thaw"):
    """Home to agent: sessions come to it now. A repeat does nothing."""

    instance: InstanceId


class StopInstance(Value, frozen=True, tag="stop"):
    instance: InstanceId
    reason: str


class ReleaseInstance(Value, frozen=True, tag="release"):
    instance: InstanceId


class Started(Value, frozen=True, tag="started"):
    """Agent to home: an instance is ready."""

    instance: Instance
    phases_us: dict[str, int]
    total_us: int
    option: str = "cold"
    note: str = ""


class Ended(Value, frozen=True, tag="ended"):
    event: InstanceEnded


class Awake(Value, frozen=True, tag="awake"):
    """Agent to home: an instance is not frozen, or no more, though it was to be."""

    event: InstanceAwake


class Slow(Value, frozen=True, tag="slow"):
    """Agent to home, every second: a start is not done yet."""

    event: StillStarting


class Asked(Value, frozen=True, tag="asked"):
    """Agent to home: a person wants this."""

    event: StopAsked


class Lower(Value, frozen=True, tag="lower"):
    """Agent to home: short of memory, it wants an instance lower on the ladder. A repeat gives the
    home more time."""

    event: LowerAsked


class AskUses(Value, frozen=True, tag="ask_uses"):
    """Agent to the gateways of its data center: what of this node do you hold slots of?"""

    node: NodeName


class Uses(Value, frozen=True, tag="uses"):
    """Gateway to agent, the answer."""

    instances: tuple[InUse, ...]


class Hello(Value, frozen=True, tag="hello"):
    """Gateway to its agent: send me routes, local instances, and changes of both."""


class Routes(Value, frozen=True, tag="routes"):
    """Agent to gateway: apps to route to (what `gateway.routes.routed` leaves of them), and apps
    that are gone. After `Hello` all apps come, in several messages of which the last is `complete`;
    what was in none of them is gone too. `revision`: of the store, as the agent has it; 0 says
    nothing."""

    apps: tuple[App, ...]
    gone: tuple[AppName, ...] = ()
    complete: bool = False
    revision: int = 0


class LocalInstance(Value, frozen=True):
    generation: Generation
    app: AppName
    address: str
    trust: Trust | None = None


class LocalInstances(Value, frozen=True, tag="instances"):
    """Agent to gateway: the ready instances of this node, or (not `complete`) more of them; and the
    `dead`, which ended with their network stacks, so that no FIN or RST tells of it."""

    instances: tuple[LocalInstance, ...]
    complete: bool
    dead: tuple[Generation, ...] = ()


class TcpPorts(Value, frozen=True, tag="tcp_ports"):
    """Agent to gateway: the TCP ports of apps that the holder listens on, all of them."""

    ports: tuple[int, ...]


class Woke(Value, frozen=True, tag="woke"):
    record: WakeRecord


class Happened(Value, frozen=True, tag="happened"):
    """Agent to all agents: a `Transition`, as JSON, for those who follow events."""

    transition: bytes


class KeepNode(Value, frozen=True, tag="keep_node"):
    """To the control node's agent: begin this node's term again."""

    node: KeptNode


class AskInstances(Value, frozen=True, tag="ask_instances"):
    """To all agents: your instances. Answered with `Instances`."""


class Instances(Value, frozen=True, tag="instances_are"):
    instances: tuple[Instance, ...]
    at: float = 0.0
    """When it says so, by the clock that the instances' times are of."""
    saved: SavedThere = NOTHING_SAVED


class AskKnown(Value, frozen=True, tag="ask_known"):
    """To all agents: answer when your replica has this revision, and your gateways know it."""

    revision: int


class AskCounted(Value, frozen=True, tag="ask_counted"):
    """To a gateway: what have you counted? Answered with `Counted`."""


class Counted(Value, frozen=True, tag="counted"):
    """`http`: by whom it served, `clients` or other `gateways`."""

    http: dict[str, HttpCounters]
    tcp: TcpCounters


class AskRecords(Value, frozen=True, tag="ask_records"):
    """To all agents: your latest `events` or `wakes`, as JSON lines."""

    kind: str
    limit: int


class AskApp(Value, frozen=True, tag="ask_app"):
    """To all agents: what you know of this app as its home. Answered with a JSON array: one object
    for the app, or for each of its cohorts, that this agent is home of."""

    app: AppName


class AskImages(Value, frozen=True, tag="ask_images"):
    """To all agents: the images you have. Answered with `OwnImages`, as JSON."""


class RemoveImage(Value, frozen=True, tag="remove_image"):
    """To agents: remove this image, unless something uses it. Answered with `Removed`; a
    repeat removes nothing."""

    digest: str


class CollectImages(Value, frozen=True, tag="collect_images"):
    """To agents: remove the images that nothing uses, or (`dry`) say which. Answered with
    `Removed`."""

    dry: bool = False


class AskCheckpoints(Value, frozen=True, tag="ask_checkpoints"):
    """To all agents: the checkpoints you have. Answered with `OwnCheckpoints`, as JSON."""


class RemoveCheckpoint(Value, frozen=True, tag="remove_checkpoint"):
    """To agents: remove this checkpoint, unless it is open. Answered with `Removed`; a repeat
    removes nothing."""

    digest: str


class CollectCheckpoints(Value, frozen=True, tag="collect_checkpoints"):
    """To agents: remove the checkpoints that no app would use, or (`dry`) say which. Answered with
    `Removed`."""

    dry: bool = False


class Removed(Value, frozen=True, tag="removed"):
    """Images or checkpoints that were removed from a node, or would be."""

    digests: tuple[str, ...] = ()
    bytes: int = 0


class AskVolumes(Value, frozen=True, tag="ask_volumes"):
    """To all agents: the volumes you have. Answered with a JSON array of `VolumeView`."""


class DropVolume(Value, frozen=True, tag="drop_volume"):
    """To the agent that has it: remove this volume for good, unless the app uses it. Answered with
    `VolumesLeft`."""

    app: AppName
    name: str


class VolumesLeft(Value, frozen=True, tag="volumes_left"):
    """Those of the app that the node still has, by name."""

    names: tuple[str, ...]


class ForgetVolumes(Value, frozen=True, tag="forget_volumes"):
    """To the control agent: no node has volumes of this app any more, or they are given up; next
    time a node is picked anew. Answered with `Committed`."""

    app: AppName


class Committed(Value, frozen=True, tag="committed"):
    revision: int


class StoreFollow(Value, frozen=True, tag="store_follow"):
    """Agent to control agent: send me what came after this revision, from now on."""

    after: int


class StorePage(Value, frozen=True, tag="store_page"):
    """Control agent to agent: a part of a snapshot."""

    revision: int
    entries: tuple[Entry, ...]
    first: bool
    last: bool


class StoreChanges(Value, frozen=True, tag="store_changes"):
    """Control agent to agent: one commit."""

    changes: tuple[Change, ...]


class DeployApp(Value, frozen=True, tag="deploy"):
    """To the control agent: store this app as a new revision, unless it is as it was (and not
    `force`). Answered with `Deployed`."""

    app: App
    force: bool = False


class Deployed(Value, frozen=True, tag="deployed"):
    """`revision` of the store, to wait for on the nodes; `app` as it was stored. `unscaled`: what
    `tabane scale` had made of it, when a deploy undid that."""

    app: App
    revision: int
    changed: bool = True
    unscaled: Reactive | None = None


class DeployApps(Value, frozen=True, tag="deploy_apps"):
    """The same for several, in one commit, or none of them. Answered with `DeployedApps`."""

    apps: tuple[App, ...]
    force: bool = False


class DeployedApps(Value, frozen=True, tag="deployed_apps"):
    """In the order in which they were asked for."""

    apps: tuple[Deployed, ...]


class RemoveApp(Value, frozen=True, tag="remove"):
    """To the control agent. Answered with `Deployed`, of the app as it was."""

    app: AppName


class RemoveApps(Value, frozen=True, tag="remove_apps"):
    """The same for several, in one commit, or none of them. Answered with `DeployedApps`."""

    apps: tuple[AppName, ...]


class ScaleApp(Value, frozen=True, tag="scale"):
    """To the control agent: change `min` and `max`, no new revision. Answered with `Deployed`."""

    app: AppName
    min: int | None = None
    max: int | None = None


class Used(Value, frozen=True, tag="used"):
    """Gateway to the agent of an instance: so many of its sessions are in it now. Of apps whose
    resources follow sessions only."""

    instance: InstanceId
    sessions: int


class FireTrigger(Value, frozen=True, tag="fire"):
    """Control node to agent: make the request of a trigger's moment. A repeat makes it again."""

    app: AppName
    trigger: str
    moment: float


class Fired(Value, frozen=True, tag="fired"):
    """What became of it."""

    outcome: str


class Failure(Value, frozen=True, tag="failure"):
    """An answer that is an error: class name in `tabane.errors`, its text and data."""

    kind: str
    message: str
    retry_after_s: float = 0.0


Message = (
    ToHome
    | ToGateway
    | StartInstance
    | FreezeInstance
    | ThawInstance
    | StopInstance
    | ReleaseInstance
    | Started
    | Ended
    | Awake
    | Slow
    | Asked
    | Lower
    | AskUses
    | Uses
    | Hello
    | Routes
    | LocalInstances
    | TcpPorts
    | Woke
    | Happened
    | KeepNode
    | AskInstances
    | Instances
    | AskKnown
    | K2iMessage
    | AskCounted
    | Counted
    | AskRecords
    | AskApp
    | AskImages
    | RemoveImage
    | CollectImages
    | AskCheckpoints
    | RemoveCheckpoint
    | CollectCheckpoints
    | Removed
    | AskVolumes
    | DropVolume
    | VolumesLeft
    | ForgetVolumes
    | Committed
    | StoreFollow
    | StorePage
    | StoreChanges
    | DeployApp
    | DeployApps
    | Deployed
    | DeployedApps
    | RemoveApp
    | RemoveApps
    | ScaleApp
    | Used
    | FireTrigger
    | Fired
    | Failure
)

FromExecutor = Started | Ended | Awake | Slow
"""What an executor tells the home of an instance."""

encode = msgspec.msgpack.Encoder().encode
parse: Any = msgspec.msgpack.Decoder(Message).decode


def to_failure(error: errors.TabaneError) -> Failure:
    """An error as an answer."""
    retry_after_s = error.retry_after_s if isinstance(error, errors.Unavailable) else 0.0
    return Failure(type(error).__name__, error.message, retry_after_s)


def to_error(failure: Failure) -> errors.TabaneError:
    """The error that an answer stands for."""
    kind: type[errors.TabaneError] = getattr(errors, failure.kind, errors.Refused)
    error = errors.Refused(failure.message) if kind is errors.SpecError else kind(failure.message)
    if isinstance(error, errors.Unavailable):
        error.retry_after_s = failure.retry_after_s
    return error
