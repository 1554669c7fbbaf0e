"""What one shell sees of the cluster: the nodes' processes under numbers of its own.

`update` takes what the nodes have said. A process whose files are as before stays the same object,
with the files that were already rendered and the time they changed, so that the kernel's caches of
them stay good. Files are rendered when someone looks at them.

A node that is silent keeps its processes until what it said last is `AGE_LIMIT_S` old; then they
are no longer shown. Its numbers are kept, for when it is back.

All times are of this machine: `now` is monotonic seconds, `uptime_s` seconds since its start. The
view's own start may lie before that of this machine, so that the oldest process of any node has
been started after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import RLock
from typing import NamedTuple

from tabane.k2i.procfs import PAGE_BYTES, TICKS_PER_S
from tabane.tools.procfs import rewrite, totals
from tabane.tools.procfs.numbers import Key, Numbers
from tabane.tools.procfs.rewrite import Ids, Ratio, Terms
from tabane.tools.procfs.source import FILES, Answer, Raw, RawProcess, Told
from tabane.tools.procfs.users import Owners

AGE_LIMIT_S = 5.0
"""Nothing older than this is shown, however silent its node is."""
INIT = 1
"""The parent of what has none: the first process of the shell's own."""


class Remote:
    """One process of another node."""

    __slots__ = (
        *("_files", "_ids", "_terms", "changed_ns", "entries", "gid"),
        *("key", "known", "number", "raw", "uid"),
    )

    def __init__(self, number: int, key: Key, raw: RawProcess, terms: Terms, now_ns: int) -> None:
        self.number = number
        self.key = key
        self.raw = raw
        self.uid = terms.uid(raw.uid)
        self.gid = terms.gid(raw.gid)
        self.changed_ns = now_ns
        self._terms = terms
        self.entries: dict[tuple[int, bytes], bytes] = {}
        """Answers about its files, as whoever serves them keeps them."""
        self.known: set[int] = set()
        """Its files that the kernel may have in its caches; those of the process, whatever it has
        become since."""
        self._files: dict[str, bytes] = {}
        self._ids: Ids | None = None

    def file(self, name: str) -> bytes:
        """One of `PROCESS_FILES`."""
        found = self._files.get(name)
        if found is None:
            found = self._files[name] = self._render(name)
        return found

    @property
    def ids(self) -> Ids:
        if self._ids is None:
            self._ids = rewrite.read_ids(self.stat, self._terms)
        return self._ids

    @property
    def stat(self) -> bytes:
        """As its node has it."""
        return self.raw.files[_STAT] or b""

    def has(self, name: str) -> bool:
        """Whether its node could read that file."""
        return name not in FILES or self.raw.files[FILES.index(name)] is not None

    def _render(self, name: str) -> bytes:
        if name == "comm":
            return rewrite.comm_of(self.stat)
        if name in CONSTANT_FILES:
            return CONSTANT_FILES[name]
        data = self.raw.files[FILES.index(name)] or b""
        if name == "stat":
            return rewrite.rewrite_stat(data, self.number, self._terms)
        if name == "status":
            return rewrite.rewrite_status(data, self.number, self.stat, self._terms)
        return rewrite.rewrite_statm(data, self._terms) if name == "statm" else data


CONSTANT_FILES = {"wchan": b"0", "environ": b""}
"""Nobody's environment leaves its node."""
PROCESS_FILES = (*FILES, "comm", *CONSTANT_FILES)
_STAT = FILES.index("stat")


class Change(NamedTuple):
    """The same process, as it was and as it is."""

    old: Remote
    new: Remote


class NodeLine(NamedTuple):
    """A node in the table of nodes."""

    name: str
    age_s: float | None
    """None: it has said nothing yet."""
    processes: int
    shown: bool


class _Node:
    """What is kept of one start of a node."""

    def __init__(self, told: Told) -> None:
        self.name = told.node
        self.incarnation = told.incarnation
        self.raw = told.raw
        self.terms: Terms
        self.at = 0.0
        """When it said what it said last, by `now`."""
        self.known: dict[int, int] = {}
        """Numbers by pid: of processes, and of process groups and sessions that have outlived
        their first process."""
        self.living: frozenset[int] = frozenset()
        self.processes: dict[int, Remote] = {}


class View:
    """For any thread."""

    def __init__(self, users: Owners, groups: Owners, boot_id: str = "") -> None:
        """`boot_id` is this machine's."""
        self._users = users
        self._groups = groups
        self._boot_id = boot_id
        self._numbers = Numbers()
        self._nodes: dict[str, _Node] = {}
        self._silent: list[str] = []
        self._order: dict[str, int] = {}
        self._lock = RLock()
        self._shift_s: float | None = None
        self.processes: dict[int, Remote] = {}
        """Those shown, by number."""
        self.version = 0
        """Another with every change of `processes`."""

    @property
    def shift_s(self) -> float:
        """How much longer ago than this machine the view was started."""
        return self._shift_s or 0.0

    def update(self, answer: Answer, now: float, now_ns: int, uptime_s: float) -> list[Change]:
        """Take what the nodes have said; which processes are not as they were."""
        changes: list[Change] = []
        with self._lock:
            if self._shift_s is None and answer.told:
                oldest = max(_uptime_of(told.raw) + told.age_s for told in answer.told)
                self._shift_s = max(0.0, float(round(oldest - uptime_s)))
            living: set[Key] = set()
            for told in answer.told:
                living.update(self._take(told, now, now_ns, uptime_s, changes))
            self._silent = answer.silent
            self._numbers.forget({told.node for told in answer.told}, living)
            self._gather()
        return changes

    def expire(self, now: float) -> bool:
        """Stop showing what is too old. Whether anything was."""
        with self._lock:
            late = [node for node in self._nodes.values() if node.processes]
            late = [node for node in late if now - node.at > AGE_LIMIT_S]
            for node in late:
                node.processes = {}
            if late:
                self._gather()
            return bool(late)

    def find(self, number: int) -> Remote | None:
        return self.processes.get(number)

    def render(self, remote: Remote, name: str) -> bytes:
        """One of `PROCESS_FILES`."""
        with self._lock:
            return remote.file(name)

    def ids(self, remote: Remote) -> Ids:
        with self._lock:
            return remote.ids

    def lines(self, now: float) -> list[NodeLine]:
        """The table of nodes."""
        with self._lock:
            heard = [
                NodeLine(n.name, now - n.at, len(n.processes), now - n.at <= AGE_LIMIT_S)
                for n in self._nodes.values()
            ]
            unheard = (name for name in self._silent if name not in self._nodes)
            return [*heard, *(NodeLine(name, None, 0, False) for name in unheard)]

    def host_file(self, name: str, uptime_s: float, btime: int) -> bytes:
        """The cluster's own `stat`, `meminfo`, `vmstat`, `loadavg` or `uptime`; `uptime_s` and
        `btime` are this machine's."""
        with self._lock:
            kernels = list(self._kernels())
            files = [node.raw.host[name] for node in kernels]
            if name == "meminfo":
                return totals.sum_meminfo(files)
            if name == "vmstat":
                return totals.sum_vmstat(files)
            if name == "loadavg":
                return totals.sum_loadavg(
                    files, len(self.processes), max(self.processes, default=0)
                )
            if name == "uptime":
                return b"%.2f %.2f\n" % (uptime_s + self.shift_s, totals.sum_idle(files))
            ticks = [node.raw.ticks_per_s for node in kernels]
            started = btime - int(self.shift_s)
            return totals.sum_stat(list(zip(files, ticks, strict=True)), started, TICKS_PER_S)

    def _kernels(self) -> Iterator[_Node]:
        """One node of each kernel that is shown."""
        seen: set[str] = set()
        for node in self._nodes.values():
            if node.processes and node.raw.boot_id not in seen:
                seen.add(node.raw.boot_id)
                yield node

    def _take(
        self, told: Told, now: float, now_ns: int, uptime_s: float, changes: list[Change]
    ) -> list[Key]:
        """Who lives there."""
        node = self._nodes.get(told.node)
        if node is None or node.incarnation != told.incarnation:
            node = self._nodes[told.node] = self._meet(told, uptime_s)
        node.raw = told.raw
        node.at = now - told.age_s
        before, node.processes = node.processes, {}
        keys, leaders = self._read_keys(told)
        for key in keys:
            node.known[key.pid] = self._numbers.of(key)
        node.living = frozenset(key.pid for key in keys)
        for key, raw in zip(keys, told.raw.processes, strict=True):
            number = node.known[key.pid]
            old = before.get(number)
            if old is None or old.raw != raw:
                new = Remote(number, key, raw, node.terms, now_ns)
                if old is not None:
                    new.known = old.known
                    changes.append(Change(old, new))
                old = new
            node.processes[number] = old
        node.known = {p: n for p, n in node.known.items() if p in node.living or p in leaders}
        return keys

    def _read_keys(self, told: Told) -> tuple[list[Key], set[int]]:
        """Who each process is, and which groups and sessions they are in."""
        keys: list[Key] = []
        leaders: set[int] = set()
        for raw in told.raw.processes:
            stat = raw.files[_STAT] or b""
            words = stat[stat.rindex(b")") + 1 :].split(None, 6)
            keys.append(Key(told.node, told.incarnation, raw.pid, raw.start_ticks))
            leaders.update((int(words[2]), int(words[3]), int(words[5])))
        return keys, leaders

    def _meet(self, told: Told, uptime_s: float) -> _Node:
        raw, node = told.raw, _Node(told)
        apart_s = 0.0
        if raw.boot_id != self._boot_id:
            apart_s = uptime_s - told.age_s - _uptime_of(raw)
        node.terms = Terms(
            pid=lambda pid: self._number(node, pid),
            parent=lambda pid: node.known[pid] if pid in node.living else INIT,
            uid=lambda uid: self._users.of(uid, node.raw.users),
            gid=lambda gid: self._groups.of(gid, node.raw.groups),
            start_shift=round((apart_s + self.shift_s) * TICKS_PER_S),
            ticks=Ratio(TICKS_PER_S, raw.ticks_per_s),
            page_bytes=Ratio(raw.page_bytes, PAGE_BYTES),
            terminals=self._order.setdefault(told.node, len(self._order) + 1),
        )
        return node

    def _number(self, node: _Node, pid: int) -> int:
        if pid <= 0:
            return pid
        if pid not in node.known:
            key = Key(node.name, node.incarnation, pid, 0)
            node.known[pid] = self._numbers.of(key)
        return node.known[pid]

    def _gather(self) -> None:
        found: dict[int, Remote] = {}
        for node in self._nodes.values():
            found.update(node.processes)
        self.processes = dict(sorted(found.items()))
        self.version += 1


def _uptime_of(raw: Raw) -> float:
    return float(raw.host["uptime"].split()[0])


def local_boot_id(root: Path = Path("/proc")) -> str:
    """Of this machine's kernel."""
    return (root / "sys/kernel/random/boot_id").read_text().strip()
