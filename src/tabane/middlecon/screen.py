"""What the command `middlecon` shows: text without surprises, JSON, receipts, the view of `top`.

Names and data come from other programs, so characters that would move a terminal's cursor or colour
it are shown as escapes. In JSON, data is a string if it is UTF-8, else `{"base64": ...}`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tabane.middlecon.client import Client, Room
from tabane.middlecon.receipts import Receipt, Replies
from tabane.middlecon.views import MemberInfo

Row = tuple[str, ...]


def printable(data: bytes | str) -> str:
    """As text, without a newline at its end, and with escapes for all but tabs and newlines."""
    text = data if isinstance(data, str) else data.decode(errors="backslashreplace")
    text = text.removesuffix("\n")
    return "".join(c if c.isprintable() or c in "\t\n" else ascii(c)[1:-1] for c in text)


def one_line(data: bytes | str) -> str:
    """As `printable`, with newlines and tabs as escapes too."""
    return printable(data).replace("\n", "\\n").replace("\t", "\\t")


def as_json(value: object) -> str:
    """One line."""
    return json.dumps(value, ensure_ascii=False)


def json_data(data: bytes) -> object:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def receipt_lines(receipt: Receipt) -> list[str]:
    """How many got it, and a line for each who did not."""
    missed = {name: str(reason) for name, reason in receipt.failed.items()}
    missed |= dict.fromkeys(receipt.unknown, "unknown: the link to its hub died")
    missed |= dict.fromkeys(receipt.asleep, "asleep")
    count = len(receipt.acknowledged)
    told = f", {receipt.told} told in chat" if receipt.told else ""
    first = f"{count} of {count + len(missed)} acknowledged{told}"
    return [first, *(one_line(f"  {name}: {why}") for name, why in sorted(missed.items()))]


def receipt_json(receipt: Receipt) -> dict[str, Any]:
    """A receipt, or replies, for scripts."""
    fates: dict[str, Any] = {
        "complete": receipt.complete,
        "acknowledged": sorted(receipt.acknowledged),
        "failed": {
            name: {"cause": str(reason.cause), "text": reason.text, "code": reason.code}
            for name, reason in sorted(receipt.failed.items())
        },
        "unknown": sorted(receipt.unknown),
        "asleep": sorted(receipt.asleep),
        "told": receipt.told,
    }
    if isinstance(receipt, Replies):
        fates["answers"] = {name: json_data(data) for name, data in sorted(receipt.answers.items())}
    return fates


def state_lines(state: Mapping[str, Mapping[str, bytes]]) -> list[str]:
    return [
        f"{one_line(member)}: {one_line(key)}={one_line(value)}"
        for member, values in sorted(state.items())
        for key, value in sorted(values.items())
    ]


def state_json(state: Mapping[str, Mapping[str, bytes]]) -> dict[str, Any]:
    return {
        member: {key: json_data(value) for key, value in sorted(values.items())}
        for member, values in sorted(state.items())
    }


# The view of `top`


@dataclass
class RoomView:
    """A room at one moment. `heard`: messages of each sender, or None when we are no member."""

    members: dict[str, MemberInfo]
    state: dict[str, dict[str, bytes]]
    heard: dict[str, int] | None = None


class HubStats(msgspec.Struct):
    """What a hub tells of itself (`Client.hub_stats`), as far as it is shown."""

    sessions: int = 0
    rooms: dict[str, int] = {}
    """Members of each."""
    links: dict[str, int] = {}
    """Bytes that wait for each peer."""
    pending: int = 0
    """Messages whose fate is not known yet."""
    backlog_bytes: int = 0
    dropped: dict[str, int] = {}
    """Casts that went nowhere, by the session or link that was too slow."""
    messages: dict[str, int] = {}
    """Said in each room so far, as far as it reached the hub."""


@dataclass
class View:
    """What a client sees at the time `at` (seconds). `trouble`: why there is no session."""

    at: float
    hub: str
    trouble: str = ""
    hubs: dict[str, bool] = field(default_factory=dict)
    rooms: dict[str, RoomView] = field(default_factory=dict)
    stats: HubStats | None = None


def look(
    client: Client,
    rooms: Iterable[Room],
    heard: Mapping[str, Mapping[str, int]],
    stats: HubStats | None,
    at: float,
) -> View:
    """`heard`: by room and sender, for rooms that we are a member of."""
    view = View(at, client.hub, "" if client.connected else client.trouble, stats=stats)
    view.hubs = dict(client.hubs)
    for room in rooms:
        state = {name: dict(values) for name, values in room.state.items()}
        seen = RoomView(dict(room.members), state)
        if room.name in heard:
            seen.heard = dict(heard[room.name])
        view.rooms[room.name] = seen
    return view


def rate(now: int | None, before: int | None, elapsed_s: float) -> float | None:
    """Per second; None when it is not known, not yet, or counted anew."""
    if now is None or before is None or now < before or elapsed_s <= 0:
        return None
    return (now - before) / elapsed_s


def _said(view: View | None, room: str) -> int | None:
    return None if view is None or view.stats is None else view.stats.messages.get(room)


def _shown_rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


class Rates:
    """Messages per second between two views; the first has none before it."""

    def __init__(self, view: View, before: View | None) -> None:
        self._view = view
        self._before = before
        self._elapsed_s = view.at - before.at if before is not None else 0.0

    def of_room(self, room: str) -> float | None:
        return rate(_said(self._view, room), _said(self._before, room), self._elapsed_s)

    def of_member(self, room: str, member: str) -> float | None:
        heard = self._view.rooms[room].heard
        before = self._before.rooms.get(room) if self._before else None
        if heard is None or before is None or before.heard is None:
            return None
        return rate(heard.get(member, 0), before.heard.get(member, 0), self._elapsed_s)


def view_json(view: View, before: View | None) -> dict[str, Any]:
    rates = Rates(view, before)
    rooms = {}
    for name, room in sorted(view.rooms.items()):
        state = state_json(room.state)
        members = {
            member: {
                "hub": info.hub,
                "known": info.known,
                "messages_per_s": rates.of_member(name, member),
                "state": state.get(member, {}),
            }
            for member, info in sorted(room.members.items())
        }
        rooms[name] = {"messages_per_s": rates.of_room(name), "members": members}
    return {
        "hub": view.hub,
        "connected": not view.trouble,
        "hubs": dict(sorted(view.hubs.items())),
        "rooms": rooms,
        "stats": msgspec.to_builtins(view.stats),
    }


def view_lines(view: View, before: View | None, clock: str) -> list[str]:
    """The view as text. `clock`: the time of day."""
    rates = Rates(view, before)
    lines = [_header(view, clock)]
    if view.hubs:
        lines += [
            "",
            *table(("HUB", "LINK", "WAITING"), [_link_row(view, hub) for hub in sorted(view.hubs)]),
        ]
    names = sorted(view.rooms.keys() | (view.stats.rooms.keys() if view.stats else set()))
    if names:
        lines += [
            "",
            *table(("ROOM", "MEMBERS", "MSG/S"), [_room_row(view, rates, name) for name in names]),
        ]
    rows = [row for name in sorted(view.rooms) for row in _member_rows(view, rates, name)]
    if rows:
        lines += ["", *table(("MEMBER", "ROOM", "HUB", "MSG/S", "STATE"), rows)]
    return lines


def _link_row(view: View, hub: str) -> Row:
    waiting = view.stats.links.get(hub, 0) if view.stats else None
    words = "-" if waiting is None else f"{waiting:,} bytes"
    return hub, "open" if view.hubs[hub] else "down", words


def _room_row(view: View, rates: Rates, name: str) -> Row:
    room = view.rooms.get(name)
    if room is None:
        assert view.stats is not None
        size = view.stats.rooms[name]
    else:
        size = len(room.members)
    return name, str(size), _shown_rate(rates.of_room(name))


def _header(view: View, clock: str) -> str:
    if view.trouble:
        return f"middlecon - {clock}, no session with hub {view.hub} now: {one_line(view.trouble)}"
    members = {name for room in view.rooms.values() for name in room.members}
    words = [_count(len(view.rooms), "room"), _count(len(members), "member")]
    if view.hubs:
        words.append(f"{sum(view.hubs.values())} of {_count(len(view.hubs), 'link')} open")
    if (stats := view.stats) is not None:
        words.append(_count(stats.sessions, "session"))
        words.append(f"{stats.pending:,} pending")
        words.append(f"{stats.backlog_bytes:,} bytes waiting")
        words.append(f"{sum(stats.dropped.values()):,} dropped")
    return f"middlecon - {clock}, hub {view.hub}: {', '.join(words)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _member_rows(view: View, rates: Rates, room: str) -> Iterable[Row]:
    seen = view.rooms[room]
    for name, info in sorted(seen.members.items()):
        values = " ".join(
            f"{key}={value.decode(errors='backslashreplace')}"
            for key, value in sorted(seen.state.get(name, {}).items())
        )
        hub = info.hub if info.known else f"{info.hub} (unknown)"
        yield name, room, hub, _shown_rate(rates.of_member(room, name)), values


def table(heads: Row, rows: Sequence[Row]) -> list[str]:
    """Columns as wide as their widest cell; East Asian characters take two places."""
    from rich.cells import cell_len

    cells = [heads, *(tuple(map(one_line, row)) for row in rows)]
    widths = [max(cell_len(row[column]) for row in cells) for column in range(len(heads))]
    return [
        "  ".join(
            text + " " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in cells
    ]


def fit(lines: Sequence[str], columns: int, rows: int) -> list[str]:
    """What a terminal of that size can show, with how many lines are missing."""
    from rich.cells import cell_len, set_cell_size

    shown = list(lines)
    if len(shown) > rows:
        shown = [*shown[: rows - 1], f"... {len(shown) - rows + 1} lines more"]
    return [line if cell_len(line) <= columns else set_cell_size(line, columns) for line in shown]
