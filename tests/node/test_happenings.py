"""What those are told who follow what happens."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from tabane.middlecon import Presence
from tabane.middlecon.frames import Change
from tabane.middlecon.views import MemberInfo
from tabane.node.happenings import Happenings
from tabane.node.running import Transition, without_end
from tabane.store.api import Change as Written

NODES = ("tokyo/tokyo-1", "osaka/osaka-1", "nara/nara-1")


def make() -> tuple[Happenings, dict[str, MemberInfo]]:
    """Those of tokyo/tokyo-1, and the members of its room."""
    members: dict[str, MemberInfo] = {}
    agent: Any = SimpleNamespace(
        config=SimpleNamespace(
            key=NODES[0],
            cluster=SimpleNamespace(keys=NODES),
        ),
        room=SimpleNamespace(members=members),
        me=SimpleNamespace(name="tokyo/tokyo-1/agent"),
    )
    return Happenings(agent), members


def test_who_wants_only_transitions_is_told_nothing_else() -> None:
    happenings, _ = make()
    told: list[bytes] = []
    end = happenings.follow(told.append)
    happenings.on_presence(Presence("osaka/osaka-1/agent", Change.LEFT, ""))
    happenings.begin_anew()
    happenings.tell(b"{}")
    end()
    happenings.tell(b"{}")
    assert told == [b"{}"]


def test_what_is_around() -> None:
    happenings, members = make()
    for node, known in (("osaka/osaka-1", True), ("nara/nara-1", False)):
        members[f"{node}/agent"] = MemberInfo(f"{node}/agent", node, known)
    told: list[bytes] = []
    end = happenings.follow(told.append, around=True)
    for member, change in (
        ("osaka/osaka-1/agent", Change.UNKNOWN),
        ("osaka/osaka-1/gateway-0", Change.LEFT),
        ("tokyo/tokyo-1/agent", Change.JOINED),
        ("osaka/osaka-1/agent", Change.BACK),
        ("osaka/osaka-1/agent", Change.LEFT),
        ("osaka/osaka-1/agent", Change.JOINED),
    ):
        happenings.on_presence(Presence(member, change, ""))
    deleted = Written("apps/default/hello", None, 7)
    other = (Written("apps/default/new", b"{}", 7), Written("nodes/x", None, 7))
    happenings.on_changes((deleted, *other))
    members.clear()
    happenings.begin_anew()
    end()
    happenings.on_changes((deleted,))
    assert [json.loads(what) for what in told] == [
        {"silent": ["nara/nara-1"]},
        {"node": "osaka/osaka-1", "linked": False},
        {"node": "osaka/osaka-1", "linked": True},
        {"node": "osaka/osaka-1", "linked": False},
        {"node": "osaka/osaka-1", "linked": True},
        {"app": "default/hello", "removed": True},
        {"silent": ["osaka/osaka-1", "nara/nara-1"]},
    ]


def test_one_that_fails_keeps_no_other_from_being_told() -> None:
    happenings, _ = make()
    told: list[bytes] = []

    def fail(what: bytes) -> None:
        raise RuntimeError("as told")

    happenings.follow(fail)
    happenings.follow(told.append)
    happenings.tell(b"{}")
    assert told == [b"{}"]


def journalled() -> tuple[Happenings, list[Transition]]:
    """Of an agent that has not joined the others yet."""
    happenings, _ = make()
    agent: Any = happenings._agent
    written: list[Transition] = []
    agent.events = SimpleNamespace(recent=lambda: tuple(written), add=written.append)
    agent.joined = False
    return happenings, written


def test_the_end_of_a_part_is_an_event_once_however_often_the_holder_tells_it() -> None:
    happenings, written = journalled()
    told: list[bytes] = []
    happenings.follow(told.append)
    end = {"part": "agent", "at": 5.0, "why": {"signal": 9}, "pause_s": 0.05}
    happenings.on_part_end(end)
    happenings.on_part_end(end)
    happenings.on_part_end(end | {"at": 6.0, "why": "no such file"})
    assert [(each.part, each.at, each.reason) for each in written] == [
        ("agent", 5.0, "killed by SIGKILL; it is started again after 0.05 s"),
        ("agent", 6.0, "no such file; it is started again after 0.05 s"),
    ]
    assert [json.loads(each)["part"] for each in told] == ["agent", "agent"]
    assert without_end(written, ()) == []
