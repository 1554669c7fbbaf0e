"""What the guest is told to start or to answer, as fields: tag, length, value. Without IO.

One byte of tag, the value's length in four bytes, the value; numbers have eight bytes, all in
little-endian order. Unknown tags are ignored on both sides.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address

from tabane.errors import ProtocolError, UsageError
from tabane.guest.frames import MAX_PAYLOAD
from tabane.model import Value
from tabane.runtimes.api import Execution, Transfer, User

START_MAGIC = b"TABANE\0\2"
MAX_START_BYTES = 1 << 20
SECTOR_BYTES = 512
MOST_WORDS = 4096
"""Of a command, its environment, and of files: what the agent has room for."""
MOST_GROUPS = 64

CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID"),
    *("SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW"),
    *("IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT"),
    *("SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD"),
    *("LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP"),
)
"""In the kernel's order (linux/capability.h): each has the bit of its place."""

_FIELD = struct.Struct("<cI")


class ContainerOrder(Value, frozen=True):
    """What a guest needs to know of one container: its root and its program."""

    name: str
    image: int
    """The number of its image's disk."""
    args: tuple[str, ...]
    env: tuple[str, ...]
    workdir: str
    user: User
    capabilities: int
    stop_signal: int
    volumes: tuple[tuple[int, str], ...] = ()
    """The numbers of their disks, and where it sees them."""


class Identity(Value, frozen=True):
    """Who a machine is that goes on from a checkpoint; what is not said here is as it was saved.
    As of `StartOrder`."""

    hostname: str
    address: str
    mac: str
    gateway: str
    gateway_mac: str
    files: dict[str, str]
    memory_bytes: int
    pids: int
    seed: bytes
    clock_ns: int
    epoch: str


class StartOrder(Value, frozen=True):
    """All a guest needs to know of the machine's containers, the main one being the last. `files`
    go into their /etc."""

    containers: tuple[ContainerOrder, ...]
    hostname: str
    address: str
    mac: str
    """Of its own network device."""
    gateway: str
    gateway_mac: str
    files: dict[str, str]
    memory_bytes: int
    pids: int
    seed: bytes
    """Up to 64 bytes of entropy, which the guest trusts."""
    clock_ns: int
    """Of the wall clock, since 1970."""
    stop_timeout_s: float
    """How long the others may take to end when the first of the containers has."""
    services: tuple[str, ...] = ()
    """Names of sockets of the node's."""


def encode_start(order: StartOrder) -> bytes:
    """The start disk: magic, length, fields, to a whole number of sectors.

    Raises `UsageError` when it is more than an agent takes.
    """
    fields = b"".join(
        (
            _who(order),
            _number(b"T", int(order.stop_timeout_s * 1000)),
            _words(b"x", order.services, "what of its node it uses"),
            *(_container(each) for each in order.containers),
        )
    )
    if len(fields) > MAX_START_BYTES:
        raise UsageError(f"its command and environment have {len(fields)} bytes: too many")
    disk = START_MAGIC + struct.pack("<I", len(fields)) + fields
    return disk + bytes(-len(disk) % SECTOR_BYTES)


def encode_identity(identity: Identity) -> bytes:
    """Of a clone. Raises `UsageError` when it is more than fits into a frame."""
    fields = _who(identity) + _text(b"E", identity.epoch)
    if len(fields) > MAX_PAYLOAD:
        raise UsageError(f"the files of its /etc have {len(fields)} bytes: too many")
    return fields


def _who(order: StartOrder | Identity) -> bytes:
    return b"".join(
        (
            _words(b"f", (f"{name}={text}" for name, text in order.files.items()), "/etc"),
            _text(b"h", order.hostname),
            _field(b"A", IPv4Address(order.address).packed),
            _field(b"R", IPv4Address(order.gateway).packed),
            _mac(b"H", order.mac),
            _mac(b"M", order.gateway_mac),
            _number(b"m", order.memory_bytes),
            _number(b"P", order.pids),
            _field(b"s", order.seed),
            _number(b"C", order.clock_ns),
        )
    )


def _container(order: ContainerOrder) -> bytes:
    return b"".join(
        (
            _text(b"N", order.name),
            _text(b"I", f"image{order.image}"),
            _words(b"a", order.args, "its command"),
            _words(b"e", order.env, "its environment"),
            _text(b"w", order.workdir),
            _user(order.user),
            _number(b"c", order.capabilities),
            _number(b"S", order.stop_signal),
            _words(b"v", (f"{number}={path}" for number, path in order.volumes), "its volumes"),
        )
    )


def encode_execution(execution: Execution) -> bytes:
    """Of a command inside. Raises `UsageError` when it is more than fits into a frame."""
    fields = _words(b"a", execution.argv, "the command")
    fields += _words(b"e", execution.env, "the environment")
    if execution.workdir:
        fields += _text(b"w", execution.workdir)
    if execution.user is not None:
        fields += _user(execution.user)
    if execution.stdin:
        fields += _field(b"i", b"")
    if (size := execution.terminal) is not None:
        fields += _field(b"t", struct.pack("<HH", size.rows, size.columns))
    if execution.container:
        fields += _text(b"k", execution.container)
    return _checked(fields)


def encode_transfer(transfer: Transfer) -> bytes:
    """Of files in or out; which way is the frame's kind."""
    fields = _text(b"p", transfer.path)
    if transfer.as_named:
        fields += _field(b"n", b"")
    if transfer.user is not None:
        fields += _user(transfer.user)
    if transfer.container:
        fields += _text(b"k", transfer.container)
    return _checked(fields)


def encode_limits(memory_bytes: int, pids: int) -> bytes:
    return _number(b"m", memory_bytes) + _number(b"P", pids)


def mask_of(capabilities: Iterable[str]) -> int:
    """Capabilities by name, as `CAP_CHOWN`, as the kernel's bits."""
    return sum(1 << CAPABILITIES.index(name.removeprefix("CAP_")) for name in capabilities)


def parse_fields(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Tags and values. Raises `ProtocolError` when they break off."""
    at = 0
    while at < len(data):
        if len(data) - at < _FIELD.size:
            raise ProtocolError("a field of the guest's breaks off")
        tag, length = _FIELD.unpack_from(data, at)
        at += _FIELD.size
        if length > len(data) - at:
            raise ProtocolError("a field of the guest's breaks off")
        yield tag, data[at : at + length]
        at += length


def parse_numbers(data: bytes) -> dict[bytes, int]:
    """Fields that are all numbers. Raises `ProtocolError`."""
    return {tag: int.from_bytes(value[:8], "little") for tag, value in parse_fields(data)}


def _checked(fields: bytes) -> bytes:
    if len(fields) > MAX_PAYLOAD:
        raise UsageError(f"the command and its environment have {len(fields)} bytes: too many")
    return fields


def _field(tag: bytes, value: bytes) -> bytes:
    return _FIELD.pack(tag, len(value)) + value


def _mac(tag: bytes, address: str) -> bytes:
    return _field(tag, bytes.fromhex(address.replace(":", "")))


def _number(tag: bytes, value: int) -> bytes:
    return _field(tag, value.to_bytes(8, "little"))


def _text(tag: bytes, text: str) -> bytes:
    if "\0" in text:
        raise UsageError(f"{text!r} has a zero byte in it: no program can be given that")
    return _field(tag, text.encode(errors="surrogateescape"))


def _words(tag: bytes, words: Iterable[str], what: str) -> bytes:
    fields = [_text(tag, word) for word in words]
    if len(fields) > MOST_WORDS:
        raise UsageError(f"{what} has {len(fields)} words, more than {MOST_WORDS}")
    return b"".join(fields)


def _user(user: User) -> bytes:
    if len(user.groups) > MOST_GROUPS:
        raise UsageError(f"a user in {len(user.groups)} groups: a guest takes {MOST_GROUPS}")
    groups = b"".join(_number(b"G", group) for group in user.groups)
    return _number(b"u", user.uid) + _number(b"g", user.gid) + groups
