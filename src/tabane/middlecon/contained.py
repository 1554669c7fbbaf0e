"""Programs in containers as members: who they are and what they may do; without IO.

A node's agent has its hub *serve* an instance at a unix socket of the instance's own. Whoever comes
through that socket is the instance, whatever it says of itself: its names begin with the identity
that the agent told, `NAMESPACE/APP-INSTANCE`. It may be in the rooms that its app asks for, and
talk to the members it shares one with; all else is refused with `denied`, and it learns nothing
about who else there is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import count

import msgspec

from tabane.errors import Busy, Denied, TabaneError, UsageError
from tabane.middlecon.frames import GONE, NAME_BYTES, Frame, Kind, check_name, encode_frame
from tabane.middlecon.ports import SessionPort
from tabane.middlecon.rooms import Member
from tabane.middlecon.session import Hello

SESSIONS = 64
"""Of one instance: more than the processes of a program that has a pool of them."""
ROOMS = 256
"""Of one session; `chat.*` alone would let a program make rooms without end."""
STATE_KEYS = 32
STATE_BYTES = 4 << 10
"""Of one value: what an instance publishes is copied to all hubs, and takes 8 MiB there at most."""
_NUMBER_BYTES = len("~999")

_ALLOWED = frozenset(
    {
        *(Kind.JOIN, Kind.LEAVE, Kind.STATE, Kind.ACK, Kind.NACK, Kind.GOODBYE, Kind.ERROR),
        *(Kind.SAY, Kind.ASK, Kind.CAST, Kind.SEND, Kind.CALL, Kind.POST),
        Kind.AGREE,
    }
)
"""A new kind must be put here before a contained program may send it."""


class Served(msgspec.Struct, omit_defaults=True):
    """What an agent says of an instance: the body of SERVE, and the identity, its name."""

    path: str
    """Of the socket."""
    rooms: tuple[str, ...]
    """Names; a `*` at the end of one stands for any end."""
    asleep: bool = False
    sessions: int = SESSIONS
    """The most at the same time."""
    identity: str = ""


_parse_served = msgspec.msgpack.Decoder(Served)


def encode_served(served: Served) -> bytes:
    return msgspec.msgpack.encode(served)


def parse_served(frame: Frame) -> Served:
    """What a SERVE says. Raises `UsageError`, or `ProtocolError` for a name that may not be."""
    try:
        served = _parse_served.decode(frame.data)
    except msgspec.MsgspecError as error:
        raise UsageError(f"this SERVE cannot be read: {error}") from None
    if not served.path.startswith("/") or "\0" in served.path:
        raise UsageError(f"{served.path!r} is no absolute path for a socket")
    if served.sessions < 1:
        raise UsageError(f"{served.sessions} is not a number of sessions: at least 1")
    for room in served.rooms:
        check_name(room, "room name")
        if "*" in room[:-1]:
            raise UsageError(f"{room!r} has a * elsewhere than at its end")
    served.identity = check_name(frame.name)
    return served


def matches(rooms: tuple[str, ...], name: str) -> bool:
    """Whether one of `rooms`, which may end in `*`, is that name."""
    return any(name.startswith(room[:-1]) if room.endswith("*") else name == room for room in rooms)


def base_name(identity: str, hello: Hello) -> str:
    """The identity, followed by the name that the program chose, if that can be a part of one."""
    name = f"{identity}/{hello.name}"
    chosen = not hello.drawn and hello.name.isprintable() and not {"/", "~"} & set(hello.name)
    if not (chosen and hello.name) or len(name.encode()) > NAME_BYTES - _NUMBER_BYTES:
        return identity
    return name


def names_for(base: str, hello: Hello) -> Iterator[str]:
    """The names it may get, the best first: the one it had before, `base`, `base~2`, ..."""
    if re.fullmatch(re.escape(base) + r"(~[1-9][0-9]{0,2})?", hello.was):
        yield hello.was
    yield base
    for number in count(2):
        yield f"{base}~{number}"


def choose_name(
    identity: str,
    hello: Hello,
    runs: dict[str, str],
    is_free: Callable[[str], bool],
) -> str:
    """The name of a session. `runs` has the name of each run with a session at the same socket,
    `is_free` says whether nobody has a name, or who has it gives way. Raises `Denied`."""
    if hello.role == "hub":
        raise Denied(f"{identity} may not link hubs: it is a program in a container")
    base = base_name(identity, hello)
    held = runs.get(hello.instance, "") if hello.instance else ""
    if held == base or held.startswith(f"{base}~"):
        return held
    return next(name for name in names_for(base, hello) if is_free(name))


def find_refusal(
    served: Served, port: SessionPort, frame: Frame, members: dict[str, Member]
) -> TabaneError | None:
    """Why a session may not send this frame; None: it may."""
    kind = frame.kind
    if kind not in _ALLOWED:
        return Denied(f"{port.name} may not send frames of kind {kind}: it is in a container")
    if kind == Kind.JOIN:
        return _find_refusal_to_enter(served, port, frame.name)
    if kind in (Kind.SEND, Kind.CALL, Kind.POST) and not _share_a_room(
        port, members.get(frame.name)
    ):
        return Denied(f"{port.name} is in no room with a member {frame.name}")
    if kind == Kind.STATE and not frame.flags & GONE:
        return _find_refusal_to_put(port, frame)
    return None


def encode_refusal(frame: Frame, error: TabaneError) -> bytes:
    """The NACK to a frame."""
    return encode_frame(Kind.NACK, id=frame.id, name=error.code, data=error.message.encode())


def _find_refusal_to_enter(served: Served, port: SessionPort, room: str) -> TabaneError | None:
    if not matches(served.rooms, room):
        allowed = ", ".join(served.rooms) or "none"
        return Denied(f"{port.name} may not enter the room {room}: its app asks for {allowed}")
    if len(port.rooms) >= ROOMS and room not in {known.name for known in port.rooms.values()}:
        return Busy(
            f"{port.name} is in {ROOMS} rooms, the most a contained program may: leave some"
        )
    return None


def _find_refusal_to_put(port: SessionPort, frame: Frame) -> TabaneError | None:
    key = frame.data[: frame.value].decode(errors="replace")
    state, size = port.member.state, len(frame.data) - frame.value
    if size > STATE_BYTES:
        return Busy(f"a contained program's state values have at most {STATE_BYTES} bytes")
    if len(state) >= STATE_KEYS and key not in state:
        return Busy(f"{port.name} has {STATE_KEYS} state keys, the most it may: delete one first")
    return None


def _share_a_room(port: SessionPort, member: Member | None) -> bool:
    return member is not None and any(room in member.rooms for room in port.rooms.values())
