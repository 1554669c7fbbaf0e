"""The kinds of questions that a node's k2i answers, each with its parameters and its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from tabane.clock import Clock
from tabane.errors import NotFound, Unauthenticated, UsageError
from tabane.k2i import query as ask
from tabane.k2i.collectors.runner import FactRow
from tabane.k2i.facts import ProcessWithFacts, add_facts
from tabane.k2i.files import OpenFile, read_files
from tabane.k2i.history import KEEP_S, AppPoint, History, HostPoint, ProcessPoint
from tabane.k2i.host import Host, HostReader, Place
from tabane.k2i.logins import Login, describe_logins, read_sessions
from tabane.k2i.mounts import Mount, MountReader
from tabane.k2i.process import Process
from tabane.k2i.query import Parameter, Query
from tabane.k2i.raw import FILES, MORE_FILES, read_raw
from tabane.k2i.table import ProcessTable
from tabane.k2i.threads import ProcessWithTasks, Thread, add_tasks, read_threads
from tabane.k2i.tree import Branch, grow
from tabane.model import Instance
from tabane.security.identity import Principal
from tabane.units import shorten

JSON = "application/json"
MSGPACK = "application/msgpack"


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a node's answers come from. `inside`: processes that the node's own table has not;
    `facts`: what collectors told."""

    place: Place
    root: Path
    table: ProcessTable
    host: HostReader
    mounts: MountReader
    clock: Clock
    history: History
    inside: Callable[[], Iterable[Process]]
    facts: Callable[[], list[FactRow]]


class Look(NamedTuple):
    """One reading: what is asked, by whom, and the instances that run."""

    sources: Sources
    query: Query
    who: Principal
    instances: Sequence[Instance]

    def processes(self) -> list[Process]:
        """Those that the question is about, as who asks may see them."""
        own = self.sources.table.processes(self.instances)
        return self.show([*own, *self.sources.inside()])

    def own_processes(self) -> list[Process]:
        """Those of them that this kernel runs, which can be looked up in /proc."""
        return self.show(self.sources.table.processes(self.instances))

    def show(self, processes: Iterable[Process]) -> list[Process]:
        return [redact(row, self.who) for row in ask.choose(processes, self.query.filters)]


class Kind(NamedTuple):
    """`read` makes the rows, in the encoding that `media` names. `row` is what one is like."""

    meaning: str
    parameters: Mapping[str, Parameter]
    row: type[msgspec.Struct]
    read: Callable[[Look], bytes]
    media: str = JSON
    may_block: bool = False
    """Reading may wait for another machine, and so for ever."""
    looks_inside: bool = False
    """It tells also of what `Sources.inside` knows, and that is older."""


def redact(process: Process, who: Principal) -> Process:
    """Its arguments are for root and for its own user; others see its name. A user inside of
    something is none of the node's."""
    if who.is_root or (who.uid == process.uid and not process.inside):
        return process
    return replace(process, command=f"[{process.name}]")


def _rows(row: type[msgspec.Struct], read: Callable[[Look], list[Any]]) -> Callable[[Look], bytes]:
    return lambda look: ask.arrange(read(look), look.query, row)


def _host(look: Look) -> list[Host]:
    host = replace(look.sources.host.read(), users=len(read_sessions()))
    return ask.choose([host], look.query.filters)


def _mounts(look: Look) -> list[Mount]:
    mounts, files = look.sources.mounts, look.query.options.get("file")
    found = mounts.read_holding(files, looks=look.who.is_root) if files else mounts.read()
    return ask.choose(found, look.query.filters)


def _logins(look: Look) -> list[Login]:
    sources = look.sources
    processes = [redact(row, look.who) for row in sources.table.processes(look.instances)]
    now = sources.clock.wall()
    found = describe_logins(read_sessions(), processes, sources.place, now)
    return ask.choose(found, look.query.filters)


def _processes(look: Look) -> bytes:
    found, sources, options = look.processes(), look.sources, look.query.options
    if options.get("facts"):
        with_facts = add_facts(found, sources.facts(), look.instances)
        return ask.arrange(with_facts, look.query, ProcessWithFacts)
    if options.get("tasks"):
        with_tasks = add_tasks(sources.root, found, sources.host.uptime_s())
        return ask.arrange(with_tasks, look.query, ProcessWithTasks)
    return ask.arrange(found, look.query, Process)


def _facts(look: Look) -> list[FactRow]:
    return ask.choose(look.sources.facts(), look.query.filters)


def _threads(look: Look) -> list[Thread]:
    sources = look.sources
    return read_threads(sources.root, look.own_processes(), sources.host.uptime_s())


def _tree(look: Look) -> list[Branch]:
    return grow(look.processes())


def _files(look: Look) -> list[OpenFile]:
    if look.who.kind == "anybody":
        problem = "open files are shown only to those who say who they are: ask at a unix socket"
        raise Unauthenticated(problem)
    mine = [row for row in look.own_processes() if look.who.is_root or look.who.uid == row.uid]
    options = look.query.options
    found = read_files(look.sources.root, mine, look.who, mapped=options.get("mapped", False))
    for name in ("path", "type"):
        if name in options:
            found = [row for row in found if getattr(row, name) in options[name]]
    if "port" in options:
        ports = options["port"]
        found = [row for row in found if row.local_port in ports or row.peer_port in ports]
    return found


def _raw(look: Look) -> bytes:
    files = look.query.options.get("files", FILES)
    return read_raw(look.sources.root, look.own_processes(), files, look.who)


def _history(look: Look) -> list[HostPoint]:
    sources = look.sources
    found = sources.history.host(sources.clock.now(), look.query.options.get("since_s", KEEP_S))
    return ask.choose(found, look.query.filters)


def _app_history(look: Look) -> list[AppPoint]:
    sources = look.sources
    since_s = look.query.options.get("since_s", KEEP_S)
    return ask.choose(sources.history.apps(sources.clock.now(), since_s), look.query.filters)


def _process_history(look: Look) -> list[ProcessPoint]:
    sources = look.sources
    filters = dict(look.query.filters)
    since_s = look.query.options.get("since_s", KEEP_S)
    found = sources.history.processes(sources.clock.now(), filters["pid"], since_s)
    return ask.choose(found, look.query.filters)


def _parse_since(text: str) -> int:
    seconds = ask.number(text)
    if not 1 <= seconds <= KEEP_S:
        raise UsageError(f"{seconds} is not from 1 to {KEEP_S:g} seconds")
    return seconds


SINCE = Parameter(
    {"type": "integer", "minimum": 1, "maximum": int(KEEP_S), "default": int(KEEP_S)},
    "Of the last so many seconds.",
    _parse_since,
)
OF_HISTORY = {**ask.PLACE, "since_s": SINCE, **ask.SHAPE}


def _parse_files(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    known = (*FILES, *MORE_FILES)
    for name in names:
        if name not in known:
            raise UsageError(f"{shorten(name)} is none of {', '.join(known)}")
    if len(set(names)) < len(names):
        raise UsageError("a file is named twice")
    return names


def _parse_paths(text: str) -> tuple[str, ...]:
    paths = tuple(text.split("\0"))
    if odd := [path for path in paths if not path.startswith("/")]:
        raise UsageError(f"{shorten(odd[0])} is no whole path: it begins with no slash")
    return paths


RAW_FILES = Parameter(
    ask.list_of({"type": "string", "enum": [*FILES, *MORE_FILES]}) | {"uniqueItems": True},
    f"Which files of each process: of {', '.join((*FILES, *MORE_FILES))}.",
    _parse_files,
)
OF_FILES: dict[str, Parameter] = {
    "path": Parameter(ask.TEXT, "Only this file.", ask.one_text),
    "type": Parameter(ask.LIST, "Only files of these types, as `REG` or `IPv4`.", ask.any_text),
    "port": Parameter(ask.PIDS, "Only sockets at these ports, here or there.", ask.numbers),
    "mapped": Parameter(ask.FLAG, "Also the files that processes have mapped.", ask.flag),
}

OF_MOUNTS = {
    "file": Parameter(
        ask.TEXT,
        "Instead of all mounts, for each of these files (whole paths, with `%00` between them) the "
        "one that it lies on. Whether there is such a file is looked up for root only.",
        _parse_paths,
    )
}

WITH_MORE = {
    "facts": Parameter(ask.FLAG, "Also what collectors told, by collector.", ask.flag),
    "tasks": Parameter(ask.FLAG, "Also the threads of each, as in `/v2/threads`.", ask.flag),
}
MORE: dict[str, type[Process]] = {"facts": ProcessWithFacts, "tasks": ProcessWithTasks}
"""What processes are like with these parameters, one at a time."""
OF_FACTS = {name: ask.OWNER[name] for name in ("namespace", "app", "instance", "pid")}

KINDS: dict[str, Kind] = {
    "processes": Kind(
        "Processes, each with its place: node, app, instance, class.",
        {**ask.PLACE, **ask.OWNER, **ask.INSIDE, **WITH_MORE, **ask.SHAPE, **ask.GROUPS},
        Process,
        _processes,
        looks_inside=True,
    ),
    "facts": Kind(
        "What collectors told of processes, instances and nodes, each with its age.",
        {**ask.PLACE, **OF_FACTS, **ask.COLLECTED, **ask.SHAPE, **ask.GROUPS},
        FactRow,
        _rows(FactRow, _facts),
    ),
    "threads": Kind(
        "The threads of the processes that the parameters choose.",
        {**ask.PLACE, **ask.OWNER, **ask.SHAPE, **ask.GROUPS},
        Thread,
        _rows(Thread, _threads),
    ),
    "tree": Kind(
        "Processes as a tree: parents before their children, with `depth`.",
        {**ask.PLACE, **ask.OWNER, **ask.INSIDE, **{n: ask.SHAPE[n] for n in ("fields", "limit")}},
        Branch,
        _rows(Branch, _tree),
        looks_inside=True,
    ),
    "files": Kind(
        "Open files and sockets of processes; of one's own, unless one is root.",
        {**ask.PLACE, **ask.OWNER, **OF_FILES, **ask.SHAPE, **ask.GROUPS},
        OpenFile,
        _rows(OpenFile, _files),
        may_block=True,
    ),
    "host": Kind(
        "The figures of a machine: CPUs, memory, load, pressure, disks, network.",
        {**ask.PLACE, "fields": ask.SHAPE["fields"]},
        Host,
        _rows(Host, _host),
    ),
    "mounts": Kind(
        "Mounted file systems, and how full they are.",
        {**ask.PLACE, **OF_MOUNTS, **ask.SHAPE, **ask.GROUPS},
        Mount,
        _rows(Mount, _mounts),
        may_block=True,
    ),
    "logins": Kind(
        "Who is logged in, since when, idle for how long, and what they do.",
        {**ask.PLACE, "user": ask.OWNER["user"], **ask.SHAPE},
        Login,
        _rows(Login, _logins),
    ),
    "history": Kind(
        "The figures of a machine in the last ten minutes, about once a second.",
        OF_HISTORY,
        HostPoint,
        _rows(HostPoint, _history),
    ),
    "history/apps": Kind(
        "What each app's processes used in the last ten minutes.",
        {**OF_HISTORY, "app": ask.OWNER["app"]},
        AppPoint,
        _rows(AppPoint, _app_history),
    ),
    "history/processes": Kind(
        "What processes used in the last ten minutes; `pid` must say which.",
        {**OF_HISTORY, "pid": ask.OWNER["pid"]._replace(required=True)},
        ProcessPoint,
        _rows(ProcessPoint, _process_history),
    ),
    "raw": Kind(
        "The files of each process in /proc, and the machine's own, as bytes.",
        {**ask.PLACE, **ask.OWNER, "files": RAW_FILES},
        Process,
        _raw,
        media=MSGPACK,
    ),
}


def check(kind: str, params: Mapping[str, str]) -> Query:
    """What is asked, understood. Raises `NotFound` for a kind that is not there, `UsageError` for
    parameters that are not."""
    if kind not in KINDS:
        raise NotFound(f"k2i knows no {shorten(kind)}, only {', '.join(KINDS)}")
    more = [name for name in MORE if params.get(name) == "yes"]
    if len(more) > 1:
        raise UsageError(f"{' and '.join(more)} are not told at once: ask for one of them")
    row = MORE[more[0]] if more else KINDS[kind].row
    return ask.parse_query(params, KINDS[kind].parameters, row)
