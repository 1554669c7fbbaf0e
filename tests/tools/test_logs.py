"""Logs that are followed: who joins, what is read on after an interruption, and when it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from queue import Queue
from threading import Event
from typing import Any

import pytest
from tests.tools.conftest import Pretended, Run, check_refusal, reply

from tabane.tools.cli.following import Place

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
APP = {"namespace": "default", "name": "hello"}
TOKYO, OSAKA = "tokyo/tokyo-1", "osaka/osaka-1"
STAMP = "2026-01-31T23:59:{:02}.000000001Z"
Step = Callable[[], object]


def line(second: int, text: str) -> bytes:
    return f"{STAMP.format(second)} stdout F {text}\n".encode()


def stream(blocks: Iterator[bytes] | list[bytes], *, breaks: bool = False) -> Iterator[bytes]:
    """A streamed answer, which comes to its end or breaks off."""
    yield HEAD
    for block in blocks:
        yield b"%x\r\n%s\r\n" % (len(block), block)
    if not breaks:
        yield b"0\r\n\r\n"


class Story:
    """What the nodes of a cluster tell. `logs`: for each instance its answers, one after the other;
    `events`: likewise of the event stream; each is asked for when the one before has ended."""

    def __init__(self, *instances: tuple[str, str]) -> None:
        self.apps = [APP]
        self.instances = [self.instance(*instance) for instance in instances]
        self.records: list[dict[str, Any]] = []
        self.silent: list[str] = []
        self.logs: dict[str, list[Iterator[bytes]]] = {}
        self.events: list[Iterator[bytes]] = []
        self.asked: Queue[str] = Queue()
        self.over = Event()

    def hang(self) -> Iterator[bytes]:
        self.over.wait()
        yield from ()

    @staticmethod
    def instance(identity: str, node: str, state: str = "ready") -> dict[str, Any]:
        return {"id": identity, "app": "default/hello", "node": node, "state": state}

    def answer(self, question: str, body: bytes) -> bytes | Iterator[bytes]:
        target = question.split()[1]
        path = target.partition("?")[0]
        if path.endswith("/log"):
            identity = path.split("/")[4]
            self.asked.put(target)
            return self.logs[identity].pop(0)
        if "follow=true" in target:
            return self.events.pop(0) if self.events else self.hang()
        key = path.rpartition("/")[2]
        rows = {"apps": self.apps, "instances": self.instances, "events": self.records}[key]
        return reply({key if key != "events" else "records": rows, "silent": self.silent})

    def tell(self, *steps: dict[str, Any] | Step, silent: tuple[str, ...] = ()) -> Iterator[bytes]:
        """Events, and what is done between them."""
        yield json.dumps({"silent": silent}).encode() + b"\n"
        for step in steps:
            if isinstance(step, dict):
                yield json.dumps(step).encode() + b"\n"
            else:
                step()

    def wait_asked(self, *identities: str) -> Step:
        """Until these logs, in whatever order, were asked for."""

        def wait() -> None:
            found = {self.asked.get(timeout=60).split("/")[4] for _ in identities}
            assert found == set(identities)

        return wait


def event(identity: str, node: str, state: str) -> dict[str, Any]:
    return {"at": 0, "instance": identity, "app": "default/hello", "node": node, "state": state}


REMOVED = {"app": "default/hello", "removed": True}


@pytest.fixture
def story(pretended: Pretended) -> Iterator[Story]:
    story = Story(("aaaa", TOKYO))
    pretended.begin(tokyo=story.answer, osaka=story.answer)
    yield story
    story.over.set()


def test_instances_that_start_later_join(tabane: Run, story: Story) -> None:
    story.records = [event("old1", TOKYO, "absent")]
    queries: list[str] = []

    def later() -> None:
        queries.append(story.asked.get(timeout=60))

    story.logs = {"aaaa": [stream([line(1, "one")])], "bbbb": [stream([line(2, "two")])]}
    story.logs |= {"cccc": [stream([line(3, "three")])]}
    steps = [
        *(later, event("aaaa", TOKYO, "ready"), event("old1", TOKYO, "absent")),
        *(event("bbbb", OSAKA, "starting"), later, event("bbbb", OSAKA, "ready")),
        event("other", TOKYO, "starting") | {"app": "default/other"},
        *(event("cccc", TOKYO, "starting"), later, event("bbbb", OSAKA, "absent"), REMOVED),
    ]
    story.events = [stream(story.tell(*steps))]
    ended = tabane("logs", "-f", "-n", "7", "hello")
    assert (ended.code, ended.err) == (0, "")
    assert sorted(ended.out.splitlines()) == ["aaaa | one", "bbbb | two", "cccc | three"]
    assert ["tail=7&" in query for query in queries] == [True, False, False]
    assert story.asked.empty()


def test_one_that_is_only_being_prepared_is_read_when_it_starts(tabane: Run, story: Story) -> None:
    story.instances = [story.instance("aaaa", TOKYO, "preparing")]
    story.logs = {"aaaa": [stream([line(1, "one")])]}
    steps = [event("aaaa", TOKYO, "starting"), story.wait_asked("aaaa"), REMOVED]
    story.events = [stream(story.tell(*steps))]
    assert tabane("logs", "-f", "hello") == (0, "aaaa | one\n", "")


def test_a_log_that_breaks_off_is_read_on(tabane: Run, story: Story) -> None:
    """Nothing twice, though two lines have one stamp; what comes first again is not shown."""
    first = [line(1, "one"), line(2, "two"), line(2, "three")]
    again = [line(2, "two"), line(2, "three"), line(2, "four"), line(3, "five")]
    story.logs = {"aaaa": [stream(first, breaks=True), stream(again)]}
    queries: list[str] = []

    def next_query() -> None:
        queries.append(story.asked.get(timeout=60))

    story.events = [stream(story.tell(next_query, next_query, REMOVED))]
    ended = tabane("logs", "-f", "-n", "5", "hello")
    words = ["one", "two", "three", "four", "five"]
    assert ended.out == "".join(f"aaaa | {word}\n" for word in words)
    broke, back = ended.err.splitlines()
    assert broke.startswith(f"tabane: {TOKYO} broke off: ")
    assert broke.endswith("what is written there follows when it is back")
    assert back == f"tabane: {TOKYO} is back"
    assert f"tail=0&follow=true&since={STAMP.format(2)}" in queries[1]


def test_lines_that_are_gone_meanwhile_are_said(tabane: Run, story: Story) -> None:
    first, again = [line(1, "one")], [line(3, "three")]
    story.logs = {"aaaa": [stream(first, breaks=True), stream(again)]}
    steps = [story.wait_asked("aaaa"), story.wait_asked("aaaa"), REMOVED]
    story.events = [stream(story.tell(*steps))]
    ended = tabane("logs", "-f", "hello")
    assert ended.out == "aaaa | one\naaaa | three\n"
    assert "lines of aaaa are missing here" in ended.err


def test_a_node_that_was_away_is_asked_what_has_begun_there(tabane: Run, story: Story) -> None:
    """One that runs, and one that came and went; nobody told their start."""
    story.records = [event("old1", OSAKA, "absent")]
    story.logs = {name: [stream([line(1, name)])] for name in ("aaaa", "bbbb", "cccc")}

    def come_and_go() -> None:
        story.instances.append(story.instance("bbbb", OSAKA))
        story.records.append(event("cccc", OSAKA, "absent"))

    away, back = ({"node": OSAKA, "linked": linked} for linked in (False, True))
    both = story.wait_asked("bbbb", "cccc")
    steps = [story.wait_asked("aaaa"), away, come_and_go, back, both, REMOVED]
    story.events = [stream(story.tell(*steps))]
    ended = tabane("logs", "-f", "hello")
    assert sorted(ended.out.splitlines()) == ["aaaa | aaaa", "bbbb | bbbb", "cccc | cccc"]
    heard = f"nothing is heard of {OSAKA}: what is written there follows when it is back"
    assert ended.err == f"tabane: {heard}\ntabane: {OSAKA} is back\n"


def test_what_ended_before_on_a_node_that_was_away_at_first_is_not_shown(
    tabane: Run, story: Story
) -> None:
    story.silent = [OSAKA]
    story.logs = {name: [stream([line(1, name)])] for name in ("aaaa", "bbbb")}

    def come() -> None:
        story.silent = []
        story.instances.append(story.instance("bbbb", OSAKA))
        story.records = [event("old1", OSAKA, "absent"), event("bbbb", OSAKA, "ready")]

    back = {"node": OSAKA, "linked": True}
    steps = [story.wait_asked("aaaa"), come, back, story.wait_asked("bbbb"), REMOVED]
    story.events = [stream(story.tell(*steps, silent=(OSAKA,)))]
    ended = tabane("logs", "-f", "hello")
    assert sorted(ended.out.splitlines()) == ["aaaa | aaaa", "bbbb | bbbb"]
    assert ended.err.splitlines()[0].startswith(f"tabane: no answer from {OSAKA}: ")


def test_a_node_that_is_there_but_did_not_answer_is_asked_again(
    tabane: Run, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tabane.tools.cli.following.RETRY_S", 0.01)
    story.silent = [OSAKA]
    story.logs = {name: [stream([line(1, name)])] for name in ("aaaa", "bbbb")}

    def come() -> None:
        story.instances.append(story.instance("bbbb", OSAKA))
        story.silent = []

    steps = [story.wait_asked("aaaa"), come, story.wait_asked("bbbb"), REMOVED]
    story.events = [stream(story.tell(*steps))]
    ended = tabane("logs", "-f", "hello")
    assert sorted(ended.out.splitlines()) == ["aaaa | aaaa", "bbbb | bbbb"]


def test_events_that_break_off_are_heard_anew(tabane: Run, story: Story) -> None:
    story.logs = {name: [stream([line(1, name)])] for name in ("aaaa", "bbbb")}

    def come() -> None:
        story.instances.append(story.instance("bbbb", OSAKA))

    story.events = [
        stream(story.tell(story.wait_asked("aaaa"), come), breaks=True),
        stream(story.tell(story.wait_asked("bbbb"), {"error": "busy", "message": "anew"})),
        stream(story.tell(REMOVED)),
    ]
    ended = tabane("logs", "-f", "hello")
    assert (ended.code, ended.err) == (0, "")
    assert sorted(ended.out.splitlines()) == ["aaaa | aaaa", "bbbb | bbbb"]


def test_an_app_that_was_removed_unheard(tabane: Run, story: Story) -> None:
    story.logs = {"aaaa": [stream([line(1, "one")])]}

    def remove() -> None:
        story.apps = []

    story.events = [
        stream(story.tell(story.wait_asked("aaaa"), remove), breaks=True),
        stream(story.tell()),
    ]
    assert tabane("logs", "-f", "hello") == (0, "aaaa | one\n", "")


def test_when_no_events_can_be_heard_it_ends(tabane: Run, story: Story) -> None:
    story.logs = {"aaaa": [stream([line(1, "one")])]}
    story.events = [stream([], breaks=True) for _ in range(3)]
    check_refusal(tabane("logs", "-f", "hello"), 1, f"{TOKYO} broke off")


def test_a_log_that_cannot_be_read_keeps_no_other_from_it(tabane: Run, story: Story) -> None:
    story.instances.append(story.instance("bbbb", OSAKA))
    missing = reply({"error": "not_found", "message": "there is no log of aaaa"}, 404)
    story.logs = {"aaaa": [iter([missing])], "bbbb": [stream([line(1, "one")])]}
    story.events = [stream(story.tell(story.wait_asked("aaaa", "bbbb"), REMOVED))]
    ended = tabane("logs", "-f", "hello")
    assert ended == (1, "bbbb | one\n", "tabane: there is no log of aaaa\n")


def test_an_instance_is_followed_to_its_end(tabane: Run, story: Story) -> None:
    story.instances.append(story.instance("bbbb", OSAKA))
    story.logs = {"aaaa": [stream([line(1, "one")])]}

    def go_on() -> Iterator[bytes]:
        yield from story.tell()
        story.asked.get(timeout=60)

    story.events = [stream(go_on())]
    assert tabane("logs", "-f", "aaaa") == (0, "one\n", "")


def test_a_moment_that_is_none_is_refused_at_once(tabane: Run, story: Story) -> None:
    story.instances = []
    ended = tabane("logs", "-f", "--since", "yesterday", "hello")
    check_refusal(ended, 2, "write an age as 10m or 2h")


@pytest.mark.parametrize("cut", range(7))
def test_a_place_in_a_log_after_any_line(cut: int) -> None:
    """Whatever the log was cut after, the rest comes once."""
    log = [line(second, str(n)) for n, second in enumerate((1, 1, 1, 2, 3, 3))]
    place = Place(0, "")
    assert all(place.take(entry) for entry in log[:cut])
    since = place.query().partition("&since=")[2]
    rest = [entry for entry in log if entry.decode() >= since]
    assert not any(place.misses(entry) for entry in rest[:1])
    assert [entry for entry in rest if place.take(entry)] == log[cut:]
