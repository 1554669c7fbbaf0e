"""The fields of app files: for each its name there and in the model, how it is read and shown.

A reader returns the model's value, or raises `UsageError` saying what is wrong and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from tabane.cron import check_cron, check_timezone
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
    TcpPort,
    Volume,
)
from tabane.reactions import HOOK_SIGNALS, Health, Hooks, Trigger
from tabane.references import SCHEME, parse_reference
from tabane.spec_readers import (
    LABEL,
    Field,
    Mistake,
    Section,
    Tables,
    as_command,
    as_duration,
    as_flag,
    as_interval,
    as_label,
    as_path,
    as_positive_duration,
    as_size,
    as_text,
    did_you_mean,
    one_of,
    set_of,
    whole,
)
from tabane.units import format_duration, format_size, shorten

_READY_PATH = re.compile(r"http:/[!-~]{0,2000}")
_PATH = re.compile(r"/[!-~]{0,2000}")
_IMAGE_PATH = re.compile(r"(rootfs|oci|archive|wasm|solo5):(.+)", re.DOTALL)
_CAPABILITY_NAMES = """
AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE
DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE
MKNOD NET_ADMIN NET_BIND_SERVICE NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYSLOG
SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE
SYS_TIME SYS_TTY_CONFIG WAKE_ALARM
"""
LONGEST_BODY = 4096
"""Of a trigger's request, bytes."""
OWN_ROOM = "nodes"
"""Where the cluster's own processes talk to each other: no app may be there."""
CAPABILITIES = frozenset("CAP_" + name for name in _CAPABILITY_NAMES.split())
"""capabilities(7), Linux 5.9 and later."""


def _host(value: Any) -> str:
    host = as_text(value).lower()
    labels = host.split(".")
    if len(host) > 253 or labels[-1].isdigit() or not all(map(LABEL.fullmatch, labels)):
        raise UsageError(
            f'{shorten(value)} is no DNS name, as "www.example.com" (other scripts as xn--...)'
        )
    return host


def _image(value: Any) -> str:
    image = as_text(value)
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


def _cpu(value: Any) -> float:
    if type(value) not in (int, float) or not 0.01 <= value <= 4096:
        raise UsageError(f"{shorten(value)} is not a number of CPUs from 0.01 to 4096")
    return float(value)


def _ready(value: Any) -> str:
    if as_text(value) not in ("listen", "started", "health") and not _READY_PATH.fullmatch(value):
        raise UsageError(f'{shorten(value)} is none of "listen", "started", "health", "http:/path"')
    return str(value)


def _cron(value: Any) -> str:
    check_cron(as_text(value))
    return str(value)


def _timezone(value: Any) -> str:
    check_timezone(as_text(value))
    return str(value)


def _one_room(value: Any) -> str:
    if "*" in _room(value):
        raise UsageError(f"{shorten(value)} stands for many rooms: name one")
    return str(value)


def _url_path(value: Any) -> str:
    if not _PATH.fullmatch(as_text(value)):
        raise UsageError(f'{shorten(value)} is no path of a URL, as "/healthz"')
    return str(value)


def _hook(value: Any) -> str:
    kind, _, what = as_text(value).partition(":")
    is_known = (
        what in HOOK_SIGNALS if kind == "signal" else kind == "http" and _PATH.fullmatch(what)
    )
    if not is_known:
        signals = ", ".join(HOOK_SIGNALS)
        raise UsageError(f'{shorten(value)} is neither "http:/path" nor "signal:" and {signals}')
    return str(value)


def _protocol(value: Any) -> str:
    if as_text(value) not in ("http", "h2c"):
        raise UsageError(f'{shorten(value)} is none of "http", "h2c"')
    return str(value)


_OWN_PATHS = ("proc", "sys", "dev", "run/tabane", ".tabane")
"""What Tabane itself puts into an instance."""


def _volume_path(value: Any) -> str:
    path = as_path(value)
    parts = path.split("/")[1:]
    if not all(part not in ("", ".", "..") for part in parts):
        raise UsageError(f'{shorten(value)} is not written plainly, as "/var/lib/data"')
    for own in _OWN_PATHS:
        if own == "/".join(parts[: own.count("/") + 1]):
            raise UsageError(f"{shorten(value)} is in /{own}, which is not the image's: elsewhere")
    return path


def _datacenter(value: Any) -> str:
    return "*" if value == "*" else as_label(value)


def _capability(value: Any) -> str:
    if as_text(value) not in CAPABILITIES:
        raise UsageError(
            f"{shorten(value)} is no capability of Linux, as CAP_NET_RAW"
            + did_you_mean(value.upper(), CAPABILITIES)
        )
    return str(value)


def _room(value: Any) -> str:
    name, star, rest = as_text(value).partition("*")
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


def _env(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise UsageError(f'{shorten(value)} is not a table: write [env] and NAME = "value" below')
    for name, text in value.items():
        if not name or "=" in name or "\0" in name:
            raise UsageError(f"{shorten(name)} is no name of a variable: no '=', not empty")
        if not isinstance(text, str) or "\0" in text:
            raise Mistake(f"env.{name}", f"{shorten(text)} is not text: write it in quotes")
    return dict(value)


def _url(value: Any) -> str:
    try:
        url = urlsplit(as_text(value))
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
    if as_text(value) not in COLLECTED_BY:
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
    "name": Field("name", as_label),
    "url": Field("url", _url),
    "command": Field("command", as_command),
    "interval": Field("interval_s", as_interval, format_duration),
    "deadline": Field("deadline_s", as_positive_duration, format_duration),
}
NODE_COLLECT = _COLLECT | {
    "kind": Field("kind", as_label),
    "username": Field("username", as_text),
    "password_file": Field("password_file", as_path),
    "settings": Field("settings", _settings),
}
"""Of a node's own collectors, which may be of other kinds and ask any server."""

_RESOURCES = {
    "cpu": Field("cpu", _cpu),
    "memory": Field("memory_bytes", as_size, format_size),
    "pids": Field("pids", whole(1, 4_194_304)),
    "disk": Field("disk_bytes", as_size, format_size),
    "cpu_min": Field("cpu_min", _cpu),
    "memory_min": Field("memory_min_bytes", as_size, format_size),
}
_HEALTH = {
    "http": Field("http", _url_path),
    "tcp": Field("tcp", as_flag),
    "command": Field("command", as_command),
    "interval": Field("interval_s", as_interval, format_duration),
    "timeout": Field("timeout_s", as_positive_duration, format_duration),
    "failures": Field("failures", whole(1, 1000)),
    "startup": Field("startup_s", as_duration, format_duration),
}
_HOOKS = {
    "restored": Field("restored", _hook),
    "deadline": Field("deadline_s", as_positive_duration, format_duration),
}
_TRIGGERS = {
    "name": Field("name", as_label),
    "cron": Field("cron", _cron),
    "timezone": Field("timezone", _timezone),
    "missed": Field("missed", one_of("skip", "once")),
    "overlap": Field("overlap", one_of("skip", "allow")),
    "room": Field("room", _one_room),
    "path": Field("path", _url_path),
    "method": Field("method", one_of("GET", "POST", "PUT", "DELETE", "PATCH")),
    "body": Field("body", as_text),
}


def _check_trigger(trigger: Trigger) -> None:
    if trigger.cron and trigger.room:
        raise Mistake("room", "is there beside cron: leave one, or write two triggers")
    if not trigger.cron and not trigger.room:
        raise Mistake("cron", "is missing, or room: a trigger has one of them")
    if len(trigger.body.encode()) > LONGEST_BODY:
        raise Mistake("body", f"is longer than {LONGEST_BODY} bytes")
    of_cron = {name: getattr(trigger, name) for name in ("timezone", "missed", "overlap", "body")}
    for name, given in of_cron.items():
        if trigger.room and given != getattr(Trigger(), name):
            raise Mistake(name, "has a meaning with cron only")


_VOLUMES = {
    "name": Field("name", as_label),
    "path": Field("path", _volume_path),
    "size": Field("size_bytes", as_size, format_size),
}
MAIN = "main"
"""What the main program's container is called, where containers are named."""


def _container_name(value: Any) -> str:
    if as_label(value) == MAIN:
        raise UsageError(f"{shorten(value)} is what the app's own program is called: another one")
    return str(value)


RESERVED_PORTS = {
    53: "the resolver",
    80: "HTTP",
    443: "HTTPS",
    7070: "the control API",
    7071: "the hub",
    7072: "the other gateways",
    7073: "the other gateways",
}
"""What a node's own processes listen on, or will."""


def _public_port(value: Any) -> int:
    port: int = whole(1, 65535)(value)
    if port in RESERVED_PORTS:
        raise UsageError(f"{port} is for {RESERVED_PORTS[port]} on every node: take another one")
    return port


def _proxy_protocol(value: Any) -> str:
    if as_text(value) not in ("v1", "v2"):
        raise UsageError(f'{shorten(value)} is none of "v1", "v2"')
    return str(value)


def make_tcp(**told: Any) -> TcpPort:
    """Where no target is told it is the port itself."""
    return TcpPort(**({"target": told["port"]} | told))


_TCP = {
    "port": Field("port", _public_port),
    "target": Field("target", whole(1, 65535)),
    "session_idle": Field("session_idle_s", as_positive_duration, format_duration),
    "proxy_protocol": Field("proxy_protocol", _proxy_protocol),
}
_CONTAINERS = {
    "name": Field("name", _container_name),
    "image": Field("source", _image),
    "command": Field("command", as_command),
    "env": Field("env", _env),
    "workdir": Field("workdir", as_path),
    "volumes": Field("volumes", set_of(as_label)),
}
_REACTIVE = {
    "concurrency": Field("concurrency", whole(1)),
    "min": Field("min", whole(0)),
    "max": Field("max", whole(1)),
    "freeze_after": Field("freeze_after_s", as_duration, format_duration),
    "checkpoint": Field("checkpoint", as_flag),
    "checkpoint_after": Field("checkpoint_after_s", as_duration, format_duration),
    "stop_after": Field("stop_after_s", as_duration, format_duration),
    "reclaim": Field("reclaim", as_flag),
    "max_age": Field("max_age_s", as_positive_duration, format_duration),
    "ready": Field("ready", _ready),
    "start_timeout": Field("start_timeout_s", as_positive_duration, format_duration),
    "response_timeout": Field("response_timeout_s", as_positive_duration, format_duration),
    "drain_timeout": Field("drain_timeout_s", as_duration, format_duration),
    "stop_timeout": Field("stop_timeout_s", as_duration, format_duration),
    "queue": Field("queue", whole(0)),
    "wake_budget": Field("wake_budget_s", as_positive_duration, format_duration),
}

AnyField = Field | Section | Tables

FIELDS: dict[str, AnyField] = {
    "name": Field("name", as_label),
    "namespace": Field("namespace", as_label),
    "image": Field("image", _image),
    "command": Field("command", as_command),
    "class": Field("isolation", _class, str),
    "driver": Field("driver", as_label),
    "allow_emulation": Field("allow_emulation", as_flag),
    "port": Field("port", whole(1, 65535)),
    "hosts": Field("hosts", set_of(_host)),
    "protocol": Field("protocol", _protocol),
    "env": Field("env", _env),
    "workdir": Field("workdir", as_path),
    "resources": Section("resources", Resources, _RESOURCES),
    "reactive": Section("reactive", Reactive, _REACTIVE),
    "health": Section("health", Health, _HEALTH),
    "hooks": Section("hooks", Hooks, _HOOKS),
    "network": Section("network", NetworkPolicy, {"egress": Field("egress", as_flag)}),
    "placement": Section(
        "placement",
        Placement,
        {"datacenters": Field("datacenters", set_of(_datacenter, empty=False))},
    ),
    "security": Section(
        "security", SecurityPolicy, {"capabilities": Field("capabilities", set_of(_capability))}
    ),
    "services": Section(
        "services",
        Services,
        {
            "middlecon": Field("middlecon", set_of(_room, empty=False)),
            "k2i": Field("k2i", as_flag),
            "lease": Field("lease", as_flag),
        },
    ),
    "tcp": Tables("tcp", make_tcp, _TCP, ("port",), lambda tcp: None, most=16, key="port"),
    "volumes": Tables("volumes", Volume, _VOLUMES, ("name", "path"), lambda volume: None, most=8),
    "containers": Tables(
        "containers", Container, _CONTAINERS, ("name",), lambda container: None, most=8
    ),
    "triggers": Tables("triggers", Trigger, _TRIGGERS, (), _check_trigger, most=16),
    "collect": Tables("collect", make_collect, _COLLECT, ("kind",), _check_inside, most=8),
}
"""All an app file may say, in the order it is written."""

REQUIRED = ("name", "image")
