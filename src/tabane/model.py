"""The values all parts talk about. Frozen, comparable, and ready for the wire (msgspec).

Units are in the names: `_s` seconds, `_us` microseconds, `_bytes` bytes. Sizes people write
(`"64MiB"`) and durations (`"30s"`) are parsed at the edge, in `tabane.spec`.
"""

from __future__ import annotations

import uuid
from enum import StrEnum
from typing import Any, NewType

import msgspec

from tabane.reactions import Health, Hooks, Trigger

AppName = NewType("AppName", str)
"""`namespace/name`."""
InstanceId = NewType("InstanceId", str)
NodeName = NewType("NodeName", str)
"""`datacenter/node`, for example `tokyo/tokyo-1`."""


class Class(StrEnum):
    """How strongly an instance is isolated, from weakest to strongest. An app's may be `auto`: then
    it is chosen for each start, by how far the callers are trusted that the instance is for."""

    CONTAINER = "container"
    SANDBOX = "sandbox"
    UNIKERNEL = "unikernel"
    MICROVM = "microvm"
    VM = "vm"
    AUTO = "auto"


class Trust(StrEnum):
    """How far the caller of a session is trusted."""

    ANONYMOUS = "anonymous"
    TRUSTED = "trusted"


class State(StrEnum):
    """Where an instance is in its life; what may follow what stands in `tabane.lifecycle`."""

    ABSENT = "absent"
    PREPARING = "preparing"
    STARTING = "starting"
    READY = "ready"
    FREEZING = "freezing"
    FROZEN = "frozen"
    CHECKPOINTING = "checkpointing"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Value(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of all values here."""


class Resources(Value, frozen=True, omit_defaults=True):
    """Hard limits of one instance. `disk_bytes` bounds what it may write to its own layer."""

    cpu: float = 1.0
    memory_bytes: int = 256 << 20
    pids: int = 256
    disk_bytes: int = 256 << 20
    cpu_min: float | None = None
    """What it has of `cpu` without sessions; None: all of it, always."""
    memory_min_bytes: int | None = None
    """The same of memory, of which what is above is had back, where that can be done."""

    @property
    def follow(self) -> bool:
        """Whether they rise and fall with its sessions."""
        return self.cpu_min is not None or self.memory_min_bytes is not None

    def with_layer(self) -> Resources:
        """As the kernel counts memory where the own layer is in memory, too: both together."""
        return msgspec.structs.replace(self, memory_bytes=self.memory_bytes + self.disk_bytes)


class Reactive(Value, frozen=True, omit_defaults=True):
    """When instances come and go."""

    concurrency: int = 10
    min: int = 0
    max: int = 10
    stop_after_s: float = 30.0
    max_age_s: float | None = None
    ready: str = "listen"
    """`listen`, `started`, `health`, or `http:/path`."""
    start_timeout_s: float = 10.0
    response_timeout_s: float = 60.0
    stop_timeout_s: float = 10.0
    queue: int = 1000
    wake_budget_s: float | None = None
    """What a cold start may take where the class is chosen (`auto`); None: whatever it takes."""
    freeze_after_s: float | None = None
    """Without a session for so long an instance is frozen (`checkpoint_after_s`: put away, saved as
    it is and ended), where its engine can; None: never. They, and `stop_after_s`, grow in order."""
    checkpoint_after_s: float | None = None
    checkpoint: bool = False
    """After its first `ready` an instance is saved, and others begin as its copies."""
    reclaim: bool = False
    """What the kernel can have back of a frozen instance's memory, it gets at once."""
    drain_timeout_s: float = 30.0
    """What sessions of an instance that is to go have to end by themselves."""


class NetworkPolicy(Value, frozen=True, omit_defaults=True):
    egress: bool = True


class Placement(Value, frozen=True, omit_defaults=True):
    datacenters: tuple[str, ...] = ("*",)

    def allows(self, datacenter: str) -> bool:
        return "*" in self.datacenters or datacenter in self.datacenters


class SecurityPolicy(Value, frozen=True, omit_defaults=True):
    capabilities: tuple[str, ...] = ()
    """Added to the small default set, as `CAP_NET_RAW`."""


class Services(Value, frozen=True, omit_defaults=True):
    """What of its node an app's instances may use, besides the network."""

    middlecon: tuple[str, ...] = ()
    """Rooms, by name; a `*` at the end of one stands for any end."""
    k2i: bool = False
    """What of the app runs on the node, to be read."""
    lease: bool = False
    """A socket by which its programs say that they are at work: see `tabane.node.activity`."""

    @property
    def needs_directory(self) -> bool:
        """Whether its instances are shown a directory with sockets."""
        return bool(self.middlecon) or self.k2i or self.lease


class TcpPort(Value, frozen=True, omit_defaults=True):
    """A public TCP port, the same at every gateway; a connection to it is a session of the app."""

    port: int
    target: int
    """Where the program listens for it."""
    session_idle_s: float | None = None
    """A session is closed after so long without a byte either way; None: never."""
    proxy_protocol: str = ""
    """`v1` or `v2`: how the program is told who connects, before all else; empty: it is not."""


class Volume(Value, frozen=True, omit_defaults=True):
    """Durable storage of an app, on one node; it outlives instances, revisions and the app."""

    name: str
    path: str
    """Where instances see it."""
    size_bytes: int = 1 << 30


class Container(Value, frozen=True, omit_defaults=True):
    """A program beside the main one of an app (a sidecar), in each of its instances: they share
    network, limits and life (docs/pods.md). `image` as the app's."""

    name: str
    image: str = ""
    source: str = ""
    """What the author wrote; empty: the image is the app's own."""
    command: tuple[str, ...] = ()
    env: dict[str, str] = {}
    workdir: str = ""
    volumes: tuple[str, ...] = ()
    """Names of the app's volumes that it sees, too."""


class Collect(Value, frozen=True, omit_defaults=True):
    """Facts to be collected, as an app file or a node's file asks for it (see
    `tabane.k2i.collectors`). `name` is the kind unless told."""

    kind: str
    name: str = ""
    url: str = ""
    command: tuple[str, ...] = ()
    interval_s: float = 10.0
    deadline_s: float = 2.0
    username: str = ""
    password_file: str = ""
    settings: dict[str, Any] = {}
    """Of a kind that is not one of ours: what its maker wants."""


class App(Value, frozen=True, omit_defaults=True):
    """One revision of a declared program.

    `image` is fixed at deploy: `sha256:...` of an image manifest in the nodes' image stores, or
    `host` (the node's own /usr, read-only). `source` is what the author wrote.
    """

    name: str
    image: str
    namespace: str = "default"
    revision: int = 0
    source: str = ""
    command: tuple[str, ...] = ()
    env: dict[str, str] = {}
    workdir: str = ""
    isolation: Class = Class.CONTAINER
    driver: str = ""
    allow_emulation: bool = False
    """It may run where its class's engine has to emulate a processor."""
    image_kind: str = "linux"
    """`linux`, `wasm` or `solo5`: known when its image is, at deploy."""
    port: int | None = None
    hosts: tuple[str, ...] = ()
    protocol: str = "http"
    """What it speaks at its port: `http` (HTTP/1.1), or `h2c` (HTTP/2 from the first byte)."""
    tcp: tuple[TcpPort, ...] = ()
    """Beside its `port`, or without one."""
    resources: Resources = Resources()
    reactive: Reactive = Reactive()
    network: NetworkPolicy = NetworkPolicy()
    placement: Placement = Placement()
    security: SecurityPolicy = SecurityPolicy()
    services: Services = Services()
    health: Health = Health()
    hooks: Hooks = Hooks()
    triggers: tuple[Trigger, ...] = ()
    collect: tuple[Collect, ...] = ()
    volumes: tuple[Volume, ...] = ()
    containers: tuple[Container, ...] = ()
    """Beside its main program, in the order of their start."""
    pinned_to: NodeName = NodeName("")
    """The node that has its volumes, which alone can run it; given at the first deploy of them."""
    id_base: int = 0
    """First host uid and gid of the app's own 65,536; given once, kept by all revisions."""
    trusted_id_base: int = 0
    """The same for its instances for trusted callers, once it was of class `auto`; 0: it was not,
    or an older version deployed it."""
    owner: int = 0
    """uid of who deployed it."""
    deployed_at: float = 0.0
    declared: Reactive | None = None
    """`reactive` as its file says, when it was scaled since; None when it was not."""
    trust: Trust | None = None
    """Of a *cohort*: the callers that these of its instances are for, and no others."""

    @property
    def key(self) -> AppName:
        return AppName(f"{self.namespace}/{self.name}")

    @property
    def cohort(self) -> AppName:
        """What sessions share instances: the app, or one cohort of it."""
        return name_cohort(self.key, self.trust)

    @property
    def takes_sessions(self) -> bool:
        return bool(self.listens)

    @property
    def listens(self) -> tuple[int, ...]:
        """The ports at which its program takes sessions, each once."""
        ports = (*((self.port,) if self.port is not None else ()), *(t.target for t in self.tcp))
        return tuple(dict.fromkeys(ports))

    def allows(self, datacenter: str) -> bool:
        """Whether it may run there."""
        has_volumes = not self.pinned_to or self.pinned_to.startswith(f"{datacenter}/")
        return has_volumes and self.placement.allows(datacenter)

    def needs(self) -> tuple[str, ...]:
        """What of a driver's capabilities it cannot do without."""
        needed = {
            "volumes": self.volumes,
            "services": self.services.needs_directory,
            "pods": self.containers,
            "exec": self.health.command,
            "limit": self.resources.follow,
        }
        return tuple(name for name, wanted in needed.items() if wanted)

    def images(self) -> tuple[tuple[str, str], ...]:
        """Of its main program and of those beside it, in order: `image` and `source`."""
        sidecars = ((each.image, each.source or self.source) for each in self.containers)
        return ((self.image, self.source), *sidecars)

    def beside(self, container: Container) -> App:
        """A container of its pod as an app for itself, as drivers run it."""
        return msgspec.structs.replace(
            self,
            name=f"{self.name}.{container.name}",
            image=container.image,
            source=container.source or self.source,
            image_kind="linux",
            command=container.command,
            env=container.env,
            workdir=container.workdir,
            volumes=tuple(each for each in self.volumes if each.name in container.volumes),
            containers=(),
            health=Health(),
            hooks=Hooks(),
            triggers=(),
            port=None,
            tcp=(),
            hosts=(),
        )

    def cohorts(self) -> tuple[App, ...]:
        """All there are of it: of class `auto` one for each trust, with ids of its own, else the
        app itself."""
        if self.isolation is not Class.AUTO:
            return (self,)
        trusted = self.trusted_id_base or self.id_base
        bases = {Trust.ANONYMOUS: self.id_base, Trust.TRUSTED: trusted}
        return tuple(
            msgspec.structs.replace(self, trust=trust, id_base=base)
            for trust, base in bases.items()
        )

    @property
    def id_bases(self) -> tuple[int, ...]:
        """Of all its ranges of ids."""
        return tuple(base for base in (self.id_base, self.trusted_id_base) if base)

    @property
    def kind(self) -> str:
        """Of its image: `image_kind`, or `host`."""
        return "host" if self.image == "host" else self.image_kind


class Node(Value, frozen=True, omit_defaults=True):
    """A host OS as the cluster knows it. `address` is where its peers reach it."""

    name: str
    """Without the data center, for example `tokyo-1`."""
    datacenter: str
    address: str
    incarnation: str = ""

    @property
    def key(self) -> NodeName:
        return NodeName(f"{self.datacenter}/{self.name}")


class Generation(Value, frozen=True):
    """Which life of which instance a command or a forward means.

    Issued and persisted by the node that runs the instance. `counter` grows whenever what was
    known of the instance before must no longer reach it (after a thaw, a restore, a move).
    """

    incarnation: str
    instance: InstanceId
    counter: int

    def __str__(self) -> str:
        return f"{self.incarnation}/{self.instance}/{self.counter}"


class Instance(Value, frozen=True, omit_defaults=True):
    """One running copy of an app, as its node reports it."""

    id: InstanceId
    app: AppName
    revision: int
    node: NodeName
    generation: Generation
    state: State
    isolation: Class = Class.CONTAINER
    driver: str = ""
    address: str = ""
    """In the node's instance network; only that node's gateway can connect to it."""
    pid: int = 0
    """Of its first process, in the node's pid namespace; 0 while there is none."""
    cgroup: str = ""
    kernel: str = ""
    """Id of the kernel it shares (the machine's boot id for containers)."""
    created_at: float = 0.0
    ready_at: float = 0.0
    reason: str = ""
    """Why it is in its state, when that needs saying; the exit reason at the end."""
    trust: Trust | None = None
    """Of the callers that it is for, where that chose its class."""
    freezable: bool = False
    puttable: bool = False
    savable: bool = False
    """Its engine can freeze it; it may be put away; its node wants a checkpoint of it."""
    freezes: int = 0
    """The number of its home's latest order to freeze it, to save it or to put it away."""
    leases: int = 0
    """By which its programs keep it from being idle: told to those who ask what runs."""
    paused: bool = False
    """It stands still by somebody's order, whatever its state: told to those who ask what runs."""

    @property
    def cohort(self) -> AppName:
        return name_cohort(self.app, self.trust)


class GuestProcess(Value, frozen=True, omit_defaults=True):
    """A process that the node's kernel does not know, as who runs it tells: a sandbox's kernel in
    user space, the agent in a virtual machine, a WebAssembly host. Its numbers, users and clock are
    those of in there."""

    inside: str
    """`sandbox`, `guest` or `wasm`."""
    pid: int
    name: str
    ppid: int = 0
    command: str = ""
    uid: int = 0
    gid: int = 0
    user: str = ""
    group: str = ""
    state: str = "?"
    tty: str = "?"
    threads: int = 1
    nice: int = 0
    cpu_s: float = 0.0
    vsz_kib: int = 0
    rss_kib: int = 0
    elapsed_s: float = 0.0
    start_ticks: int = 0
    """0: not known."""
    container: str = ""
    """Of an instance with several: which one it is in (`main`, or a sidecar's name)."""


class ExitStatus(Value, frozen=True, omit_defaults=True):
    """How a process ended: `code` 0-255, or `signal` when a signal ended it."""

    code: int = 0
    signal: int = 0
    oom: bool = False
    container: str = ""
    """Of an instance with several: the one beside the main program that has ended."""
    reason: str = ""
    """In words, where something else than its program was the cause."""

    def describe(self) -> str:
        """For people: `exited with code 3`, `killed by SIGKILL (out of memory)`."""
        import signal as signals

        if not self.signal:
            return f"exited with code {self.code}"
        try:
            name = signals.Signals(self.signal).name
        except ValueError:
            name = f"signal {self.signal}"
        return f"killed by {name}" + (" (out of memory)" if self.oom else "")


PHASES = ("queue", "decide", "network", "filesystem", "open", "engine", "boot", "ready",
          "first_byte")  # fmt: skip
"""What a wake's time goes to, in order, each measured; the rest of `total_us` is unexplained."""


class WakeRecord(Value, frozen=True, omit_defaults=True):
    """What one wake cost and why: one for each session that found no free slot. When nothing comes
    of it (`failed`), its other sessions have no records of their own, and where no instance was
    ready, `instance` and `node` are empty."""

    app: AppName
    revision: int
    instance: InstanceId
    node: NodeName
    gateway: str
    option: str
    """`cold`, or `restore` of a checkpoint, or `resume` of one that was put away, or `thaw` of one
    that was frozen, or `wait` when a slot of a running instance came free first, or `failed`."""
    at: float
    phases_us: dict[str, int]
    total_us: int
    outcome: str = "ok"
    """`ok`, or the reason the session got no answer."""
    trust: Trust | None = None
    """Of the caller, where that chose the class."""
    note: str = ""
    """Why it was not another option: what became of the restore, of one that began cold instead."""


def name_cohort(app: AppName, trust: Trust | None) -> AppName:
    """`namespace/name`, or `namespace/name@trust`."""
    return AppName(f"{app}@{trust}") if trust is not None else app


def app_of_cohort(cohort: AppName) -> tuple[AppName, Trust | None]:
    """The way back from `name_cohort`."""
    app, _, trust = cohort.partition("@")
    return AppName(app), Trust(trust) if trust else None


def new_instance_id() -> InstanceId:
    """A fresh id, free of place: 12 hex digits."""
    return InstanceId(uuid.uuid4().hex[:12])
