"""What a driver is: a dozen verbs, honest `Capabilities`, and a table of enforced defaults.

A driver turns an `InstanceSpec` into a running instance with one engine. It keeps no table of its
own: all it must remember is in the `Handle` it returns, which the node agent persists and gives
back to `recover()` after a restart. Engines are started through a `Spawner` (in a node: the
holder), so that they, their logs and exit statuses outlive the agent.

Every verb is idempotent where it can be: `stop`, `destroy` and `thaw` of what is stopped, gone or
running do nothing. A verb a driver cannot do raises `Unsupported` with the reason and is not in its
capabilities; `tabane.testing.check_driver` holds every driver, the fake included, to this.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from tabane.model import App, Class, ExitStatus, GuestProcess, InstanceId, Resources, Value

SERVICES = "/run/tabane"
HUB_SOCKET = "hub.sock"
"""There: of the node's hub."""
HUB_VARIABLE = "TABANE_HUB"
"""Its URL, in the program's environment."""
K2I_SOCKET = "k2i.sock"
"""There: of the node's k2i, read-only."""
K2I_VARIABLE = "TABANE_K2I"
"""Its URL, in the program's environment."""
LEASE_SOCKET = "lease.sock"
"""There: for activity leases."""
LEASE_VARIABLE = "TABANE_LEASE"
"""Its URL, in the program's environment."""
EPOCH = "epoch"
"""There, after a restore: a random UUID, another one for each that was restored. What begins as a
copy of others can tell by it that it is a new one."""


class Capabilities(Value, frozen=True):
    """What a driver can do here. Callers ask these, never a driver's name."""

    freeze: bool = False
    checkpoint: bool = False
    restore: bool = False
    saves_kernel_state: bool = False
    """Its checkpoints have state of the node's kernel, and need the same release."""
    saves_processor_state: bool = False
    """They have what programs saw of the processor, and need one that is no less."""
    maps_checkpoints: bool = False
    """What it restores has files of the checkpoint in use for as long as it runs."""
    live_migration: bool = False
    exec: bool = False
    terminal: bool = False
    """`exec` with a terminal inside (`Execution.terminal`)."""
    copy: bool = False
    stats: bool = False
    guest_processes: bool = False
    """Tells the processes that the node's own table cannot have: `Driver.guest_processes`."""
    network: bool = False
    services: bool = False
    """Shows a directory of the node, with sockets, to the instance (`InstanceSpec.services`)."""
    volumes: bool = False
    """Shows durable storage to the instance (`InstanceSpec.volumes`)."""
    pods: bool = False
    """Runs other programs beside the main one (`InstanceSpec.sidecars`)."""
    layer_in_memory: bool = False
    """What is written to the own layer takes the node's memory (`Resources.with_layer`)."""
    own_stack: bool = False
    """Its sockets are not the node's kernel's, so that the link's socket table does not show them:
    `Driver.wait_listening` does."""
    limit: bool = False
    """Changes limits while it runs: `Driver.limit`."""
    images: tuple[str, ...] = ("linux",)
    """The kinds of images that it runs (`App.kind`): `linux`, `host`, `wasm`, `solo5`."""
    refuses: dict[str, str] = msgspec.field(default_factory=dict)
    """What of an app's file it can never give (see `tabane.runtimes.wishes`), and why."""
    preparation: str = "its file system is being prepared"
    """What `Driver.prepare` does that may take long, as a sentence's end."""
    needs_root: bool = False
    needs_kvm: bool = False
    works_emulated: bool = False


class Probe(Value, frozen=True):
    """Whether a driver works on this machine. `reason` says what is missing, or the version."""

    works: bool
    reason: str
    emulated: bool = False
    """It works, but has to emulate a processor: an app or the node's operator must allow that."""
    detail: str = ""
    """What else was found out, for those who ask."""
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    """Of the engines that make its checkpoints, by name: none is restored where one is older."""
    pending: bool = False
    """More is to be tried, which can wait: ask again when there is time."""


DEFAULTS = {
    "no_new_privileges": "nothing that is executed has more rights than what executes it",
    "capabilities": "ten at most, which count inside only, and those that the app declares",
    "seccomp": "a list of the system calls of the node's kernel that are left",
    "user_namespace": "ids of the app's own: root inside is nobody on the node",
    "low_ports": "any user inside may listen at any port",
    "read_only_image": "what is changed is seen by the instance alone, and gone with it",
    "disk_quota": "what it writes has a bound",
    "pids": "what it starts has a bound",
    "memory": "what it uses of the node's memory has a bound",
    "cpu": "what it uses of the node's processors has a bound",
    "egress": "it reaches nothing outside, unless its app may",
    "dns": "the node answers its questions for names; others do only where egress lets it ask",
    "node_services": "it reaches none of the node's own ports and sockets",
    "engine": "what runs beside the program to run it is confined, too",
}
"""What protects from every instance unless its app says otherwise: name -> meaning. Each driver's
`enforcements` has each of them once, in this order."""


class Enforcement(Value, frozen=True):
    """How a driver enforces one of `DEFAULTS`; where it does not, `how` says why."""

    default: str
    enforced: bool
    how: str


class Link(Value, frozen=True):
    """The instance's end of the network, made ahead and claimed for it.

    `parked_pid` is a process that sits in the instance's user and network namespaces for the
    instance's life (what Kubernetes calls the pause process), so both can be named as
    `/proc/PID/ns/...` and the socket table read at `/proc/PID/net/tcp`.
    """

    slot: int
    address: str
    """IPv4 address inside, without prefix length."""
    gateway: str
    """The node's address in the instance network: default route and resolver."""
    parked_pid: int
    parked_start_ticks: int
    """Start time of the parked process, so that a reused pid is never taken for it."""

    @property
    def user_namespace(self) -> str:
        return f"/proc/{self.parked_pid}/ns/user"

    @property
    def network_namespace(self) -> str:
        return f"/proc/{self.parked_pid}/ns/net"


class Image(Value, frozen=True):
    """A prepared image on this node: an unpacked tree and what its config says.

    `tree` is owned by ids 0..65535 as in the image; the driver maps it, nobody chowns it. For the
    image `host` it is a skeleton, and `host_usr` is true: the node's /usr goes into it read-only.
    """

    digest: str
    tree: Path
    kind: str = "linux"
    """`linux`; `wasm`: `tree` has a WebAssembly module or component, which `entrypoint` begins
    with; `solo5`: a solo5 unikernel, likewise."""
    host_usr: bool = False
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    """`NAME=value`."""
    user: str = ""
    """As in OCI: `uid`, `uid:gid`, `name`, `name:group`."""
    workdir: str = ""
    stop_signal: str = ""


class Storage(Value, frozen=True):
    """A volume for one instance, which alone uses it: `file` has an ext4 file system, of which the
    directory `tabane.runtimes.volumes.DATA` is what it sees at `path`, owned as inside."""

    name: str
    path: str
    file: Path


class Sidecar(Value, frozen=True):
    """A container beside the main one, as an app for itself (`App.beside`), and its image."""

    name: str
    app: App
    image: Image


class Pod(Value, frozen=True):
    """What one of several containers of an instance must know of the others (see `pods`)."""

    id: InstanceId
    """The instance's, which its main container has for itself."""
    leader: InstanceId
    """The container that starts first, and ends last."""
    directory: Path
    """The instance's: with the volumes, and a file system for all writable layers."""
    cgroup: str
    """The instance's, which has the limits; each container's is below."""
    layer: Path
    """Where the container's own layer is made."""
    count: int
    """Of its containers."""


class InstanceSpec(Value, frozen=True):
    """All a driver needs to start one instance."""

    id: InstanceId
    app: App
    image: Image
    link: Link | None
    directory: Path
    """The instance's own directory, made by the caller, removed after `destroy`."""
    log: Path
    """Where its output goes (written and rotated by the spawner)."""
    cgroup: str
    """Path of its cgroup below each hierarchy's root, as `/tabane/CLUSTER/NODE/INSTANCE`."""
    hostname: str = ""
    volumes: tuple[Storage, ...] = ()
    services: Path | None = None
    """Directory with the sockets of what its app asks for: the instance sees it read-only at
    `SERVICES`. None: it asks for nothing."""
    sidecars: tuple[Sidecar, ...] = ()
    """In the order of their start."""
    pod: Pod | None = None
    """It is one container of an instance that has several."""

    @property
    def layer(self) -> Path:
        """Of what is written to its own file system."""
        return self.pod.layer if self.pod is not None else self.directory / "layer"


class Handle(Value, frozen=True):
    """A driver's memory of one instance. `version` is of the layout of `data`."""

    driver: str
    version: int
    id: InstanceId
    data: dict[str, str | int | float | bool | list[str]]


class Stats(Value, frozen=True):
    cpu_us: int
    memory_bytes: int
    pids: int
    oom_kills: int = 0


class User(Value, frozen=True):
    """Numeric ids inside the container."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class TerminalSize(Value, frozen=True):
    """In cells; each from 1 to 65,535."""

    rows: int
    columns: int


class Execution(Value, frozen=True):
    """A command inside, as the main process in all that is not said here: user, groups, working
    directory, environment, confinement."""

    argv: tuple[str, ...]
    user: User | None = None
    workdir: str = ""
    env: tuple[str, ...] = ()
    """`NAME=value`, over the main process's."""
    stdin: bool = False
    """Whether it is given any; else it reads nothing."""
    terminal: TerminalSize | None = None
    """Its controlling terminal, of this size, which all three of its streams are then."""
    container: str = ""
    """Of an instance with several: in which it runs; empty: in the main one."""


class Transfer(Value, frozen=True):
    """Files in or out, as a tar stream whose entries begin with the name of what is copied.

    Paths are absolute, and mean what they mean inside: links lead nowhere else. The files are read
    or made as `user`, else as the main process's.
    """

    path: str
    inward: bool
    as_named: bool = False
    """Inward: what is copied gets the name that `path` ends with, unless a directory is there."""
    user: User | None = None
    container: str = ""
    """As of `Execution`."""


class Output(Protocol):
    """One stream of what a `Conversation`'s other side writes."""

    async def read(self) -> bytes:
        """Wait for some; empty once it has ended. What is not asked for is not taken, so that its
        writer is held up. One reader at a time."""


class Conversation(Protocol):
    """Something that runs inside, and its streams. `aclose` it, whatever happens."""

    @property
    def stdout(self) -> Output: ...

    @property
    def stderr(self) -> Output | None:
        """None: a terminal's is the same as its stdout."""

    async def write(self, data: bytes) -> None:
        """Give it input; returns once the kernel has it. What nobody will read is dropped."""

    async def end_input(self) -> None:
        """What it was given is all. Of a terminal: the character that means that. Idempotent."""

    async def resize(self, size: TerminalSize) -> None:
        """Without a terminal: nothing."""

    async def signal(self, number: int) -> None:
        """Send a signal to its first process; nothing when it has ended."""

    async def wait(self) -> int:
        """Its exit code, 128 + N when signal N ended it; the outputs end with it. What it left
        behind holds both up while it has them open, where an engine (runc) waits for that."""

    async def aclose(self) -> None:
        """End it if it still runs: its streams close and it is hung up on (HUP), and what of it is
        there after 2 s is killed. Idempotent."""


class Command(Value, frozen=True):
    """An engine process for the spawner to start.

    `pid_file`: the engine writes there the pid of the process it leaves behind (`crun run -d`);
    the spawner then also watches that process, as the instance's. `log`: stdout and stderr go into
    pipes that the spawner owns and writes to this file, as CRI log lines; they stay open for what
    the engine leaves behind. Without a log both are gathered and returned (64 KiB at most).
    """

    key: str
    """Names the command in the spawner's books; one at a time with this key."""
    argv: tuple[str, ...]
    env: dict[str, str] | None = None
    log: Path | None = None
    log_bytes: int = 4 << 20
    log_files: int = 3
    pid_file: Path | None = None


class Finished(Value, frozen=True):
    """How a spawned command ended, with its last words when it had no log."""

    status: ExitStatus
    output: str = ""


class Spawner(Protocol):
    """Starts processes that outlive the caller (see `tabane.node.holder`)."""

    async def spawn(self, command: Command) -> int:
        """Start it and return its pid."""

    async def finished(self, key: str) -> Finished:
        """Wait until the command itself has ended (not what it left behind). Once only."""

    async def exited(self, key: str) -> ExitStatus:
        """Wait until the process of the pid file has ended. Survives restarts of both sides."""

    async def forget(self, key: str) -> None:
        """Drop what is kept of `key` (exit status, log pipes). Unknown keys are fine."""

    async def signal(self, key: str, number: int) -> bool:
        """Signal the process of `key` (of its pid file once there is one); False: it has ended."""


Ready = Callable[[], Awaitable[None]]


class Driver(Protocol):
    """One engine for one class. See the module's text for the rules."""

    name: str
    isolation: Class
    capabilities: Capabilities

    async def probe(self) -> Probe: ...

    def enforcements(self) -> tuple[Enforcement, ...]: ...

    async def prepare(self, spec: InstanceSpec) -> Handle:
        """Make file systems and configuration; start nothing. Raises `Unsupported` when refused;
        then nothing is left."""

    async def start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        """Start it; return once the engine says the program runs (`data["pid"]` is set).

        Raises `EngineError` with the engine's last words. Cancelling it leaves something that
        `destroy` removes.
        """

    async def wait_listening(self, handle: Handle, port: int) -> None:
        """Return when a connection to `port` at the link's address would be taken; never by itself
        otherwise. Where it has a network stack of its own (`Capabilities.own_stack`). May be called
        with the handle of `prepare`, while `start` is going on."""

    async def wait(self, handle: Handle) -> ExitStatus:
        """Wait until the instance's first process has ended; of several containers, until that of
        the first to end has (`ExitStatus.container`)."""

    async def stop(self, handle: Handle, timeout_s: float) -> None:
        """The stop signal, `timeout_s`, then KILL. Returns when it has ended."""

    async def freeze(self, handle: Handle) -> None: ...

    async def thaw(self, handle: Handle) -> None: ...

    async def checkpoint(self, handle: Handle, directory: Path, *, leave_running: bool) -> None:
        """Save what runs, or is frozen, into an empty directory that only root can read. Then it
        goes on as it was, or has ended.

        Raises `Conflict` or `Busy` for what is in the way now, `Unsupported` for what an instance
        like this never can, `EngineError` when it fails; then it goes on as it was, too, and the
        directory is of no use. Connections are not saved. Who is cancelled waits for its end.
        """

    async def restore(self, spec: InstanceSpec, handle: Handle, directory: Path) -> Handle:
        """In place of `start`: have what is prepared go on from where a checkpoint was, once or
        often, with the network, names, layer and log of `spec`, and an `EPOCH` of its own.

        The directory may be made readable for the app's ids, and is not changed otherwise. Raises
        `Corrupt` or `EngineError`; what is left then, `destroy` removes.
        """

    async def exec(self, handle: Handle, execution: Execution) -> Conversation:
        """Begin to run a command inside. Where there is no such program it ends with code 127,
        where it cannot be executed with 126, and says so on stderr."""

    async def copy(self, handle: Handle, transfer: Transfer) -> Conversation:
        """Begin to copy: inward the stream is its input, outward its stdout; stderr has sentences
        of what went wrong, and its code is 0 when nothing did. The image needs no program."""

    async def stats(self, handle: Handle) -> Stats: ...

    async def limit(self, handle: Handle, resources: Resources) -> None:
        """Change the limits of what runs, at once: cpu, memory, pids. Raises `Unsupported` with
        what cannot change, and `Conflict` when it uses more memory
        now."""

    async def processes(self, handle: Handle) -> list[int]:
        """Pids of its processes as seen by the node."""

    async def guest_processes(self, handle: Handle) -> Sequence[GuestProcess]:
        """Its processes as they are inside, where a kernel of its own runs them. May take long:
        k2i asks now and then, and gives it up after some seconds."""

    async def recover(self, spec: InstanceSpec, handle: Handle) -> Handle | None:
        """After a restart of the agent: the handle of what still runs, None when it has ended."""

    async def destroy(self, handle: Handle) -> None:
        """Remove all that is left: processes, cgroup, mounts, engine state. Idempotent."""

    async def discard(self, spec: InstanceSpec) -> None:
        """Remove what a `prepare` left that was interrupted, so that nobody has its handle; maybe
        nothing. Idempotent."""
