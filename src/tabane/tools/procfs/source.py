"""Where a view gets the nodes' processes from.

A `ProcSource` is asked again and again, from one thread. It must come back within a deadline of its
own, with what the nodes that answered in time have said and the names of those that did not.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import msgspec

from tabane.errors import ProtocolError
from tabane.tools.client import Cluster

FILES = ("stat", "status", "statm", "cmdline", "cgroup")
PATH = f"/v2/raw?scope=cluster&files={','.join(FILES)}"


class RawProcess(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One process. `files` are in the order of `Raw.files`; None: it cannot be read there."""

    pid: int
    start_ticks: int
    uid: int
    gid: int
    app: str
    instance: str
    isolation: str
    files: tuple[bytes | None, ...]


class Raw(msgspec.Struct, frozen=True, kw_only=True):
    """What a node says of its processes and its machine: see `tabane.k2i.raw`."""

    host: dict[str, bytes]
    files: tuple[str, ...]
    processes: list[RawProcess]
    boot_id: str
    ticks_per_s: int
    page_bytes: int
    users: dict[int, str]
    groups: dict[int, str]


class Told(NamedTuple):
    """One node's answer; it was so `age_s` ago, or later."""

    node: str
    incarnation: str
    age_s: float
    raw: Raw


class Answer(NamedTuple):
    """All nodes' answers."""

    told: list[Told]
    silent: list[str]


class ProcSource(Protocol):
    def fetch(self) -> Answer:
        """Blocks. Raises `TabaneError` or `OSError` when nobody answers."""


class _Part(msgspec.Struct):
    node: str
    incarnation: str
    age_s: float
    rows: bytes


class _Whole(msgspec.Struct):
    nodes: list[_Part]
    silent: list[str]


_decode_whole = msgspec.msgpack.Decoder(_Whole).decode
_decode_raw = msgspec.msgpack.Decoder(Raw).decode


class ClusterSource:
    """The nodes of a cluster: one fan-out of any node's k2i."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def fetch(self) -> Answer:
        return parse_answer(self._cluster.get_bytes(PATH))


def parse_answer(body: bytes) -> Answer:
    """Raises `ProtocolError`."""
    try:
        whole = _decode_whole(body)
        told = [Told(p.node, p.incarnation, p.age_s, _decode_raw(p.rows)) for p in whole.nodes]
    except msgspec.MsgspecError as error:
        problem = f"a node's answer is not JSON or msgpack as it should be ({error})"
        raise ProtocolError(f"{problem}: is it of another version?") from None
    return Answer(told, whole.silent)
