"""The fields of app files: for each its name there and in the model, how it is read and shown.

A reader returns the model's value, or raises `UsageError` saying what is wrong and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from tabane.errors import UsageError
from tabane.model import (
    Class,
    Collect,
    Container,
    NetworkPolicy,
    Placement,
    Reactive,
    Resources,
    SecurityPolicy,
    Services,
    Volume,
)
from tabane.references import SCHEME, parse_reference
from tabane.units import format_duration, format_size, parse_duration, parse_size, shorten

Reader = Callable[[Any], Any]

LARGEST = 1_000_000
"""What `min`, `max`, `concurrency` and `queue` may be at the most."""

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_READY_PATH = re.compile(r"http:/[!-~]{0,2000}")
_IMAGE_PATH = re.compile(r"(rootfs|oci|archive|wasm|solo5):(.+)", re.DOTALL)
_CAPABILITY_NAMES = """
AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE
DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE
MKNOD NET_ADMIN NET_BIND_SERVICE NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYSLOG
SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE
SYS_TIME SYS_TTY_CONFIG WAKE_ALARM
"""
OWN_ROOM = "nodes"
"""Where the cluster's own processes talk to each other: no app may be there."""
CAPABILITIES = frozenset("CAP_" + name for name in _CAPABILITY_NAMES.split())
"""capabilities(7), Linux 5.9 and later."""


class Mistake(UsageError):
    """What is wrong with the field at a path, as `resources.memory`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Field:
    """`attribute` of the model is what `read` makes of the value; `show` is the way back."""

    attribute: str
    read: Reader
    show: Callable[[Any], Any] = _plain


@dataclass(frozen=True)
class Section:
    """`attribute` of the model is a `model` of these fields."""

    attribute: str
    model: Callable[..., Any]
    fields: Mapping[str, Field]


@dataclass(frozen=True)
class Tables:
    """`attribute` of the model is a tuple, with a `model` of these fields for each table of an
    array. `check` raises `Mistake` with the name of a field."""

    attribute: str
    model: Callable[..., Any]
    fields: Mapping[str, Field]
    required: tuple[str, ...]
    check: Callable[[Any], None]
    most: int


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise UsageError(f"{shorten(value)} is not text: write it in quotes, without NUL")
    return value


def _label(value: Any) -> str:
    if not _LABEL.fullmatch(_text(value)):
        raise UsageError(
            f"{shorten(value)} is no name: 1 to 63 of a-z, 0-9 and -, with no - at either end"
        )
    return str(value)


def _host(value: Any) -> str:
    host = _text(value).lower()
    labels = host.split(".")
    if len(host) > 253 or labels[-1].isdigit() or not all(map(_LABEL.fullmatch, labels)):
        raise UsageError(
            f'{shorten(value)} is no DNS name, as "www.example.com" (other scripts as xn--...)'
        )
    return host


def _image(value: Any) -> str:
    image = _text(value)
    if image.startswith(SCHEME):
        parse_reference(image)
    elif image != "host" and not _IMAGE_PATH.fullmatch(image):
        raise UsageError(
            f"{shorten(value)} is none of docker://HOST/REPOSITORY:TAG, rootfs:DIR, oci:DIR, "
            "archive:FILE, wasm:FILE, solo5:FILE, host"
        )
    return image


def _class(value: Any) -> Class:
    try:
        return Class(value)
    except ValueError:
        raise UsageError(f"{shorten(value)} is none of {', '.join(Class)}") from None


def _whole(low: int, high: int = LARGEST) -> Reader:
    def read(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise UsageError(f"{shorten(value)} is not a whole number from {low} to {high}")
        return value

    return read


def _cpu(value: Any) -> float:
    if type(value) not in (int, float) or not 0.01 <= value <= 4096:
        raise UsageError(f"{shorten(value)} is not a number of CPUs from 0.01 to 4096")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{shorten(value)} is neither true nor false")
    return value


def _size(value: Any) -> int:
    smallest, largest = 1 << 20, 1 << 50
    size = value if type(value) is int else parse_size(_text(value))
    if not smallest <= size <= largest:
        raise UsageError(f"{shorten(value)} is not from 1MiB to 1024TiB")
    return size


def _duration(value: Any) -> float:
    if not isinstance(value, str):
        raise UsageError(f'{shorten(value)} has no unit: write a duration as "30s" or "1h30m"')
    return parse_duration(value)


def _positive_duration(value: Any) -> float:
    seconds = _duration(value)
    if not seconds:
        raise UsageError(f"{shorten(value)} is not longer than nothing")
    return seconds


def _ready(value: Any) -> str:
    if _text(value) not in ("listen", "started") and not _READY_PATH.fullmatch(value):
        raise UsageError(f'{shorten(value)} is none of "listen", "started", "http:/path"')
    return str(value)


def _protocol(value: Any) -> str:
    if _text(value) not in ("http", "h2c"):
        raise UsageError(f'{shorten(value)} is none of "http", "h2c"')
    return str(value)


def _workdir(value: Any) -> str:
    if not _text(value).startswith("/"):
        raise UsageError(f"{shorten(value)} is not an absolute path in the image")
    return str(value)


_OWN_PATHS = ("proc", "sys", "dev", "run/tabane", ".tabane")
"""What Tabane itself puts into an instance."""


def _volume_path(value: Any) -> str:
    path = _workdir(value)
    parts = path.split("/")[1:]
    if not all(part not in ("", ".", "..") for part in parts):
        raise UsageError(f'{shorten(value)} is not written plainly, as "/var/lib/data"')
    for own in _OWN_PATHS:
        if own == "/".join(parts[: own.count("/") + 1]):
            raise UsageError(f"{shorten(value)} is in /{own}, which is not the image's: elsewhere")
    return path


def _datacenter(value: Any) -> str:
    return "*" if value == "*" else _label(value)


def _capability(value: Any) -> str:
    if _text(value) not in CAPABILITIES:
        raise UsageError(
            f"{shorten(value)} is no capability of Linux, as CAP_NET_RAW"
            + did_you_mean(value.upper(), CAPABILITIES)
        )
    return str(value)


def _room(value: Any) -> str:
    name, star, rest = _text(value).partition("*")
    if rest or not (value and value.isprintable()) or len(value.encode()) > 255:
        raise UsageError(
            f"{shorten(value)} is no room: 1 to 255 bytes that can be printed, "
            'with no * but at the end, as "chat.*"'
        )
    if name == OWN_ROOM or (star and OWN_ROOM.startswith(name)):
        raise UsageError(
            f"{shorten(value)} takes in {OWN_ROOM!r}, the room of the cluster's own processes: "
            "name only rooms of the app's own"
        )
    return str(value)


def _list(read: Reader, *, empty: bool = True) -> Reader:
    def read_list(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not (value or empty):
            least = "" if empty else " of at least one"
            raise UsageError(f'{shorten(value)} is not a list{least}: write it as ["...", "..."]')
        return tuple(map(read, value))

    return read_list


def _set(read: Reader, *, empty: bool = True) -> Reader:
    read_list = _list(read, empty=empty)

    def read_set(value: Any) -> tuple[Any, ...]:
        items: tuple[Any, ...] = read_list(value)
        for item in items:
            if items.count(item) > 1:
                raise UsageError(f"{shorten(item)} is there twice: leave one of them out")
        return items

    return read_set


def _command(value: Any) -> tuple[str, ...]:
    command: tuple[str, ...] = _list(_text, empty=False)(value)
    if not command[0]:
        raise UsageError("its first word, the program, is empty")
    return command


def _env(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise UsageError(f'{shorten(value)} is not a table: write [env] and NAME = "value" below')
    for name, text in value.items():
        if not name or "=" in name or "\0" in name:
            raise UsageError(f"{shorten(name)} is no name of a variable: no '=', not empty")
        if not isinstance(text, str) or "\0" in text:
            raise Mistake(f"env.{name}", f"{shorten(text)} is not text: write it in quotes")
    return dict(value)


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`: did you mean ...?`, or nothing when nothing is close."""
    import difflib

    close = difflib.get_close_matches(given, allowed, n=1)
    return f": did you mean {close[0]}?" if close else ""


def _interval(value: Any) -> float:
    seconds = _duration(value)
    if not 1 <= seconds <= 86400:
        raise UsageError(f"{shorten(value)} is not from 1s to 1d")
    return seconds


def _url(value: Any) -> str:
    try:
        url = urlsplit(_text(value))
        known = _is_url(url)
    except ValueError:
        known = False
    if not known or not (str(value).isascii() and str(value).isprintable()):
        raise UsageError(
            f'{shorten(value)} is none of "http://HOST:PORT/PATH", "redis://HOST:PORT", '
            '"unix:///PATH", without user and password'
        )
    return str(value)


def _is_url(url: SplitResult) -> bool:
    if url.scheme == "unix":
        return not url.netloc and len(url.path) > 1 and not url.query
    path_fits = url.scheme == "http" or not (url.path or url.query)
    fits = url.scheme in ("http", "redis") and path_fits and url.port != 0
    return fits and bool(url.hostname) and "@" not in url.netloc and not url.fragment


def _settings(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{shorten(value)} is not a table: write [collect.settings]")
    return dict(value)


def make_collect(**told: Any) -> Collect:
    """Where no deadline is told it is no longer than the interval."""
    collect = Collect(**told)
    told.setdefault("deadline_s", min(collect.deadline_s, collect.interval_s))
    return Collect(**told)


COLLECTED_BY = {"command": "command", "nginx": "url", "redis": "url"}
"""The kinds of collectors that are ours, and the field that says whom they ask."""
_SCHEMES = {"nginx": ("http",), "redis": ("redis", "unix")}
_INSIDE_HOSTS = ("127.0.0.1", "localhost")


def _own_kind(value: Any) -> str:
    if _text(value) not in COLLECTED_BY:
        hint = did_you_mean(value, COLLECTED_BY)
        raise UsageError(f"{shorten(value)} is none of {', '.join(COLLECTED_BY)}{hint}")
    return str(value)


def check_collect(collect: Collect) -> None:
    """The rules between the fields of one collector. Raises `Mistake`."""
    if collect.deadline_s > collect.interval_s:
        raise Mistake("deadline", "is longer than the interval: readings would overtake each other")
    asked = COLLECTED_BY.get(collect.kind)
    if asked is None:
        return
    if not getattr(collect, asked):
        raise Mistake(asked, f"is missing: {collect.kind} is asked there")
    others = set(COLLECTED_BY.values()) - {asked}
    others |= set() if collect.kind == "redis" else {"username", "password_file"}
    for other in sorted(others | {"settings"}):
        if getattr(collect, other):
            raise Mistake(other, f"has no meaning for {collect.kind}: leave it out")
    scheme = collect.url.partition(":")[0]
    if collect.url and scheme not in _SCHEMES[collect.kind]:
        schemes = " or ".join(f"{s}://" for s in _SCHEMES[collect.kind])
        raise Mistake("url", f"{collect.kind} is asked at {schemes}, not at {scheme}://")


def _check_inside(collect: Collect) -> None:
    """An app's collectors see what its own instance does, and nothing else."""
    check_collect(collect)
    if collect.url and urlsplit(collect.url).hostname not in _INSIDE_HOSTS:
        raise Mistake("url", "an app's collector asks its own instance: the host is 127.0.0.1")


_COLLECT = {
    "kind": Field("kind", _own_kind),
    "name": Field("name", _label),
    "url": Field("url", _url),
    "command": Field("command", _command),
    "interval": Field("interval_s", _interval, format_duration),
    "deadline": Field("deadline_s", _positive_duration, format_duration),
}
NODE_COLLECT = _COLLECT | {
    "kind": Field("kind", _label),
    "username": Field("username", _text),
    "password_file": Field("password_file", _workdir),
    "settings": Field("settings", _settings),
}
"""Of a node's own collectors, which may be of other kinds and ask any server."""

_RESOURCES = {
    "cpu": Field("cpu", _cpu),
    "memory": Field("memory_bytes", _size, format_size),
    "pids": Field("pids", _whole(1, 4_194_304)),
    "disk": Field("disk_bytes", _size, format_size),
}
_VOLUMES = {
    "name": Field("name", _label),
    "path": Field("path", _volume_path),
    "size": Field("size_bytes", _size, format_size),
}
MAIN = "main"
"""What the main program's container is called, where containers are named."""


def _container_name(value: Any) -> str:
    if _label(value) == MAIN:
        raise UsageError(f"{shorten(value)} is what the app's own program is called: another one")
    return str(value)


_CONTAINERS = {
    "name": Field("name", _container_name),
    "image": Field("source", _image),
    "command": Field("command", _command),
    "env": Field("env", _env),
    "workdir": Field("workdir", _workdir),
    "volumes": Field("volumes", _set(_label)),
}
_REACTIVE = {
    "concurrency": Field("concurrency", _whole(1)),
    "min": Field("min", _whole(0)),
    "max": Field("max", _whole(1)),
    "stop_after": Field("stop_after_s", _duration, format_duration),
    "max_age": Field("max_age_s", _positive_duration, format_duration),
    "ready": Field("ready", _ready),
    "start_timeout": Field("start_timeout_s", _positive_duration, format_duration),
    "response_timeout": Field("response_timeout_s", _positive_duration, format_duration),
    "stop_timeout": Field("stop_timeout_s", _duration, format_duration),
    "queue": Field("queue", _whole(0)),
    "wake_budget": Field("wake_budget_s", _positive_duration, format_duration),
}

AnyField = Field | Section | Tables

FIELDS: dict[str, AnyField] = {
    "name": Field("name", _label),
    "namespace": Field("namespace", _label),
    "image": Field("image", _image),
    "command": Field("command", _command),
    "class": Field("isolation", _class, str),
    "driver": Field("driver", _label),
    "allow_emulation": Field("allow_emulation", _flag),
    "port": Field("port", _whole(1, 65535)),
    "hosts": Field("hosts", _set(_host)),
    "protocol": Field("protocol", _protocol),
    "env": Field("env", _env),
    "workdir": Field("workdir", _workdir),
    "resources": Section("resources", Resources, _RESOURCES),
    "reactive": Section("reactive", Reactive, _REACTIVE),
    "network": Section("network", NetworkPolicy, {"egress": Field("egress", _flag)}),
    "placement": Section(
        "placement",
        Placement,
        {"datacenters": Field("datacenters", _set(_datacenter, empty=False))},
    ),
    "security": Section(
        "security", SecurityPolicy, {"capabilities": Field("capabilities", _set(_capability))}
    ),
    "services": Section(
        "services",
        Services,
        {
            "middlecon": Field("middlecon", _set(_room, empty=False)),
            "k2i": Field("k2i", _flag),
        },
    ),
    "volumes": Tables("volumes", Volume, _VOLUMES, ("name", "path"), lambda volume: None, most=8),
    "containers": Tables(
        "containers", Container, _CONTAINERS, ("name",), lambda container: None, most=8
    ),
    "collect": Tables("collect", make_collect, _COLLECT, ("kind",), _check_inside, most=8),
}
"""All an app file may say, in the order it is written."""

REQUIRED = ("name", "image")
